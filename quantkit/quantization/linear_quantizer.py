"""Quantize the linears that share one input: the step between a block's statistics and the algorithms.

Shapes: N = rows of a linear, K = input features.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.algorithms import ALGORITHMS, Evidence, Needs, Quantized
from quantkit.algorithms.outliers import input_peak, weight_peak
from quantkit.errors import RunError
from quantkit.grids import Grid, RangeSearch, make_grid
from quantkit.quantization.calibration.statistics import Statistic
from quantkit.quantization.gguf_importance import Importance
from quantkit.quantization.targets import LinearTarget
from quantkit.report.block_records import GptqErrors, LinearRecord, Outliers
from quantkit.types import QuantizedWeight

NO_TOKEN = "no calibration token reached it: rounded on the range of its weights alone"
SHARED = "{} reached it: its statistics are those of all experts of its layer"
GIVEN = "no calibration token reached it: rounded by the importance matrix"


def needs_of(linear: LinearTarget) -> Needs:
    """What the linear's algorithm asks calibration for."""
    return ALGORITHMS[linear.weights.algorithm].needs(linear.weights.options.model_dump(), linear.spec)


def needs_hessian(linears: Sequence[LinearTarget]) -> bool:
    """Whether any of the linears asks for the Hessian of its input."""
    return any(needs_of(linear).hessian for linear in linears)


def block_columns(linears: Sequence[LinearTarget]) -> int | None:
    """Columns of the Hessian's diagonal blocks that serve all linears of one input; None where none asks for them."""
    sizes = [size for linear in linears if (size := needs_of(linear).block)]
    common = math.lcm(*sizes)
    return common if sizes and linears[0].shape[1] % common == 0 else max(sizes, default=None)


@dataclass(frozen=True, slots=True)
class ExpertTokens:
    """How many calibration tokens reached an expert; shared: so few that its statistic is that of its layer."""

    count: int
    shared: bool


class Result(NamedTuple):
    """A linear with its quantized weight and its line for the report."""

    linear: LinearTarget
    quantized: QuantizedWeight
    record: LinearRecord


def quantize_group(
    weights: dict[str, Tensor],
    linears: list[LinearTarget],
    statistic: Statistic | None,
    drift: dict[str, Tensor],
    *,
    signed: bool,
    calibrated: bool = False,
    importance: Importance | None = None,
    expert: ExpertTokens | None = None,
) -> list[Result]:
    """Quantize the [N_i, K] weights (by name) of linears with one common input.

    Linears of equal settings go to their algorithm together. RunError, naming them, where it fails.
    statistic   None where there is no calibration or no token came (an expert): then they are rounded
    drift       what the outputs of a linear lack, [N_i, K], where its algorithm undoes it
    signed      whether scales may be negative
    calibrated  whether the run has calibration: without a statistic the record then says so
    expert      of experts: how many tokens reached them, and whether they are too few
    importance  E[x^2] by name of the linear, of an importance matrix: goes before the statistic in what is rounded
    """
    stacks: dict[tuple, list[LinearTarget]] = {}
    for linear in linears:
        own = linear.name if importance and linear.name in importance and _algorithm(linear, statistic) == "rtn" else ""
        stacks.setdefault((linear.scheme, linear.scale_dtype, linear.weights.model_dump_json(), own), []).append(linear)
    results, reached = [], statistic is not None or not calibrated
    for position, ((*_, own), members) in enumerate(stacks.items()):
        first = members[0]
        name = _algorithm(first, statistic)
        evidence = _evidence(members, statistic, drift, last=position == len(stacks) - 1)
        if own and importance:
            evidence = replace(evidence, importance_K=torch.from_numpy(importance[own]).to(weights[own].device))
        note = None if reached else GIVEN if own else NO_TOKEN
        outliers = [weight_peak(weights[linear.name]) for linear in members]  # algorithms may work in place
        channels = None if statistic is None else input_peak(statistic.mean_square())
        if expert is not None and expert.shared and reached:
            few = f"only {expert.count} calibration tokens" if expert.count else "no calibration token"
            note = SHARED.format(few)
        grid = _grid(first, statistic, signed)
        options = first.weights.options.model_dump()
        try:
            done = ALGORITHMS[name].quantize([weights[linear.name] for linear in members], evidence, grid, options)
        except RunError as error:
            raise RunError(f"{', '.join(linear.name for linear in members)}: {error}") from error
        results += [
            Result(linear, one.weight, _record(linear, name, one, evidence, note, Outliers(peak, channels), expert))
            for linear, one, peak in zip(members, done, outliers, strict=True)
        ]
    return results


def _algorithm(linear: LinearTarget, statistic: Statistic | None) -> str:
    """The linear's own, or rounding where that needs a Hessian and there is none."""
    return "rtn" if needs_of(linear).hessian and statistic is None else linear.weights.algorithm


def _evidence(
    members: list[LinearTarget], statistic: Statistic | None, drift: dict[str, Tensor], *, last: bool
) -> Evidence:
    """What is known of the input; the last algorithm to see it may use the Hessian's memory."""
    if statistic is None:
        return Evidence()
    lost = [drift[linear.name] for linear in members if linear.name in drift]
    return Evidence(statistic.count, statistic.mean_square(), statistic.hessian_KK, lost or None, consume=last)


def _grid(linear: LinearTarget, statistic: Statistic | None, signed: bool) -> Grid:
    search = None if linear.weights.options.range == "minmax" else RangeSearch()
    size = needs_of(linear).block
    blocks_Ggg = statistic.diagonal_blocks(size) if statistic is not None and size else None
    return make_grid(linear.spec, linear.scale_dtype, search, signed=signed, blocks_Ggg=blocks_Ggg)


def _record(
    linear: LinearTarget,
    algorithm: str,
    done: Quantized,
    evidence: Evidence,
    note: str | None,
    outliers: Outliers,
    expert: ExpertTokens | None,
) -> LinearRecord:
    gptq = None
    if done.damping is not None and done.error_rounding is not None:
        gptq = GptqErrors(done.error_rounding, done.damping, evidence.tokens, done.dead_columns)
    tokens = None if expert is None else expert.count
    if done.raised:
        note = f"the Hessian did not factor: damping raised to {done.damping:g}"
    done_by = (str(linear.scheme), linear.shape, algorithm, done.error, gptq, note)
    return LinearRecord(linear.name, *done_by, outliers, tokens)
