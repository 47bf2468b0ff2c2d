"""Measured mixes of GGUF: every tensor's type by what it does to the model's output, for a size.

1. The harm of a tensor in a type is the KL of the model's output with that tensor alone rounded to it. Two types of each
   tensor are measured; the others follow by their weighted errors, to which harm is nearly proportional.
2. Harms are taken to add up; the exact knapsack chooses the types whose bytes fit.
3. The whole of it is measured, all tensors rounded, and so are the nearest of llama.cpp's mixes that fit: the best stays.

Shapes: N = rows, K = columns of a matrix, S = samples, T = tokens of one.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantkit.algorithms.rtn import rtn
from quantkit.errors import UserError
from quantkit.formats.gguf.mixes import bytes_of
from quantkit.formats.gguf.tensor_names import Place
from quantkit.ggml_types import GGML_TYPES, QUANTIZED
from quantkit.grids import RangeSearch, make_grid
from quantkit.grids.dequantize import dequantize
from quantkit.model.meta_model import find_blocks
from quantkit.model.weight_sources import Index, TensorSlice
from quantkit.quantization.knapsack import allocate
from quantkit.quantization.output_divergence import OutputDivergence
from quantkit.types import block_spec

FREE = (*QUANTIZED, "F16")  # the types a tensor may get
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SAMPLE = 1 << 19  # weights of a tensor whose errors in all types are compared
CHECKED = 2  # of llama.cpp's mixes that fit, by what is expected of them, beside which the choice is measured
APART = 1.0  # bits per weight between the average wanted and the two types that are measured

Shapes = Mapping[str, tuple[int, ...]]
Types = Mapping[str, str]
Importance = Mapping[str, Tensor]  # GGUF name -> E[x^2], float32 [matrices, K]
Harms = dict[str, dict[str, float]]  # GGUF name -> type -> nats per token


@dataclass(frozen=True, slots=True)
class WeightPart:
    """One matrix of a GGUF tensor in the model: parameter[where], [K, N] if transposed; matrix: its index, of experts."""

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
class NamedMix:
    """One of llama.cpp's mixes beside the chosen types; divergence: measured, None where it was not."""

    name: str
    nbytes: int
    expected: float
    divergence: float | None = None


@dataclass(frozen=True, slots=True)
class Allocation:
    """The chosen types of all tensors.

    expected    sum of the harms; divergence: of the model with all tensors rounded. Nats per token
    named       the mixes of llama.cpp, by bytes
    """

    types: dict[str, str]
    nbytes: int
    bits_per_weight: float
    expected: float
    divergence: float
    named: tuple[NamedMix, ...]

    def to_json(self) -> dict[str, Any]:
        """What the report says of it."""
        beside = {mix.name: {"bytes": mix.nbytes, "kl": mix.divergence} for mix in self.named if mix.divergence}
        return {"bytes": self.nbytes, "kl": self.divergence, "kl_expected": self.expected, "beside": beside}


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


def byte_budget(shapes: Shapes, bits_per_weight: float | None, size: int | None) -> int:
    """Bytes that all tensors together may have: of the average over all weights, or as given."""
    if size is not None:
        return size
    assert bits_per_weight is not None
    return int(bits_per_weight * sum(math.prod(shape) for shape in shapes.values()) / 8)


def allocated_types(
    model: PreTrainedModel,
    ids_ST: Tensor,
    shapes: Shapes,
    *,
    parts: Parts,
    importance: Importance,
    fixed: Types,
    named: Mapping[str, Types],
    bits_per_weight: float | None = None,
    size: int | None = None,
) -> Allocation:
    """The types for all tensors of `shapes` (GGUF's, rows first) with which the file is at most as large as asked.

    model       whole in memory, float32 on a CPU; it is as before afterwards
    ids_ST      int64 [S, T]: a few thousand tokens
    importance  E[x^2] of what each tensor's matrices read; tensors that are not in it count their columns alike
    fixed       tensors that are not free, with their types: vectors, norms and what the user has named
    named       llama.cpp's mixes with their types
    size        of all tensors in bytes, or else bits_per_weight: of all tensors together
    UserError where the types of least bytes are larger than that.
    """
    budget = byte_budget(shapes, bits_per_weight, size)
    weights = sum(math.prod(shape) for shape in shapes.values())
    candidates = {name: _candidates(shape) for name, shape in shapes.items() if name not in fixed}
    _check_budget(shapes, candidates, fixed, budget)
    meter = OutputDivergence(model, ids_ST)
    harms = measure_harms(meter, parts, candidates, importance, 8 * budget / weights)
    table = HarmTable(shapes, fixed, harms)
    trial = Trial(meter, parts, importance)
    meter.rewind()
    return _verified(table, trial, named, budget)


