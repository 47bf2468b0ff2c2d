"""Changes of a recipe that make it fit into memory or onto the disk."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

from quantkit.errors import UserError
from quantkit.planner.calibration_size import calibration_size
from quantkit.planner.model_inventory import ModelInventory
from quantkit.planner.output_size import gguf_bytes, planned_gguf, resolved, sizes
from quantkit.planner.run_memory import need
from quantkit.planner.this_machine import Machine
from quantkit.recipe.gguf import Measured
from quantkit.recipe.load import from_data
from quantkit.recipe.recipe import Recipe
from quantkit.report.plan import CalibrationSize

FEWEST_SAMPLES = 16
KNOBS = 3  # that are named at most
GB = 1e9


def advice(
    recipe: Recipe, inventory: ModelInventory, machine: Machine, target: Path, config: Mapping[str, Any]
) -> list[str]:
    """For memory and disk, where there is too little: changes of the recipe that help, or what else would.

    config: of config.json
    """

    def takes(changed: Recipe) -> tuple[float, float]:
        gguf = planned_gguf(changed, inventory, config)
        jobs, found = resolved(changed, inventory, gguf)
        needed = need(changed, inventory, jobs, machine.process, calibration_size(changed, inventory))
        size = sizes(changed, inventory, jobs)[0] if gguf is None else gguf_bytes(changed, inventory, gguf, found)
        return needed.peak, size + needed.spilled

    tried: list[tuple[str, float, float]] = []
    for text, data in _knobs(recipe, calibration_size(recipe, inventory)):
        with suppress(UserError):  # a format that cannot hold it
            tried.append((text, *takes(from_data(data))))
    peak, disk = takes(recipe)
    found_advice = []
    if peak > machine.free_memory:
        found = [f"memory: set {text}" for text, peak, _ in tried if peak <= machine.free_memory and "bits" not in text]
        least = min([peak, *(peak for _, peak, _ in tried)])
        lacking = f"memory: no setting needs less than {least / GB:.1f} GB: use a machine with that much free"
        found_advice += found[:KNOBS] or [lacking]
    if disk > machine.free_disk:
        found = [f"disk: set {text}" for text, _, disk in tried if disk <= machine.free_disk]
        lacking = f"disk: free {(disk - machine.free_disk) / GB:.1f} GB more at {target.resolve()}, or write elsewhere"
        found_advice += found[:KNOBS] or [lacking]
    return found_advice


def _knobs(recipe: Recipe, read: CalibrationSize | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what to write, the recipe with it), the mildest first. read: how much calibration text it takes as it is."""
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

    algorithm = base["weights"]["algorithm"]
    if recipe.gguf is not None and isinstance(recipe.gguf.mix, Measured):
        yield "gguf.mix: Q4_K_M", changed(gguf__mix="Q4_K_M")
    options = algorithm.get("gptq")
    if recipe.propagate == "original" and options:
        yield "propagate: quantized", changed(propagate="quantized")
    if read:
        samples = read.samples // 2
        while samples >= FEWEST_SAMPLES:
            yield f"calibration.samples: {samples}", changed(calibration__samples=samples)
            samples //= 2
        if read.seq_len >= 512:
            half = read.seq_len // 2
            yield f"calibration.seq_len: {half}", changed(calibration__seq_len=half)
    if options and options["refit"]:
        plain = changed(weights__algorithm={"gptq": options | {"refit": False}})
        yield "weights.algorithm: {gptq: {refit: false}}", plain
        if read and read.samples > FEWEST_SAMPLES:
            plain["calibration"]["samples"] = FEWEST_SAMPLES
            yield f"weights.algorithm: {{gptq: {{refit: false}}}} and calibration.samples: {FEWEST_SAMPLES}", plain
    if base["transforms"]:
        yield "transforms: []", changed(transforms=[])
    rounding = {"rtn": {"range": "minmax"}}
    if read:
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
