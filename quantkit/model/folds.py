"""Per-channel scales that can move from a producer into its readers: how to apply one, and the proof that it is free.

A fold divides a producer's output channels by a positive scale (a norm's weight, rows of a linear) and multiplies the
input columns of all that read it. The proof writes it with random scales into float64 copies of the parameters that it
touches, runs the block and compares outputs; a control without the readers' half must make a difference, else nothing
was proved.

Shapes: M = tokens, C = channels a fold scales, K = in features of its readers, N = out features of a producer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from quantkit.model.matmul_tracing import Float64, LinearSite, TraceMatmuls, WeightKey

PROOF = 1e-9  # of a token's output norm
CONTROL = 1e-6  # a reader's output must change by more when the producer alone is scaled
SAME = 1e-12  # inputs this close are the reference's: a product no fold touches is then not computed again


@dataclass(frozen=True, eq=False)
class Fold:
    """A proved pair. kind: "norm" (weight w), "norm+1" (the norm multiplies by 1 + w) or "linear".

    producer   module path of the norm, or the site name of the linear
    consumers  site names whose columns are multiplied; routers: matrices that are not quantized but read it too
    channels   C, the length of the scale
    rows       int64 [C], the producer's output channels that are scaled; None: all of them, in order
    columns    int64 [K], the scale each input column of the consumers takes; None: column k takes scale k
    bias       parameter path of the producer's bias
    error      largest relative change of the block's output measured in the proof
    """

    producer: str
    kind: str
    consumers: tuple[str, ...]
    routers: tuple[str, ...]
    channels: int
    rows: Tensor | None = None
    columns: Tensor | None = None
    bias: str | None = None
    error: float = 0.0

    def expand(self, scale_C: Tensor) -> Tensor:
        """The factor of each input column of the consumers, [K]."""
        return scale_C if self.columns is None else scale_C[self.columns.to(scale_C.device)]

    def reduce(self, value_K: Tensor) -> Tensor:
        """The mean over the columns that share a channel, [C]: a statistic of columns as one of channels."""
        if self.columns is None:
            return value_K
        columns = self.columns.to(value_K.device)
        total_C = value_K.new_zeros(self.channels).index_add_(0, columns, value_K)
        return total_C / torch.bincount(columns, minlength=self.channels).clamp(min=1)


def scale_producer(block: nn.Module, sites: Mapping[str, LinearSite], fold: Fold, scale_C: Tensor) -> None:
    """Divide the producer's channels by scale_C, in place."""
    bias = None if fold.bias is None else block.get_parameter(fold.bias).data
    if fold.kind == "linear":
        w_NK = sites[fold.producer].view(block)
        rows = slice(None) if fold.rows is None else fold.rows.to(w_NK.device)
        scale_C = scale_C.to(w_NK)
        w_NK[rows] = w_NK[rows] / scale_C[:, None]
        if bias is not None:
            bias[rows] = bias[rows] / scale_C
        return
    w_C = block.get_parameter(f"{fold.producer}.weight").data
    offset = 1.0 if fold.kind == "norm+1" else 0.0
    wide_C = torch.promote_types(w_C.dtype, torch.float32)
    w_C.copy_((w_C.to(wide_C) + offset) / scale_C.to(w_C.device, wide_C) - offset)
    if bias is not None:
        bias.div_(scale_C.to(bias))


def scale_consumers(block: nn.Module, sites: Mapping[str, LinearSite], fold: Fold, scale_C: Tensor) -> None:
    """Multiply the columns of everything that reads the producer, in place."""
    for name in (*fold.consumers, *fold.routers):
        w_NK = sites[name].view(block)
        w_NK.mul_(fold.expand(scale_C).to(w_NK))


@dataclass(frozen=True, slots=True)
class Product:
    """One product of a float64 run: the matrix's name, its input [M, K] and its output as the model gets it."""

    name: str
    x_MK: Tensor
    result: Tensor


@dataclass(frozen=True, eq=False)
class Reference:
    """One float64 run: arguments, products in order, floating outputs, (inputs, output) of every call of a norm."""

    args: tuple
    kwargs: dict
    products: list[Product]
    outputs: list[Tensor]
    norms: dict[str, list[tuple[tuple, Tensor]]]


class LeakError(Exception):
    """A scaled channel reaches something that a fold cannot undo. seen: K of the input it showed in, 0 for none."""

    def __init__(self, where: str, reason: str, seen: int = 0) -> None:
        super().__init__(reason)
        self.where, self.seen = where, seen


