"""`quantkit plan`: what a recipe will make of a model and what that takes here, before any weight is read.

Sizes come from the very functions that lay out the files; memory and time are those of this machine as it is
now. Where it will not fit, changed recipes are estimated until some do: those are the knobs that are named.
"""

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from quantkit.algorithms.rtn import rtn
from quantkit.checkpoint.header import read_json
from quantkit.grids import RangeSearch, make_grid
from quantkit.paths import user_path
from quantkit.planner.advice import GB, advice
from quantkit.planner.calibration_size import calibration_size, check_text
from quantkit.planner.linear_groups import PlannedLinear
from quantkit.planner.model_inventory import kv_bytes, take_inventory
from quantkit.planner.output_size import measured_sizes, planned_gguf, planned_targets, resolved, sizes
from quantkit.planner.run_memory import need
from quantkit.planner.run_time import seconds
from quantkit.planner.this_machine import Machine, measure
from quantkit.quantization.early_checks import check_plan, check_planned
from quantkit.quantization.engine_check import check_engine
from quantkit.quantization.gguf_checks import check_gguf
from quantkit.quantization.gguf_importance import recipe_imatrix, run_importance
from quantkit.quantization.gguf_keys import check_planned_tokenizer, gguf_remarks
from quantkit.quantization.targets import cache_spec
from quantkit.recipe import load as recipes
from quantkit.recipe.recipe import Recipe
from quantkit.report.plan import Plan

SAMPLE = (64, 4096)  # rows and columns that are rounded to time it


def plan(
    model: str | Path | None,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    target: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """What quantizing `model` by `recipe` will make and take on this machine, before any weight is read.

    model   folder (config.json is enough) or Hub id, of which JSON files alone are fetched; None: the recipe's own
    recipe  a shipped name, a file, plain data or a Recipe
    target  the folder that will be written into, for the free disk (default: the current one)

    Sizes are in bytes, times in seconds on this machine's CPU; `Plan.fits` is the verdict. Raises UserError for
    whatever `quantize` refuses and names, paths, config.json and headers show, in the same words.
    """
    if isinstance(recipe, Mapping):
        recipe = recipes.from_data(recipe)
    if not isinstance(recipe, Recipe):
        recipe = recipes.load(recipe, model=None if model is None else str(model))
    if model is not None:
        recipe = recipe.model_copy(update={"model": str(model)})
    return estimate(
        recipe,
        check_plan(recipe),
        target=None if target is None else user_path(target),
        trust_remote_code=trust_remote_code,
    )


def estimate(
    recipe: Recipe,
    config_folder: Path,
    *,
    target: Path | None = None,
    trust_remote_code: bool = False,
    machine: Machine | None = None,
    run_follows: bool = False,
) -> Plan:
    """The plan for a folder with config.json, with or without weights.

    target: the folder that will be written into (default: the current one); run_follows: a run is about to begin,
    which judges the tokenizer itself. UserError, in the same words, for what
    `quantize` refuses too: an unknown architecture, patterns without effect, a scheme that the format or the engine
    does not take, a missing calibration file.
    """
    check_planned(recipe, config_folder)
    whole = recipe.gguf is not None
    inventory = take_inventory(config_folder, trust_remote_code=trust_remote_code, whole_experts=whole)
    target = target or Path()
    config = read_json(config_folder / "config.json", "")
    gguf = planned_gguf(recipe, inventory, config)
    if not inventory.from_headers:
        check_gguf(recipe, config, inventory.tensors)
    if gguf is not None and not run_follows:
        check_planned_tokenizer(recipe, config_folder, gguf)
    text = calibration_size(recipe, inventory)
    check_text(recipe, inventory, config_folder, trust_remote_code)
    jobs, found = resolved(recipe, inventory, gguf)
    remarks: list[str] = []
    if gguf is not None:
        given = recipe_imatrix(recipe)
        importance = run_importance(given, gguf, found.linears)
        remarks = gguf_remarks(gguf, config, inventory.tensors, given, importance)
    planned = planned_targets(recipe, inventory, found)
    warnings = check_engine(recipe, planned, inventory.tensors, config)
    machine = machine or measure(target)
    size, bits = sizes(recipe, inventory, jobs)
    bits_per_weight = bits / sum(job.matrix.numel for job in jobs)
    schemes, types = Counter(str(job.scheme) for job in jobs), None
    if gguf is not None:
        dense = [f"{name}.weight" for name, _ in found.skipped]
        gguf = gguf.with_dense(dense, inventory.tensors)
        size, types = gguf.data_bytes, gguf.by_type()
        if (measured := measured_sizes(recipe, gguf, dense)) is not None:
            size, types, bits_per_weight = measured.nbytes, measured.types, measured.bits_per_weight
            schemes = Counter(measured.type_of(f"{job.matrix.name}.weight") for job in jobs)
    needed = need(recipe, inventory, jobs, machine.process, text)
    disk = int(size + needed.spilled)
    stages = seconds(recipe, inventory, jobs, machine, _per_weight(jobs), inventory.stored + size, text)
    kv = cache_spec(recipe.kv_cache)
    problems = []
    if needed.peak > machine.free_memory:
        problems.append(f"memory: needs about {needed.peak / GB:.1f} GB, {machine.free_memory / GB:.1f} GB are free")
    if disk > machine.free_disk:
        problems.append(
            f"disk: needs {disk / GB:.1f} GB, {machine.free_disk / GB:.1f} GB are free at {target.resolve()}"
        )
    return Plan(
        model=str(config_folder),
        model_type=getattr(inventory.config, "model_type", None),
        weights_seen=inventory.from_headers,
        params=dict(inventory.params),
        linears=len(jobs),
        schemes=dict(schemes),
        types=types,
        bytes_before=inventory.stored,
        bytes_after=size,
        bits_per_weight=bits_per_weight,
        kv_cache="as computed" if kv is None else str(kv),
        kv_bytes_per_token=kv_bytes(inventory.config, kv, inventory.dtype),
        calibration=text,
        memory={part: int(held) for part, held in needed.memory.items()},
        free_memory_bytes=machine.free_memory,
        disk_bytes=disk,
        free_disk_bytes=machine.free_disk,
        seconds=stages,
        machine=f"{machine.cores} cores, {machine.flops / 1e9:.0f} GFLOP/s, {machine.disk_rate / 1e9:.2f} GB/s",
        problems=tuple(problems),
        advice=tuple(advice(recipe, inventory, machine, target, config)) if problems else (),
        warnings=(*warnings, *remarks, *found.notes),
    )


def _per_weight(jobs: list[PlannedLinear]) -> float:
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
