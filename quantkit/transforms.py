"""Transforms on a block before its weights are quantized: proven folds of the graph with the scales an algorithm finds.

Shapes: C = channels of a fold's producer, K = input features of its readers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantkit import calibration as cal
from quantkit.algorithms.awq import search_scale, storable
from quantkit.graph import BlockGraph, Fold, apply_fold
from quantkit.grids.integer import IntegerGrid
from quantkit.plan import Linear
from quantkit.recipe import AwqOptions

LOSS_TOKENS = 4096  # calibration tokens on which finalists are compared by the block's own output


@dataclass(slots=True)
class Folded:
    """What a transform did: lines for the report, and by how much each input group of the block was divided [K]."""

    records: list[dict[str, Any]] = field(default_factory=list)
    scales: dict[int, Tensor] = field(default_factory=dict)


def awq(
    options: AwqOptions, states: cal.States, block: nn.Module, graph: BlockGraph, index: int, linears: list[Linear]
) -> Folded:
    """Scale every proven fold of the block by AWQ's search, in place; readers are measured with min-max rounding."""
    by_site: dict[str, list[Linear]] = {}
    for linear in linears:
        by_site.setdefault(linear.site.name, []).append(linear)
    folds = [fold for fold in graph.folds if any(name in by_site for name in fold.consumers)]
    wanted = {graph.group_of(name) for fold in folds for name in fold.consumers}
    statistics: dict[int, cal.Statistic] = {}
    done = Folded()
    if not wanted:
        return done

    def observe(group: int, _: slice, x_MK: Tensor) -> None:
        if group not in statistics:
            statistics[group] = cal.Statistic.empty(x_MK, hessian=True, magnitude=True)
        statistics[group].add(x_MK)

    cal.run(states, block, graph, index, wanted, observe, advance=False)
    for fold in folds:
        groups = sorted({graph.group_of(name) for name in fold.consumers} & statistics.keys())
        if not groups:
            continue  # experts no token reached
        found = cal.merged([statistics.pop(group) for group in groups])
        readers = [linear for name in fold.consumers for linear in by_site.get(name, [])]
        spec = min((linear.spec for linear in readers), key=lambda spec: spec.bits)  # the coarsest grid decides
        readers = [linear for linear in readers if linear.spec == spec]
        views = [linear.view(block) for linear in readers]
        assert found.hessian_KK is not None
        assert found.abs_sum_K is not None
        result = search_scale(
            [view.float() for view in views],
            found.hessian_KK,
            (found.abs_sum_K / found.count).float(),
            IntegerGrid(spec, readers[0].scale_dtype),
            columns_K=fold.columns,
            candidates=options.candidates,
            loss=None if len(groups) > 1 else _block_loss(states, block, index, views),
            snap=_snap(block, fold, readers[0].scale_dtype),
        )
        scale_C = result.scale_C
        record = {"producer": fold.producer, "consumers": list(fold.consumers), "exponents": result.exponents}
        done.records.append(record | {"loss_unscaled": result.loss_identity, "loss": result.loss_best})
        if result.loss_best < result.loss_identity:
            apply_fold(block, graph, fold, scale_C)
            for group in groups:
                done.scales[group] = fold.expand(scale_C)
    return done


def _snap(block: nn.Module, fold: Fold, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    """Scales a norm's stored weight can be divided by exactly; a linear's rows are requantized and need none."""
    if fold.kind == "linear":
        return None
    weight_C, offset = block.get_parameter(f"{fold.producer}.weight").data, 1.0 if fold.kind == "norm+1" else 0.0
    return lambda scale_C: storable(scale_C, weight_C, dtype, offset=offset)


def _block_loss(
    states: cal.States, block: nn.Module, index: int, views: list[Tensor]
) -> Callable[[list[Tensor]], float]:
    """The squared error of the block's output with other weights in the places of `views`, on a few samples."""
    batches, tokens = [], 0
    for _, hidden, call in states.batches(index):
        batches.append((hidden, call, call.run(block, hidden)))
        tokens += hidden.shape[0] * hidden.shape[1]
        if tokens >= LOSS_TOKENS:
            break

    def loss(weights: list[Tensor]) -> float:
        kept = [view.clone() for view in views]
        for view, weight in zip(views, weights, strict=True):
            view.copy_(weight)
        total = sum((call.run(block, hidden) - output).double().square().sum() for hidden, call, output in batches)
        for view, weight in zip(views, kept, strict=True):
            view.copy_(weight)
        return float(total)

    return loss


TRANSFORMS = {"awq": awq}
