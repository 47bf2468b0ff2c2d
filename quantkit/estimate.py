"""`quantkit plan`: what a recipe will make of a model and what that takes here, before any weight is read.

Sizes come from the very functions that lay out the files; memory and time from `footprint`, of this machine as it is
now. Where it will not fit, changed recipes are estimated until some do: those are the knobs that are named.
"""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from quantkit.algorithms.rtn import rtn
from quantkit.census import Census, kv_bytes, take_census
from quantkit.errors import UserError
from quantkit.footprint import Job, need, seconds
from quantkit.formats import FORMATS
from quantkit.grids import RangeSearch, make_grid
from quantkit.machine import Machine, measure
from quantkit.plan import activation_spec, kv_spec, smaller_group, weight_spec
from quantkit.recipe import Recipe, from_data
from quantkit.types import Scheme

SAMPLE = (256, 4096)  # rows and columns that are rounded to time it
FEWEST_SAMPLES = 16
KNOBS = 3  # that are named at most
GIB = 1 << 30


def estimate(
    recipe: Recipe,
    config_folder: Path,
    *,
    target: Path | None = None,
    trust_remote_code: bool = False,
    machine: Machine | None = None,
) -> dict[str, Any]:
    """Sizes, memory, time and verdict for a folder with config.json, with or without weights.

    target: the folder that will be written into (default: the current one). UserError for what `quantize` refuses too:
    an unknown architecture, patterns without effect, a scheme the format cannot hold.
    """
    census = take_census(config_folder, trust_remote_code=trust_remote_code)
    target = target or Path()
    machine = machine or measure(target)
    jobs = resolve(recipe, census)
    size, bits = _sizes(recipe, census, jobs)
    needed = need(recipe, census, jobs, machine.process)
    disk = size + needed.spilled
    weights = sum(job.matrix.numel for job in jobs)
    stages = seconds(recipe, census, jobs, machine, _per_weight(jobs), census.stored + size)
    kv = kv_spec(recipe.kv_cache)
    problems = []
    if needed.peak > machine.free_memory:
        problems.append(
            f"memory: needs about {needed.peak / GIB:.1f} GiB, {machine.free_memory / GIB:.1f} GiB are free"
        )
    if disk > machine.free_disk:
        problems.append(
            f"disk: needs {disk / GIB:.1f} GiB, {machine.free_disk / GIB:.1f} GiB are free at {target.resolve()}"
        )
    return {
        "model": str(config_folder),
        "model_type": getattr(census.config, "model_type", None),
        "weights_seen": census.from_headers,
        "params": dict(census.params),
        "linears": len(jobs),
        "schemes": dict(Counter(str(job.scheme) for job in jobs)),
        "bytes_before": census.stored,
        "bytes_after": size,
        "bits_per_weight": bits / weights,
        "kv_cache": "as computed" if kv is None else str(kv),
        "kv_bytes_per_token": kv_bytes(census.config, kv, census.dtype),
        "memory": needed.memory,
        "peak_memory_bytes": needed.peak,
        "free_memory_bytes": machine.free_memory,
        "disk_bytes": disk,
        "free_disk_bytes": machine.free_disk,
        "seconds": stages,
        "seconds_total": sum(stages.values()),
        "machine": f"{machine.cores} cores, {machine.flops / 1e9:.0f} GFLOP/s, {machine.disk_rate / 1e9:.2f} GB/s",
        "fits": not problems,
        "problems": problems,
        "advice": _advice(recipe, census, machine, target) if problems else [],
    }


def resolve(recipe: Recipe, census: Census) -> list[Job]:
    """The linears the recipe quantizes, each with its scheme; UserError with every misfit, as `quantize` has it."""
    classes = {m.name: m.class_name for m in census.matrices} | dict.fromkeys(census.skipped, "Linear")
    if unmatched := recipe.unmatched(classes):
        raise UserError("\n".join(unmatched))
    format_ = FORMATS[recipe.output.format]
    jobs: list[Job] = []
    misfits: Counter[tuple[int, int]] = Counter()
    checked: set[Any] = set()
    for matrix in census.matrices:
        weights = recipe.weights_for(matrix.name, matrix.class_name)
        if weights is None:
            continue
        N, K = matrix.shape
        spec, size = weight_spec(weights), weights.group_columns
        if size != -1 and K % size and spec.rows == 1:
            if weights.on_misfit == "error":
                misfits[size, K] += 1
            if weights.on_misfit in ("error", "skip"):
                continue
            spec = weight_spec(weights, -1 if weights.on_misfit == "channel" else smaller_group(K, size))
        scheme = Scheme(spec, activation_spec(recipe.activations_for(matrix.name, matrix.class_name)))
        scale_dtype = format_.scale_dtype(scheme, matrix.dtype)
        if (key := (matrix.shape, scheme, scale_dtype)) not in checked:
            format_.layout((N, K), scheme, scale_dtype)
            checked.add(key)
        jobs.append(Job(matrix, weights, scheme, scale_dtype))
    if misfits:
        shown = ", ".join(f"{size} does not divide {K} ({count} linears)" for (size, K), count in misfits.items())
        raise UserError(f"weights.group_size {shown}; set weights.group_size: channel, or weights.on_misfit")
    if not jobs:
        raise UserError("no linear is left to quantize")
    return jobs


