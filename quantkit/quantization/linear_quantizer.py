"""Quantize the linears that share one input: the step between a block's statistics and the algorithms.

Shapes: N = rows of all linears of a group, K = input features, M = tokens of a batch.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.algorithms.clip import search_clip
from quantkit.algorithms.gptq import GptqInfo, factor, gptq
from quantkit.algorithms.rtn import relative_error, rtn
from quantkit.errors import RunError
from quantkit.grids import Grid, RangeSearch, make_grid
from quantkit.grids.integer import IntegerGrid
from quantkit.quantization.calibration.statistics import (
    Statistic,
)
from quantkit.quantization.targets import LinearTarget
from quantkit.recipe.algorithms import GptqOptions, RtnOptions
from quantkit.types import QuantizedWeight


def refits(linear: LinearTarget) -> bool:
    """Whether this linear's weight is re-fitted to the original outputs before rounding (asymmetric calibration)."""
    return isinstance(linear.weights.options, GptqOptions) and linear.weights.options.refit


def needs_hessian(linears: list[LinearTarget]) -> bool:
    return any(isinstance(linear.weights.options, GptqOptions) for linear in linears)


def wants_blocks(linear: LinearTarget) -> bool:
    """Whether this linear is rounded on ranges that look at each group's output error."""
    options = linear.weights.options
    plain = linear.spec.element == "int" and linear.spec.scale_rows == 1
    return isinstance(options, RtnOptions) and options.range == "output" and plain and 0 < linear.spec.group_size <= 256


@dataclass(frozen=True, slots=True)
class Result:
    """A linear with its quantized weight and its line for the report."""

    linear: LinearTarget
    quantized: QuantizedWeight
    record: dict[str, Any]


def quantize_group(
    weights: dict[str, Tensor],
    linears: list[LinearTarget],
    statistic: Statistic | None,
    drift: dict[str, Tensor],
    *,
    signed: bool,
) -> list[Result]:
    """Quantize the [N_i, K] weights (by name) of linears with one common input.

    Linears of equal settings are stacked: one factorisation and one column loop serve all of them.
    statistic is None where there is no calibration or no token came (an expert): then rounding on the plain grid.
    """
    stacks: dict[Any, list[LinearTarget]] = {}
    for linear in linears:
        key = (linear.scheme, linear.scale_dtype, linear.weights.model_dump_json())
        stacks.setdefault(key, []).append(linear)
    results = []
    for position, members in enumerate(stacks.values()):
        first = members[0]
        if statistic is None or statistic.hessian_KK is None or first.weights.algorithm == "rtn":
            # Rounding gains nothing from company, so each linear stays as it lies: no copy, no float32 of the whole.
            # Only what engines want to be common to linears with one input is found for all of them.
            importance_K = None if statistic is None else (statistic.square_sum_K / statistic.count).float()
            grid = _grid(first, signed).for_tensors([weights[linear.name] for linear in members], importance_K)
            results += [_round(weights[linear.name], linear, statistic, importance_K, grid) for linear in members]
            continue
        w_NK = torch.cat([weights[linear.name].float() for linear in members])
        moved = [drift[linear.name] for linear in members if linear.name in drift]
        moved_NK, last = torch.cat(moved) if moved else None, position == len(stacks) - 1
        try:
            q, info = _gptq(w_NK, members, statistic, moved_NK, _grid(first, signed), last)
        except RunError as error:
            raise RunError(f"{', '.join(linear.name for linear in members)}: {error}") from error
        start = 0
        for linear in members:
            stop = start + linear.shape[0]
            results.append(
                Result(linear, q.rows(start, stop), _gptq_record(linear, info, statistic.count, start, stop))
            )
            start = stop
    return results


def _grid(linear: LinearTarget, signed: bool) -> Grid:
    search = None if linear.weights.options.range == "minmax" else RangeSearch()
    return make_grid(linear.spec, linear.scale_dtype, search, signed=signed)


def _round(
    w_NK: Tensor, linear: LinearTarget, statistic: Statistic | None, importance_K: Tensor | None, grid: Grid
) -> Result:
    """Round to nearest; the ranges come from the output error of each group where its hessian is known."""
    blocks_Ggg = None
    if statistic is not None and wants_blocks(linear):
        blocks_Ggg = statistic.diagonal_blocks(linear.spec.columns(linear.shape[1]))
    if blocks_Ggg is not None and isinstance(grid, IntegerGrid):
        q = grid.quantize(w_NK, *search_clip(w_NK, blocks_Ggg, grid))
    else:
        q = rtn(w_NK, grid, importance_K=importance_K)
    record = {"name": linear.name, "scheme": str(linear.scheme), "shape": list(linear.shape), "algorithm": "rtn"}
    return Result(linear, q, record | {"error": relative_error(w_NK, q, importance_K)})


def _gptq(
    w_NK: Tensor, members: list[LinearTarget], statistic: Statistic, drift_NK: Tensor | None, grid: Grid, consume: bool
) -> tuple[QuantizedWeight, GptqInfo]:
    options = members[0].weights.options
    assert isinstance(options, GptqOptions)
    assert statistic.hessian_KK is not None
    shared = factor(
        statistic.hessian_KK,
        tokens=statistic.count,
        damping=options.damping,
        act_order=options.act_order,
        float64=options.float64,
        overwrite=consume,
        keep_matrix=options.sweeps > 0,
    )
    return gptq(
        w_NK,
        shared,
        grid,
        stacked=[linear.shape[0] for linear in members],
        drift_NK=drift_NK,
        sweeps=options.sweeps,
        ranges=options.ranges,
        block_size=options.block_size,
    )


def _gptq_record(linear: LinearTarget, info: GptqInfo, tokens: int, start: int, stop: int) -> dict[str, Any]:
    record: dict[str, Any] = {"name": linear.name, "scheme": str(linear.scheme), "shape": list(linear.shape)}
    rounded, error = info.relative_errors(start, stop)
    record |= {"algorithm": "gptq", "error_rounding": rounded, "error": error, "damping": info.damping}
    record["tokens"] = tokens
    if info.attempts > 1:
        record["note"] = f"the Hessian did not factor: damping raised to {info.damping:g}"
    if info.dead_columns:
        record["dead_columns"] = info.dead_columns
    return record
