"""Quantize the linears that share one input: the step between a block's statistics and the algorithms.

Shapes: N = rows of a linear, K = input features.
"""

from dataclasses import dataclass

from torch import Tensor

from quantkit.algorithms import ALGORITHMS, Evidence, Needs
from quantkit.errors import RunError
from quantkit.grids import RangeSearch, make_grid
from quantkit.quantization.calibration.statistics import Statistic
from quantkit.quantization.targets import LinearTarget
from quantkit.report.records import LinearRecord
from quantkit.types import QuantizedWeight


def needs_of(linear: LinearTarget) -> Needs:
    """What the linear's algorithm asks calibration for."""
    return ALGORITHMS[linear.weights.algorithm].needs(linear.weights.options.model_dump(), linear.spec)


@dataclass(frozen=True, slots=True)
class Result:
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
) -> list[Result]:
    """Quantize the [N_i, K] weights (by name) of linears with one common input.

    Linears of equal settings go to the algorithm together: what they share is then computed once.
    statistic is None where there is no calibration or no token came (an expert): then rounding on the plain grid.
    RunError naming the linears where a weight or the statistic holds NaN or Inf.
    """
    alike: dict[tuple, list[LinearTarget]] = {}
    for linear in linears:
        key = (linear.scheme, linear.scale_dtype, linear.weights.model_dump_json())
        alike.setdefault(key, []).append(linear)
    results = []
    for position, members in enumerate(alike.values()):
        last = position == len(alike) - 1
        try:
            results += _quantize(members, weights, statistic, drift, signed=signed, consume=last)
        except RunError as error:
            raise RunError(f"{', '.join(linear.name for linear in members)}: {error}") from error
    return results


def _quantize(
    members: list[LinearTarget],
    weights: dict[str, Tensor],
    statistic: Statistic | None,
    drift: dict[str, Tensor],
    *,
    signed: bool,
    consume: bool,
) -> list[Result]:
    """Quantize linears of equal settings; consume: the Hessian's memory is not needed after them."""
    first, needs = members[0], needs_of(members[0])
    hessian_KK = None if statistic is None or not needs.hessian else statistic.hessian_KK
    name = first.weights.algorithm if hessian_KK is not None or not needs.hessian else "rtn"
    blocks_Ggg = importance_K = None
    if statistic is not None:
        importance_K = (statistic.square_sum_K / statistic.count).float()
        blocks_Ggg = statistic.diagonal_blocks(first.spec.columns(first.shape[1])) if needs.block else None
    options = first.weights.options.model_dump()
    search = None if options["range"] == "minmax" else RangeSearch()
    grid = make_grid(first.spec, first.scale_dtype, search, signed=signed, blocks_Ggg=blocks_Ggg)
    moved = [drift[linear.name] for linear in members if linear.name in drift]
    evidence = Evidence(
        importance_K, hessian_KK, None if statistic is None else statistic.count, moved or None, consume=consume
    )
    found = ALGORITHMS[name].quantize([weights[linear.name] for linear in members], evidence, grid, options)
    return [
        Result(
            linear,
            done.weight,
            LinearRecord(
                linear.name,
                str(linear.scheme),
                list(linear.shape),
                name,
                done.error,
                done.error_rounding,
                done.damping,
                statistic.count if statistic is not None and hessian_KK is not None else None,
                done.dead_columns or None,
                f"the Hessian did not factor: damping raised to {done.damping:g}" if done.raised else None,
            ),
        )
        for linear, done in zip(members, found, strict=True)
    ]
