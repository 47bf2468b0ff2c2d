"""Seconds of a run by stage: the products it computes, by what this machine computes in a second.

Shapes: N = out features (of all linears of a group), K = in features, M = calibration tokens, H = hidden size.
"""

import re

from quantkit.planner.linear_groups import Blocks, Group, PlannedLinear, grouped, halted
from quantkit.planner.model_inventory import ModelInventory
from quantkit.planner.this_machine import Machine
from quantkit.quantization.calibration.hidden_states import batch_samples
from quantkit.quantization.gguf_allocation import CHECKED
from quantkit.quantization.gguf_budget import FREE
from quantkit.quantization.gguf_measured import compared_samples
from quantkit.quantization.gguf_weights import SAMPLE
from quantkit.quantization.held_out import windows_for
from quantkit.quantization.transforms.scale_folding import LOSS_TOKENS, trial_runs
from quantkit.recipe.gguf import Measured
from quantkit.recipe.recipe import Recipe
from quantkit.report.plan import CalibrationSize

EFFICIENCY = 0.6  # of what a large square product reaches: walks and Hessians are narrower


def seconds(
    recipe: Recipe,
    inventory: ModelInventory,
    jobs: list[PlannedLinear],
    machine: Machine,
    per_weight: float,
    copied: float,
    text: CalibrationSize | None,
) -> dict[str, float]:
    """Seconds by stage.

    per_weight: seconds of fitting and rounding one weight; copied: bytes read and written; text: how much is read
    """
    rate = machine.flops * EFFICIENCY
    found = {"reading and writing": copied / machine.disk_rate}
    found["ranges and rounding"] = per_weight * sum(job.matrix.numel for job in jobs)
    if text is None:
        return found
    blocks, H, S = grouped(jobs), inventory.hidden_size, text.seq_len
    M = text.tokens
    per_token = sum(2 * m.numel * (inventory.active if m.expert else 1) for m in inventory.matrices)
    once = M * (per_token + 4 * S * H * len(inventory.blocks))
    passes = _passes(recipe, blocks, halted(recipe, blocks, inventory, M)) + _trials(recipe, blocks, H, text)
    found["running the blocks"] = once * passes / rate
    statistics = algorithm = 0.0
    for groups in blocks:
        for group in groups:
            tokens = M * (inventory.active if group.expert else 1)
            statistics += _statistics(group, tokens)
            algorithm += _algorithm(recipe, group, tokens)
    found["statistics"] = statistics / rate
    found["algorithms"] = algorithm / rate
    if recipe.gguf is not None and isinstance(recipe.gguf.mix, Measured):
        found["measuring types"] = _measuring(inventory, text, per_token) / rate + per_weight * _rounded(inventory)
    return found


def _measuring(inventory: ModelInventory, text: CalibrationSize, per_token: float) -> float:
    """Products of the runs that tell what a tensor's type does: through half of the blocks on average."""
    vocabulary, H = inventory.config.get_text_config().vocab_size, inventory.hidden_size
    tokens = min(text.samples, compared_samples(vocabulary, text.seq_len)) * text.seq_len
    blocks = tokens * (per_token + 4 * text.seq_len * H * len(inventory.blocks))
    tensors = {re.sub(r"experts\.\d+", "experts", matrix.name) for matrix in inventory.matrices}
    return (len(tensors) + 1) * (blocks / 2 + 2 * tokens * H * vocabulary)


def _rounded(inventory: ModelInventory) -> float:
    """Weights that are rounded for it: in the types of those runs, in all types a sample, and in the mixes compared."""
    sizes = [matrix.numel for matrix in inventory.matrices]
    sizes.append(inventory.config.get_text_config().vocab_size * inventory.hidden_size)
    return (2 + CHECKED) * sum(sizes) + len(FREE) * sum(min(size, SAMPLE) for size in sizes)


def _passes(recipe: Recipe, blocks: Blocks, stops: bool) -> float:
    """How many times the calibration text runs through every block."""
    gptq = [g.gptq for groups in blocks for g in groups if g.gptq]
    if recipe.propagate == "original":
        passes = 1.0
    elif gptq and not stops:  # once to the end, and for every stage up to it
        passes = 1 + max(min(len(groups), 4) for groups in blocks) / 2
    else:
        passes = 1.0 if gptq else 2.0
    passes += recipe.propagate == "quantized" and any(options.refit for options in gptq)
    return passes + sum(transform.name in ("awq", "smoothquant") for transform in recipe.transforms)


def _trials(recipe: Recipe, blocks: Blocks, H: int, text: CalibrationSize) -> float:
    """The passes of the whole text that the searches of folds, the cache's scales and the held-out text amount to."""
    batch = batch_samples(H, text.seq_len) * text.seq_len
    tokens = min(-(-LOSS_TOKENS // batch) * batch, text.tokens)  # whole batches
    folds = max(sum(not group.expert for group in groups) for groups in blocks)
    runs = sum(trial_runs(transform) for transform in recipe.transforms) * folds
    unseen = 2 * windows_for(text.samples, text.seq_len) * text.seq_len
    cache = recipe.kv_cache is not None
    return (runs * tokens + unseen) / text.tokens + cache


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
    if group.refits and recipe.propagate == "quantized":
        flops += min(4 * tokens * N * K, 2 * tokens * K**2 + 2 * N * K**2) + 2 * walk
    return flops