def _sizes(recipe: Recipe, census: Census, jobs: list[Job]) -> tuple[int, int]:
    """Bytes of all tensors of the output, and bits of the quantized weights among them."""
    format_ = FORMATS[recipe.output.format]
    known: dict[Any, tuple[int, int]] = {}
    size, bits = census.stored, 0
    for job in jobs:
        key = (job.matrix.shape, job.scheme, job.scale_dtype)
        if key not in known:
            layout = format_.layout(*key)
            tensors = [(dtype, torch.Size(shape).numel() * dtype.itemsize) for dtype, shape in layout.values()]
            known[key] = (
                sum(held for _, held in tensors),
                sum(held for dtype, held in tensors if dtype != torch.int64),  # a shape is no part of the weight
            )
        size += known[key][0] - job.matrix.numel * job.matrix.dtype.itemsize
        bits += 8 * known[key][1]
    tied, head = census.head
    if tied and any(transform.name == "rotation" for transform in recipe.transforms):
        size += head  # absorbs the final norm, the embedding does not
    return size, bits


def _per_weight(jobs: list[Job]) -> float:
    """Seconds of fitting a range to and rounding one weight, measured for the scheme most linears have."""
    job = max(Counter((j.scheme, j.scale_dtype, j.weights.options.range) for j in jobs).items(), key=lambda i: i[1])[0]
    scheme, scale_dtype, how = job
    N, K = SAMPLE
    K = scheme.weights.columns(K) * max(1, K // scheme.weights.columns(K))
    grid = make_grid(scheme.weights, scale_dtype, None if how == "minmax" else RangeSearch(), signed=True)
    w_NK = torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    spent = []
    for _ in range(2):  # the first one warms up
        begin = time.perf_counter()
        rtn(w_NK, grid)
        spent.append(time.perf_counter() - begin)
    return min(spent) / w_NK.numel()


def _advice(recipe: Recipe, census: Census, machine: Machine, target: Path) -> list[str]:
    """For memory and disk, where there is too little: changes of the recipe that help, or what else would."""

    def takes(changed: Recipe) -> tuple[float, float]:
        jobs = resolve(changed, census)
        needed = need(changed, census, jobs, machine.process)
        return needed.peak, _sizes(changed, census, jobs)[0] + needed.spilled

    tried: list[tuple[str, float, float]] = []
    for text, data in _knobs(recipe):
        with suppress(UserError):  # a format that cannot hold it
            tried.append((text, *takes(from_data(data))))
    peak, disk = takes(recipe)
    advice = []
    if peak > machine.free_memory:
        found = [f"memory: set {text}" for text, peak, _ in tried if peak <= machine.free_memory and "bits" not in text]
        least = min([peak, *(peak for _, peak, _ in tried)])
        lacking = f"memory: no setting needs less than {least / GIB:.1f} GiB: use a machine with that much free"
        advice += found[:KNOBS] or [lacking]
    if disk > machine.free_disk:
        found = [f"disk: set {text}" for text, _, disk in tried if disk <= machine.free_disk]
        lacking = (
            f"disk: free {(disk - machine.free_disk) / GIB:.1f} GiB more at {target.resolve()}, or write elsewhere"
        )
        advice += found[:KNOBS] or [lacking]
    return advice


def _knobs(recipe: Recipe) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what to write, the recipe with it), the mildest first."""
    base = recipe.resolved()

    def changed(**updates: Any) -> dict[str, Any]:
        data = deepcopy(base)
        for path, value in updates.items():
            *parents, leaf = path.split("__")
            place = data
            for key in parents:
                place = place[key]
            place[leaf] = value
        return data

    calibration, algorithm = base.get("calibration"), base["weights"]["algorithm"]
    options = algorithm.get("gptq")
    if recipe.propagate == "original" and options:
        yield "propagate: quantized", changed(propagate="quantized")
    if calibration:
        samples = calibration["samples"] // 2
        while samples >= FEWEST_SAMPLES:
            yield f"calibration.samples: {samples}", changed(calibration__samples=samples)
            samples //= 2
        if calibration["seq_len"] >= 512:
            half = calibration["seq_len"] // 2
            yield f"calibration.seq_len: {half}", changed(calibration__seq_len=half)
    if options and options["refit"]:
        plain = changed(weights__algorithm={"gptq": options | {"refit": False}})
        yield "weights.algorithm: {gptq: {refit: false}}", plain
        if calibration and calibration["samples"] > FEWEST_SAMPLES:
            plain["calibration"]["samples"] = FEWEST_SAMPLES
            yield f"weights.algorithm: {{gptq: {{refit: false}}}} and calibration.samples: {FEWEST_SAMPLES}", plain
    if base["transforms"]:
        yield "transforms: []", changed(transforms=[])
    rounding = {"rtn": {"range": "minmax"}}
    if calibration:
        yield (
            "weights.algorithm: {rtn: {range: minmax}} with transforms: [] and no calibration",
            changed(weights__algorithm=rounding, transforms=[], calibration=None),
        )
    for bits in (4, 3, 2):
        if base["weights"]["bits"] > bits:
            integers = {"type": "int", "bits": bits, "group_size": 128, "algorithm": algorithm}
            yield f"weights: {{type: int, bits: {bits}, group_size: 128}}", changed(scheme=None, weights=integers)
            yield (
                f"weights: {{type: int, bits: {bits}, group_size: 128, algorithm: {{rtn: {{range: minmax}}}}}} "
                "with transforms: [] and no calibration",
                changed(scheme=None, weights=integers | {"algorithm": rounding}, transforms=[], calibration=None),
            )


def render(result: dict[str, Any], console: Console) -> None:
    """The estimate for people: what comes out, what it takes, and the verdict last."""
    total = sum(result["params"].values())
    kinds = ", ".join(f"{kind} {_count(n)}" for kind, n in sorted(result["params"].items(), key=lambda kv: -kv[1]))
    seen = "headers" if result["weights_seen"] else "config.json alone"
    console.print(f"{result['model']}: {result['model_type']}, {_count(total)} parameters ({kinds})", markup=False)
    schemes = ", ".join(f"{count} x {scheme}" for scheme, count in result["schemes"].items())
    console.print(f"{result['linears']} linears: {schemes}; sizes from {seen}", markup=False)
    table = Table("", "estimate", "free", box=None, pad_edge=False)
    before, after = result["bytes_before"], result["bytes_after"]
    table.add_row("output", f"{after / GIB:.2f} GiB of {before / GIB:.2f}", "")
    table.add_row("bits per quantized weight", f"{result['bits_per_weight']:.3f}", "")
    table.add_row("cache per token", f"{result['kv_bytes_per_token'] / 1024:.1f} KiB, {result['kv_cache']}", "")
    table.add_row(
        "peak memory", f"{result['peak_memory_bytes'] / GIB:.2f} GiB", f"{result['free_memory_bytes'] / GIB:.2f} GiB"
    )
    for part, size in result["memory"].items():
        table.add_row(f"  {part}", f"{size / GIB:.2f}", "")
    table.add_row("disk", f"{result['disk_bytes'] / GIB:.2f} GiB", f"{result['free_disk_bytes'] / GIB:.2f} GiB")
    table.add_row("time", _duration(result["seconds_total"]), f"on a CPU: {result['machine']}")
    for stage, spent in result["seconds"].items():
        table.add_row(f"  {stage}", _duration(spent), "")
    console.print(table)
    console.print("it fits" if result["fits"] else "it does not fit", style="green" if result["fits"] else "red")
    for line in result["problems"]:
        console.print(f"  {line}", markup=False)
    for line in result["advice"]:
        console.print(f"  {line}", markup=False)


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return str(number)


def _duration(spent: float) -> str:
    if spent < 120:
        return f"{spent:.1f} s"
    return f"{spent / 60:.0f} min" if spent < 7200 else f"{spent / 3600:.1f} h"