def measure_harms(
    meter: OutputDivergence, parts: Parts, candidates: Mapping[str, Sequence[str]], importance: Importance, bits: float
) -> Harms:
    """The KL of the model's output, in nats per token, with one tensor alone rounded to each of its candidate types.

    bits: about what weights will have; the two types that are measured lie below and above. The meter ends at the last
    block, the model as it was.
    """
    model, harms = meter.model, {}
    path, blocks = find_blocks(model)
    for names in _by_block(parts, candidates, path, len(blocks)):
        for name in names:
            harms[name] = _tensor_harms(meter, parts[name], candidates[name], importance.get(name), bits)
        if meter.block < len(blocks):
            meter.advance()
    return {name: harms[name] for name in candidates}


def _by_block(parts: Parts, names: Iterable[str], path: str, blocks: int) -> list[list[str]]:
    """The tensors to measure before each step from block to block: the embedding too before the first, the head last."""
    found: list[list[str]] = [[] for _ in range(blocks + 1)]
    for name in names:
        first = parts[name][0].parameter
        number = first.removeprefix(f"{path}.").split(".")[0] if first.startswith(f"{path}.") else ""
        found[int(number) if number else (blocks if name == "output.weight" else 0)].append(name)
    return found


def _tensor_harms(
    meter: OutputDivergence, parts: Sequence[WeightPart], types: Sequence[str], importance: Tensor | None, bits: float
) -> dict[str, float]:
    errors = {type_: _sampled_error(meter.model, parts, type_, importance) for type_ in types}
    found: dict[str, float] = {}
    for type_ in _two(types, bits):
        with _rounded(meter.model, [(parts, type_, importance)]):
            found[type_] = meter.measure()
    return {type_: found.get(type_, _scaled(errors, found, type_)) for type_ in types}


def _two(types: Sequence[str], bits: float) -> list[str]:
    """The types nearest to a little below and a little above `bits`."""
    return [min(types, key=lambda type_: abs(GGML_TYPES[type_].bits_per_weight - bits - by)) for by in (-APART, APART)]


def _scaled(errors: Mapping[str, float], found: Mapping[str, float], type_: str) -> float:
    """The harm of a type by its error: on the power law through the measured types between them, else in proportion."""
    error = errors[type_]
    points = sorted((errors[measured], harm) for measured, harm in found.items() if harm > 0 and errors[measured] > 0)
    if not points or error == 0:
        return 0.0
    (low, low_harm), (high, high_harm) = points[0], points[-1]
    if low < error < high:
        return low_harm * (error / low) ** (math.log(high_harm / low_harm) / math.log(high / low))
    near, harm = points[0] if error <= low else points[-1]
    return harm * error / near


