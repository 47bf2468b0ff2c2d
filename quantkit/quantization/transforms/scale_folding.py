"""AWQ and SmoothQuant on a block before its weights are quantized: scales folded where the graph proves it possible.

Shapes: C = channels of a fold's producer, K = input features of its readers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quantkit.algorithms.awq import FINALISTS, search_scale, storable
from quantkit.algorithms.rtn import rtn
from quantkit.algorithms.smoothquant import search_alpha, smooth_scale
from quantkit.grids import make_grid
from quantkit.grids.activations import fake_quantize, static_range
from quantkit.grids.dequantize import dequantize
from quantkit.model.block_graph import BlockGraph, Fold, apply_fold
from quantkit.model.matmul_tracing import TraceMatmuls, WeightKey
from quantkit.model.streamed_model import BlockCall
from quantkit.quantization.calibration import hidden_states as cal
from quantkit.quantization.calibration.statistics import Statistic, merged
from quantkit.quantization.run_context import BlockContext
from quantkit.quantization.targets import LinearTarget
from quantkit.recipe.algorithms import AwqOptions, SmoothquantOptions, Transform
from quantkit.report.block_records import FoldRecord

ALPHAS = tuple(i / 10 for i in range(10))  # tried for each fold; 0 stands for no scaling
ROUNDED_RUN = 1.5  # times the work of a plain run, about: inputs are rounded
LOSS_TOKENS = 4096  # calibration tokens on which finalists are compared by the block's own output


@dataclass(slots=True)
class TransformResult:
    """Records for the report, and by what each input group of the block was divided [K]."""

    records: list[FoldRecord] = field(default_factory=list)
    scales: dict[int, Tensor] = field(default_factory=dict)


def awq(
    options: AwqOptions,
    states: cal.HiddenStates,
    context: BlockContext,
) -> TransformResult:
    """Scale every proven fold of the block by AWQ's search, in place; readers are measured with min-max rounding."""
    block, graph, index = context.block, context.graph, context.index
    by_site, folds, wanted = _folds_of(context)
    statistics: dict[int, Statistic] = {}
    done = TransformResult()
    if not wanted:
        return done

    def observe(group: int, _: slice, x_MK: Tensor) -> None:
        if group not in statistics:
            statistics[group] = Statistic.empty(x_MK, hessian=True, magnitude=True)
        statistics[group].add(x_MK)

    cal.run(states, block, graph, index, wanted, observe, advance=False)
    for fold in folds:
        groups = sorted({graph.group_of(name) for name in fold.consumers} & statistics.keys())
        if not groups:
            continue  # experts no token reached
        found = merged([statistics.pop(group) for group in groups])
        readers = [linear for name in fold.consumers for linear in by_site.get(name, [])]
        spec = min(
            (linear.spec for linear in readers), key=lambda spec: spec.bits
        )  # the coarsest grid decides the scale
        readers = [linear for linear in readers if linear.spec == spec]
        views = [linear.view(block) for linear in readers]
        assert found.hessian_KK is not None
        assert found.abs_sum_K is not None
        result = search_scale(
            [view.float() for view in views],
            found.hessian_KK,
            (found.abs_sum_K / found.count).float(),
            make_grid(spec, readers[0].scale_dtype, None, signed=True),
            columns_K=fold.columns,
            candidates=options.candidates,
            loss=None if len(groups) > 1 else _block_loss(states, block, index, views),
            snap=_snap(block, fold, readers[0].scale_dtype),
        )
        scale_C = result.scale_C
        losses = result.loss_identity, result.loss_best
        done.records.append(FoldRecord(fold.producer, fold.consumers, result.exponents, None, *losses))
        if result.loss_best < result.loss_identity:
            apply_fold(block, graph, fold, scale_C)
            for group in groups:
                done.scales[group] = fold.expand(scale_C)
    return done


def smoothquant(
    options: SmoothquantOptions,
    states: cal.HiddenStates,
    context: BlockContext,
) -> TransformResult:
    """Move outliers of the inputs into the weights over every proven fold, in place; alpha fixed or searched."""
    block, graph, index = context.block, context.graph, context.index
    by_site, folds, wanted = _folds_of(context)
    amax: dict[int, Tensor] = {}
    done = TransformResult()
    if not wanted:
        return done

    def observe(group: int, _: slice, x_MK: Tensor) -> None:
        if len(x_MK):
            amax_K = x_MK.abs().amax(0).float()
            amax[group] = torch.maximum(amax[group], amax_K) if group in amax else amax_K

    cal.run(states, block, graph, index, wanted, observe, advance=False)
    for fold in folds:
        groups = sorted({graph.group_of(name) for name in fold.consumers} & amax.keys())
        if not groups:
            continue  # experts no token reached
        amax_K = torch.stack([amax[group] for group in groups]).amax(0)
        readers = [linear for name in fold.consumers for linear in by_site.get(name, [])]
        views, snap = [linear.view(block) for linear in readers], _snap(block, fold, readers[0].scale_dtype)
        if isinstance(options.alpha, float | int):
            scale_C = smooth_scale(amax_K, views, options.alpha, fold.columns)
            scale_C = scale_C if snap is None else snap(scale_C)
            record = FoldRecord(fold.producer, fold.consumers, alpha=options.alpha)
        else:
            loss = _rounded_loss(states, context, fold, readers, amax_K)
            found = search_alpha(amax_K, views, loss, columns_K=fold.columns, alphas=ALPHAS, snap=snap)
            scale_C, losses = found.scale_C, (found.loss_identity, found.loss_best)
            record = FoldRecord(fold.producer, fold.consumers, None, found.alpha, *losses)
        done.records.append(record)
        if bool((scale_C != 1).any()):
            apply_fold(block, graph, fold, scale_C)
            for group in groups:
                done.scales[group] = fold.expand(scale_C)
                amax[group] = amax[group] / fold.expand(scale_C)
    return done


