"""Tensors of a GGUF in a model: where their matrices lie, and the model with some of them rounded to types.

Shapes: N = rows, K = columns of a matrix.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantkit.algorithms.rtn import round_to_type
from quantkit.formats.gguf.block_bytes import FLOATS
from quantkit.formats.gguf.tensor_names import Place
from quantkit.grids.dequantize import dequantize
from quantkit.model.weight_sources import Index, TensorSlice

SAMPLE = 1 << 16  # weights of a tensor whose errors in a type stand for all


@dataclass(frozen=True, slots=True)
class WeightPart:
    """One matrix of a GGUF tensor in the model: parameter[where], [K, N] if transposed; matrix: which expert."""

    parameter: str
    where: Index = ()
    transposed: bool = False
    matrix: int = 0

    def view(self, model: nn.Module) -> Tensor:
        """The live data [N, K] (or [E, N, K]): writing to it changes the model."""
        data = model.get_parameter(self.parameter).data[self.where]
        return data.mT if self.transposed else data


Parts = Mapping[str, Sequence[WeightPart]]


@dataclass(frozen=True, slots=True)
class TensorParts:
    """What is known of a GGUF tensor before its type is chosen.

    parts       where its matrices lie
    importance  E[x^2] of what they read, float32 [matrices, K]; None: columns count alike
    left        the share of rounding's squared error that a better choice of codes leaves; 1: codes are rounded
    """

    parts: Sequence[WeightPart]
    importance: Tensor | None = None
    left: float = 1.0


def model_parts(
    places: Mapping[str, Place], sources: Mapping[str, Sequence[TensorSlice]]
) -> dict[str, list[WeightPart]]:
    """Where each GGUF tensor's matrices lie in the model, from where its checkpoint's tensors do."""
    parts: dict[str, list[WeightPart]] = {}
    for parameter, pieces in sources.items():
        for piece in pieces:
            if (place := places.get(piece.name)) is not None:
                part = WeightPart(parameter, piece.where, piece.transposed, place.expert or 0)
                parts.setdefault(place.tensor, []).append(part)
    return parts


def sampled_error(model: nn.Module, tensor: TensorParts, type_: str) -> float:
    """Sum of E[x^2] times the squared errors of some rows, rounded to a type."""
    total = 0.0
    for w_NK, e_K in _matrices(model, tensor):
        rows = max(1, SAMPLE // (len(tensor.parts) * w_NK.shape[1]))
        w_nK = w_NK[:: -(-len(w_NK) // rows)]
        square_nK = (rounded(w_nK, type_, e_K) - w_nK.float()).double().square()
        total += float((square_nK if e_K is None else square_nK * e_K).sum())
    return total


def rounded(w_NK: Tensor, type_: str, importance_K: Tensor | None) -> Tensor:
    """A weight [N, K] of any float dtype as a GGUF type holds it, float32."""
    if type_ in FLOATS:
        return w_NK.to(FLOATS[type_]).float()
    return dequantize(round_to_type(w_NK, type_, importance_K))


def _matrices(model: nn.Module, tensor: TensorParts) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Each matrix [N, K] of a tensor, live, and what it reads, E[x^2] [K]."""
    importance = tensor.importance
    for part in tensor.parts:
        view = part.view(model)
        for i, w_NK in enumerate(view if view.dim() == 3 else [view]):
            yield w_NK, None if importance is None else importance[part.matrix + i].to(w_NK.device)


def _copy(w_NK: Tensor) -> Tensor:
    """The same values, in half the memory where a smaller dtype holds them: models are stored in one."""
    for dtype in (torch.bfloat16, torch.float16):
        small_NK = w_NK.to(dtype)
        if torch.equal(small_NK.to(w_NK.dtype), w_NK):
            return small_NK
    return w_NK.clone()


@contextmanager
def with_types(model: nn.Module, tensors: Iterable[tuple[TensorParts, str]]) -> Iterator[None]:
    """Inside, these tensors are as far from the original as quantized to these types."""
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for tensor, type_ in tensors:
            for w_NK, e_K in _matrices(model, tensor):
                kept.append((w_NK, _copy(w_NK)))
                w_NK.lerp_(rounded(w_NK, type_, e_K).to(w_NK.dtype), math.sqrt(tensor.left))
        yield
    finally:
        for w_NK, original_NK in reversed(kept):
            w_NK.copy_(original_NK)
