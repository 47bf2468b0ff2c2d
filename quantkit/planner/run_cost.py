"""What a run of a recipe on a model will take: peak memory, spilled states, seconds. Formulas of the code that runs.

Each term stands for a tensor or a product that group.py, calibration.py, lockstep.py or gptq.py really makes; where the
library decides (activations inside a block) it is a bound.

Shapes: N = out features (of all linears of a group), K = in features, M = calibration tokens, H = hidden size.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from quantkit.planner.model_inventory import LinearShape, ModelInventory
from quantkit.planner.this_machine import Machine
from quantkit.quantization.calibration.hidden_states import BATCH_FLOATS, BATCH_TOKENS
from quantkit.quantization.calibration.spill import STATES_LIMIT
from quantkit.quantization.calibration.staged_forward import RESIDUALS
from quantkit.quantization.resources import (
    KEPT,
)
from quantkit.recipe.algorithms import Algorithm, GptqOptions
from quantkit.recipe.number_formats import Weights
from quantkit.recipe.recipe import Recipe
from quantkit.types import Scheme

EFFICIENCY = 0.6  # of what a large square product reaches: walks and Hessians are narrower


@dataclass(frozen=True, slots=True)
class PlannedLinear:
    """One linear that is quantized."""

    matrix: LinearShape
    weights: Weights
    scheme: Scheme
    scale_dtype: torch.dtype


@dataclass(slots=True)
class Group:
    """Linears with one input: N rows in all, of which `largest` is the largest matrix's count of weights."""

    K: int
    expert: bool
    algorithm: Algorithm
    columns: int
    N: int = 0
    largest: int = 0

    @property
    def gptq(self) -> GptqOptions | None:
        return self.algorithm.gptq


@dataclass(slots=True)
class MemoryEstimate:
    """Bytes of memory by what holds them, and bytes of states that go to a file in the output folder."""

    memory: dict[str, float]
    spilled: float = 0.0

    @property
    def peak(self) -> float:
        return sum(self.memory.values())


def grouped(jobs: Iterable[PlannedLinear]) -> dict[int, list[Group]]:
    """The groups of every block."""
    found: dict[tuple[int, str], Group] = {}
    for job in jobs:
        N, K = job.matrix.shape
        spec = job.scheme.weights
        group = found.setdefault(
            (job.matrix.block, job.matrix.group), Group(K, job.matrix.expert, job.weights.choice, spec.columns(K))
        )
        group.N += N
        group.largest = max(group.largest, N * K)
    blocks: dict[int, list[Group]] = {}
    for (block, _), group in found.items():
        blocks.setdefault(block, []).append(group)
    return blocks


def need(recipe: Recipe, inventory: ModelInventory, jobs: list[PlannedLinear], process: int) -> MemoryEstimate:
    """Memory and spilled states of the whole run, at its worst block."""
    blocks = list(grouped(jobs).values())
    calibrated, H = recipe.calibration, inventory.hidden_size
    held = max(inventory.blocks) * (4 if calibrated else inventory.dtype.itemsize)
    result = MemoryEstimate({"python and libraries": process, "weights of one block": held})
    memory = result.memory
    if calibrated is None:
        memory["rounding one linear"] = max(_rounding(group) for groups in blocks for group in groups)
        return result

    def array(size: float) -> float:
        spills = size > STATES_LIMIT
        result.spilled += size if spills else 0
        return 0.0 if spills else size

    M = calibrated.samples * calibrated.seq_len
    refits = recipe.propagate == "quantized" and any(g.gptq and g.gptq.refit for groups in blocks for g in groups)
    memory["calibration states"] = sum(array(4 * M * H) for _ in range(1 + refits))
    if refits:
        worst = max(blocks, key=lambda groups: sum(g.K for g in groups if _refits(g)))
        memory["inputs of the original model"] = sum(array(4 * M * g.K) for g in worst if _refits(g))
    widest = max(g.K for groups in blocks for g in groups)
    memory["pages kept for reuse"] = KEPT / 2
    memory["activations"] = _activations(recipe, blocks, M, H, widest)
    phases = [max(_stages(recipe, groups, refits) for groups in blocks)]
    names = {transform.name for transform in recipe.transforms}
    stack = max(g.N * g.K for groups in blocks for g in groups)
    if names & {"awq", "smoothquant"}:
        hessians = max(sum(4 * g.K**2 for g in groups) for groups in blocks) if "awq" in names else 0
        phases.append(hessians + 3 * 4 * stack)
    if names:  # proving folds and rotations: the matrices of one fold, or one at a time, in float64
        phases.append(8 * stack * 2)
    memory["statistics and working copies"] = max(phases)
    return result


def lockstep_fits(recipe: Recipe, blocks: list[list[Group]], M: int, H: int, widest: int) -> bool:
    """Whether all batches may be halted inside a block (see lockstep.fits)."""
    stages = recipe.propagate == "quantized" and any(g.gptq for groups in blocks for g in groups)
    experts = any(g.expert for groups in blocks for g in groups)
    return stages and not experts and 4 * M * (widest + RESIDUALS * H) <= STATES_LIMIT