def _folds_of(context: BlockContext) -> tuple[dict[str, list[LinearTarget]], list[Fold], set[int]]:
    """Linears by site, the folds with a reader among them, and the input groups of all their readers."""
    graph, linears = context.graph, context.linears
    by_site: dict[str, list[LinearTarget]] = {}
    for linear in linears:
        by_site.setdefault(linear.site.name, []).append(linear)
    folds = [fold for fold in graph.folds if any(name in by_site for name in fold.consumers)]
    return by_site, folds, {graph.group_of(name) for fold in folds for name in fold.consumers}


def _rounded_loss(
    states: cal.HiddenStates, context: BlockContext, fold: Fold, readers: list[LinearTarget], amax_K: Tensor
) -> Callable[[Tensor | None], float]:
    """The squared error of the block's output with the readers' weights and inputs rounded, behind a fold's scale."""
    block, graph = context.block, context.graph
    batches = _reference(states, block, context.index)
    at = {(linear.site.param, linear.site.index): linear.scheme.activations for linear in readers}

    def loss(scale_C: Tensor | None) -> float:
        kept = {name: param.data.clone() for name, param in block.named_parameters() if _touched(name, fold, graph)}
        if scale_C is not None:
            apply_fold(block, graph, fold, scale_C)
        top = (amax_K if scale_C is None else amax_K / fold.expand(scale_C)).max().item()
        for linear in readers:
            view = linear.view(block)
            view.copy_(dequantize(rtn(view, make_grid(linear.spec, linear.scale_dtype, None, signed=False))))

        def on_product(weight: WeightKey, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
            spec = at.get((weight.param, weight.index))
            if spec is None:
                return run(x)
            return run(fake_quantize(x, spec, static_range(-top, top, spec) if spec.calibrated else None))

        with torch.no_grad(), TraceMatmuls(block, on_product):
            changes = [call.run(block, hidden) - output for hidden, call, output in batches]
        for name, value in kept.items():
            block.get_parameter(name).data.copy_(value)
        return float(sum(change.double().square().sum() for change in changes))

    return loss


def _touched(name: str, fold: Fold, graph: BlockGraph) -> bool:
    """Whether a fold writes into this parameter."""
    written = {graph.matrices[reader].param for reader in (*fold.consumers, *fold.routers)}
    producer = graph.matrices[fold.producer].param if fold.kind == "linear" else f"{fold.producer}.weight"
    return name in written | {producer} or name == fold.bias


def _snap(block: nn.Module, fold: Fold, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    """Maps a scale to the nearest one that divides a norm's stored weight exactly; None for a linear."""
    if fold.kind == "linear":
        return None
    weight_C, offset = block.get_parameter(f"{fold.producer}.weight").data, 1.0 if fold.kind == "norm+1" else 0.0
    return lambda scale_C: storable(scale_C, weight_C, dtype, offset=offset)


def _block_loss(
    states: cal.HiddenStates, block: nn.Module, index: int, views: list[Tensor]
) -> Callable[[list[Tensor]], float]:
    """The squared error of the block's output with other weights in the places of `views`, on a few samples."""
    batches = _reference(states, block, index)

    def loss(weights: list[Tensor]) -> float:
        kept = [view.clone() for view in views]
        for view, weight in zip(views, weights, strict=True):
            view.copy_(weight)
        total = sum((call.run(block, hidden) - output).double().square().sum() for hidden, call, output in batches)
        for view, weight in zip(views, kept, strict=True):
            view.copy_(weight)
        return float(total)

    return loss


def _reference(states: cal.HiddenStates, block: nn.Module, index: int) -> list[tuple[Tensor, BlockCall, Tensor]]:
    """A few samples, how the block is called on them, and its output."""
    batches, tokens = [], 0
    for _, hidden, call in states.batches(index):
        batches.append((hidden, call, call.run(block, hidden)))
        tokens += hidden.shape[0] * hidden.shape[1]
        if tokens >= LOSS_TOKENS:
            break
    return batches


def trial_runs(transform: Transform) -> float:
    """How many runs of a block on LOSS_TOKENS the search of one fold takes, the rounding of inputs included."""
    options = transform.options
    if isinstance(options, AwqOptions):
        return 2 + FINALISTS  # the reference and the identity
    if isinstance(options, SmoothquantOptions) and not isinstance(options.alpha, float | int):
        return 1 + len(ALPHAS) * ROUNDED_RUN
    return 0.0


TRANSFORMS = {"awq": awq, "smoothquant": smoothquant}