class _ReactionError(Exception):
    """The control's answer: a reader's output changed. Never leaves this file."""


def prove(
    block: nn.Module,
    sites: Mapping[str, LinearSite],
    candidates: Sequence[Fold],
    reference: Reference,
    generator: torch.Generator,
) -> list[Fold]:
    """The candidates, applied together with random scales, with the measured error; LeakError if the output changes.

    TraceMatmuls that no candidate touches are taken from the reference where their input is the reference's, so a proof
    costs the touched weights only, once in memory as float64.
    """
    device = reference.outputs[0].device
    scales = [(0.5 * torch.randn(f.channels, generator=generator, dtype=torch.float64)).exp() for f in candidates]
    scales = [scale_C.to(device) for scale_C in scales]
    readers = {name for fold in candidates for name in (*fold.consumers, *fold.routers)}
    producers = {fold.producer for fold in candidates if fold.kind == "linear"}
    touched = {sites[name].param for name in readers | producers}
    touched |= {f"{fold.producer}.weight" for fold in candidates if fold.kind != "linear"}
    touched |= {fold.bias for fold in candidates if fold.bias is not None}
    shown = ", ".join(candidates[0].consumers)
    with wide_parameters(block, touched):
        for fold, scale_C in zip(candidates, scales, strict=True):
            scale_producer(block, sites, fold, scale_C)
        try:
            replay(block, sites, reference, readers | producers, control=readers)
        except _ReactionError:
            pass
        else:
            raise LeakError(shown, "its readers do not react to it on the trial tokens, nothing is proved")
        for fold, scale_C in zip(candidates, scales, strict=True):
            scale_consumers(block, sites, fold, scale_C)
        error = replay(block, sites, reference, readers | producers)
    if not error < PROOF:
        raise LeakError(shown, f"folding changes the block's output by {error:.1e}")
    return [replace(fold, error=error) for fold in candidates]


def replay(
    block: nn.Module,
    sites: Mapping[str, LinearSite],
    reference: Reference,
    touched: set[str],
    control: set[str] | frozenset[str] = frozenset(),
) -> float:
    """How far the block is from the reference with its weights as they are now, in float64: see `relative_change`.

    It is taken at the outputs, and at the input of each product whose known result is used instead. With `control` it
    ends with _ReactionError as soon as one of those matrices' results differs from the reference's.
    """
    names = {(site.param, site.index): site.name for site in sites.values()}
    expected = iter(reference.products)
    drift = 0.0

    def on_product(weight: WeightKey, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        nonlocal drift
        name, known = names.get((weight.param, weight.index), weight.param), next(expected, None)
        if known is None or known.name != name or known.x_MK.numel() != x.numel():
            return run(x)  # another path: the outputs will tell
        if name not in touched:
            change = relative_change([x.reshape(known.x_MK.shape)], [known.x_MK])
            if change < SAME:
                drift = max(drift, change)
                return known.result.clone()
        result = run(x)
        if name in control and relative_change([result], [known.result]) > CONTROL:
            raise _ReactionError
        return result

    with Float64(), TraceMatmuls(block, on_product):
        outputs = floating(block(*reference.args, **reference.kwargs))
    return max(drift, relative_change(outputs, reference.outputs))


@contextmanager
def wide_parameters(block: nn.Module, names: set[str]) -> Iterator[None]:
    """The named parameters as float64 copies inside, the very same objects as before after it."""
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for name in sorted(names):
            path, _, leaf = name.rpartition(".")
            module = block.get_submodule(path)
            param = module._parameters.get(leaf)
            if param is not None:
                kept.append((module, leaf, param))
                module._parameters[leaf] = nn.Parameter(param.detach().double().clone(), requires_grad=False)
        yield
    finally:
        for module, leaf, param in kept:
            module._parameters[leaf] = param


def floating(outputs: Any) -> list[Tensor]:
    """The floating-point tensors of whatever a block returns."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def relative_change(after: list[Tensor], before: list[Tensor]) -> float:
    """Largest change of a token's vector relative to the vector's length; inf where shapes differ or NaN appears."""
    if [t.shape for t in after] != [t.shape for t in before]:
        return float("inf")
    changes = [(a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-300) for a, b in zip(after, before, strict=True)]
    return max(float(change.max().nan_to_num(nan=float("inf"))) for change in changes)