def seconds(
    recipe: Recipe,
    inventory: ModelInventory,
    jobs: list[PlannedLinear],
    machine: Machine,
    per_weight: float,
    copied: float,
) -> dict[str, float]:
    """Seconds by stage. per_weight: seconds of fitting and rounding one weight; copied: bytes read and written."""
    rate = machine.flops * EFFICIENCY
    found = {"reading and writing": copied / machine.disk_rate}
    found["ranges and rounding"] = per_weight * sum(job.matrix.numel for job in jobs)
    if recipe.calibration is None:
        return found
    blocks = list(grouped(jobs).values())
    H, S = inventory.hidden_size, recipe.calibration.seq_len
    M = recipe.calibration.samples * S
    per_token = sum(2 * m.numel * (inventory.active if m.expert else 1) for m in inventory.matrices)
    once = M * (per_token + 4 * S * H * len(inventory.blocks))
    passes = _passes(recipe, blocks, lockstep_fits(recipe, blocks, M, H, max(g.K for b in blocks for g in b)))
    found["running the blocks"] = once * passes / rate
    statistics = algorithm = 0.0
    for groups in blocks:
        for group in groups:
            tokens = M * (inventory.active if group.expert else 1)
            statistics += _statistics(group, tokens)
            algorithm += _algorithm(recipe, group, tokens)
    found["statistics"] = statistics / rate
    found["algorithms"] = algorithm / rate
    return found


def _refits(group: Group) -> bool:
    return bool(group.gptq and group.gptq.refit and not group.expert)


def _rounding(group: Group) -> float:
    """One linear at a time: float32, its scaled copy, codes and packed codes."""
    return group.largest * (4 + 4 + 1 + 1)


def _activations(recipe: Recipe, blocks: list[list[Group]], M: int, H: int, widest: int) -> float:
    """What one batch holds inside a block, and all of them where they are halted together."""
    assert recipe.calibration is not None
    least, most = BATCH_TOKENS
    step = max(1, min(max(BATCH_FLOATS // H, least), most) // recipe.calibration.seq_len)
    batch = min(step, recipe.calibration.samples) * recipe.calibration.seq_len
    floats = batch * (2 * widest + RESIDUALS * H)
    if lockstep_fits(recipe, blocks, M, H, widest):
        floats = max(floats, M * (widest + RESIDUALS * H))
    return 4 * floats


def _stages(recipe: Recipe, groups: list[Group], refits: bool) -> float:
    """Bytes of the stage that needs most memory: all its statistics at once, and the work on one group."""
    staged = recipe.propagate == "quantized" and any(group.gptq for group in groups)
    stages = [[g] for g in groups if not g.expert] + [[g for g in groups if g.expert]] if staged else [groups]
    return max(
        sum(_held(group, refits) for group in stage) + max(_work(group, refits) for group in stage)
        for stage in stages
        if stage
    )


def _held(group: Group, refits: bool) -> float:
    """Statistics of a group, and the drift of its outputs with the weights it is computed with."""
    if group.gptq is None:
        return 4 * group.K * group.columns if group.algorithm.options.range == "output" else 8 * group.K
    drift = 4 * group.K * (group.N + min(group.N, group.K)) if refits and _refits(group) else 0
    return 4 * group.K**2 + drift


def _work(group: Group, refits: bool) -> float:
    """The factor beside the Hessian; weight, error and codes of the stacked linears; the re-fitted target."""
    if group.gptq is None:
        return _rounding(group)
    factor = (8 + 8 if group.gptq.float64 else 4) * group.K**2
    stack = group.N * group.K
    refitted = 2 * 4 * stack if refits and _refits(group) else 0
    return factor + (4 + 4 + 2) * stack + refitted


def _passes(recipe: Recipe, blocks: list[list[Group]], halted: bool) -> float:
    """How many times the calibration text runs through every block."""
    gptq = [g.gptq for groups in blocks for g in groups if g.gptq]
    if recipe.propagate == "original":
        passes = 1.0
    elif gptq and not halted:  # once to the end, and for every stage up to it
        passes = 1 + max(min(len(groups), 4) for groups in blocks) / 2
    else:
        passes = 1.0 if gptq else 2.0
    passes += recipe.propagate == "quantized" and any(options.refit for options in gptq)
    return passes + sum(transform.name in ("awq", "smoothquant") for transform in recipe.transforms)


def _statistics(group: Group, tokens: float) -> float:
    if group.gptq is not None:
        return tokens * group.K**2  # half of the product: the other half is its mirror
    return 2 * tokens * group.K * group.columns if group.algorithm.options.range == "output" else 2 * tokens * group.K


def _algorithm(recipe: Recipe, group: Group, tokens: float) -> float:
    N, K = group.N, group.K
    flops = 0.0
    for transform in recipe.transforms:
        if transform.name == "awq":  # tr(E H E^T) of each candidate
            flops += tokens * K**2 + 2 * (transform.options.candidates + 1) * N * K**2
    if group.gptq is None:
        return flops
    walk = N * K**2
    flops += K**3 / 3 + walk * (1 + 2 * group.gptq.sweeps)
    if _refits(group) and recipe.propagate == "quantized":
        flops += min(4 * tokens * N * K, 2 * tokens * K**2 + 2 * N * K**2) + 2 * walk
    return flops