def _sampled_error(model: nn.Module, parts: Sequence[WeightPart], type_: str, importance: Tensor | None) -> float:
    """Sum of E[x^2] times the squared errors of some rows in a type."""
    total = 0.0
    for w_NK, e_K in _matrices(model, parts, importance):
        rows = max(1, SAMPLE // (len(parts) * w_NK.shape[1]))
        w_nK = w_NK[:: -(-len(w_NK) // rows)]
        square_nK = (rounded(w_nK, type_, e_K) - w_nK.float()).double().square()
        total += float((square_nK if e_K is None else square_nK * e_K).sum())
    return total


def rounded(w_NK: Tensor, type_: str, importance_K: Tensor | None) -> Tensor:
    """A weight [N, K] of any float dtype as a GGUF type holds it, float32."""
    if type_ in FLOATS:
        return w_NK.to(FLOATS[type_]).float()
    return dequantize(
        rtn(w_NK, make_grid(block_spec(type_), torch.float32, RangeSearch(), signed=True), importance_K=importance_K)
    )


def _matrices(
    model: nn.Module, parts: Sequence[WeightPart], importance: Tensor | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Each matrix [N, K] of a tensor, live, and what it reads, E[x^2] [K]."""
    for part in parts:
        view = part.view(model)
        for i, w_NK in enumerate(view if view.dim() == 3 else [view]):
            yield w_NK, None if importance is None else importance[part.matrix + i].to(w_NK.device)


@contextmanager
def _rounded(model: nn.Module, tensors: Iterable[tuple[Sequence[WeightPart], str, Tensor | None]]) -> Iterator[None]:
    """Inside, these tensors hold what their types can."""
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for parts, type_, importance in tensors:
            for w_NK, e_K in _matrices(model, parts, importance):
                kept.append((w_NK, w_NK.clone()))
                w_NK.copy_(rounded(w_NK, type_, e_K))
        yield
    finally:
        for w_NK, original_NK in reversed(kept):
            w_NK.copy_(original_NK)


@dataclass(frozen=True, slots=True)
class HarmTable:
    """The harms of the tensors that are free, and the types of those that are not."""

    shapes: Shapes
    fixed: Types
    harms: Harms

    def nbytes(self, types: Types) -> int:
        return sum(bytes_of(types[name], shape) for name, shape in self.shapes.items())

    def expected(self, types: Types) -> float:
        """The sum of the harms; of types that were no candidates infinite."""
        return sum(by_type.get(types[name], math.inf) for name, by_type in self.harms.items())

    def best(self, budget: int, above: Types | None = None) -> dict[str, str]:
        """The types with the least harm that fit; `above`: none with less bytes or more harm than these."""
        options: dict[str, list[str]] = {}
        for name, by_type in self.harms.items():
            size, worst = (0, math.inf) if above is None else (self._bytes(name, above[name]), by_type[above[name]])
            options[name] = [t for t, harm in by_type.items() if self._bytes(name, t) >= size and harm <= worst]
        costs = [[(self._bytes(name, t), self.harms[name][t]) for t in types] for name, types in options.items()]
        taken = allocate(costs, budget - sum(self._bytes(name, type_) for name, type_ in self.fixed.items()))
        chosen = {name: types[i] for (name, types), i in zip(options.items(), taken, strict=True)}
        return {name: self.fixed[name] if name in self.fixed else chosen[name] for name in self.shapes}

    def _bytes(self, name: str, type_: str) -> int:
        return bytes_of(type_, self.shapes[name])


@dataclass(frozen=True, slots=True)
class Trial:
    """Measures a model with all its tensors rounded."""

    meter: OutputDivergence
    parts: Parts
    importance: Importance

    def divergence(self, types: Types) -> float:
        """Nats per token from the model as it is."""
        tensors = (
            (self.parts[name], type_, self.importance.get(name)) for name, type_ in types.items() if type_ != "F32"
        )
        with _rounded(self.meter.model, tensors):
            return self.meter.measure()


def _verified(table: HarmTable, trial: Trial, named: Mapping[str, Types], budget: int) -> Allocation:
    """The best types by the table, unless one of llama.cpp's mixes measures better: then that, and what still fits."""
    types = table.best(budget)
    divergence = trial.divergence(types)
    mixes = {
        name: NamedMix(name, table.nbytes(listed), table.expected(listed))
        for name, listed in sorted(named.items(), key=lambda item: table.nbytes(item[1]))
    }
    fitting = [mix for mix in mixes.values() if mix.nbytes <= budget and math.isfinite(mix.expected)]
    for mix in sorted(fitting, key=lambda mix: mix.expected)[:CHECKED]:
        listed = dict(named[mix.name])
        measured = trial.divergence(listed)
        mixes[mix.name] = replace(mix, divergence=measured)
        if measured < divergence:
            raised = table.best(budget, above=listed)
            after = trial.divergence(raised)
            types, divergence = (raised, after) if after <= measured else (listed, measured)
    nbytes, weights = table.nbytes(types), sum(math.prod(shape) for shape in table.shapes.values())
    return Allocation(types, nbytes, 8 * nbytes / weights, table.expected(types), divergence, tuple(mixes.values()))


def _candidates(shape: tuple[int, ...]) -> list[str]:
    """The types whose blocks divide a tensor's rows."""
    return [type_ for type_ in FREE if shape[-1] % GGML_TYPES[type_].columns == 0]


def _check_budget(shapes: Shapes, candidates: Mapping[str, Sequence[str]], fixed: Types, budget: int) -> None:
    least = sum(bytes_of(type_, shapes[name]) for name, type_ in fixed.items())
    least += sum(min(bytes_of(type_, shapes[name]) for type_ in types) for name, types in candidates.items())
    if least > budget:
        weights = sum(math.prod(shape) for shape in shapes.values())
        raise UserError(
            f"gguf.mix: {budget:,} bytes ({8 * budget / weights:.3g} bits per weight) are too few for this model: its "
            f"smallest types need {least:,}\nhint: ask for at least {math.ceil(800 * least / weights) / 100:g} bits per weight"
        )
