"""Measured mixes of GGUF: every tensor's type by what it does to the model's output, for a size.

1. The harm of a tensor in a type is the KL of the model's output with that tensor alone in it: rounded, or where GPTQ
   will choose its codes as much nearer to the original as GPTQ is expected to come. One type of each tensor is
   measured; the others follow by their weighted errors, to which harm is nearly proportional: on the bundled model
   harms of all types, each measured, led to types whose sum of harms was less by under 1 %.
2. Harms are taken to add up; the exact knapsack chooses the types whose bytes fit.
3. The whole of it is measured, all tensors in their types, and so are the best of llama.cpp's mixes that fit: the best
   stays.

Shapes: N = rows, K = columns of a matrix, S = samples, T = tokens of one.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from quantkit.ggml_types import GGML_TYPES
from quantkit.model.meta_model import find_blocks
from quantkit.quantization.gguf_budget import Shapes, Types, padded_bytes, possible_types
from quantkit.quantization.gguf_weights import TensorParts, sampled_error, with_types
from quantkit.quantization.knapsack import allocate
from quantkit.quantization.output_divergence import OutputDivergence

CHECKED = 2  # of llama.cpp's mixes that fit, by what is expected of them, beside which the choice is measured
BELOW = 1.0  # bits per weight of the measured type below the average wanted: its harm stands out

Tensors = Mapping[str, TensorParts]
Harms = dict[str, dict[str, float]]  # GGUF name -> type -> nats per token


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


def allocated_types(
    model: PreTrainedModel,
    ids_ST: Tensor,
    shapes: Shapes,
    *,
    tensors: Tensors,
    fixed: Types,
    named: Mapping[str, Types],
    budget: int,
) -> Allocation:
    """The types for all tensors of `shapes` (GGUF's, rows first) that together have at most `budget` bytes in the file.

    model       whole in memory, float32 on a CPU; it is as before afterwards
    ids_ST      int64 [S, T]: a few thousand tokens
    tensors     where they lie in the model, by GGUF name
    fixed       tensors that are not free, with their types: vectors, norms and what the user has named
    named       llama.cpp's mixes with their types
    """
    weights = sum(math.prod(shape) for shape in shapes.values())
    candidates = {name: possible_types(shape) for name, shape in shapes.items() if name not in fixed}
    meter = OutputDivergence(model, ids_ST)
    harms = measure_harms(meter, tensors, candidates, 8 * budget / weights)
    meter.rewind()
    return _verified(HarmTable(shapes, fixed, harms), Trial(meter, tensors), named, budget)


def measure_harms(
    meter: OutputDivergence, tensors: Tensors, candidates: Mapping[str, Sequence[str]], bits: float
) -> Harms:
    """The KL of the model's output, in nats per token, with one tensor alone in each of its candidate types.

    bits: about what weights will have. The meter ends at the last block, the model as it was.
    """
    model, harms = meter.model, {}
    path, blocks = find_blocks(model)
    for names in _by_block(tensors, candidates, path, len(blocks)):
        for name in names:
            harms[name] = _tensor_harms(meter, tensors[name], candidates[name], bits)
        if meter.block < len(blocks):
            meter.advance()
    return {name: harms[name] for name in candidates}


def _by_block(tensors: Tensors, names: Iterable[str], path: str, blocks: int) -> list[list[str]]:
    """The tensors to measure before each step to the next block: the embedding before the first, the head at last."""
    found: list[list[str]] = [[] for _ in range(blocks + 1)]
    for name in names:
        first = tensors[name].parts[0].parameter
        number = first.removeprefix(f"{path}.").split(".")[0] if first.startswith(f"{path}.") else ""
        found[int(number) if number else (blocks if name == "output.weight" else 0)].append(name)
    return found


def _tensor_harms(meter: OutputDivergence, tensor: TensorParts, types: Sequence[str], bits: float) -> dict[str, float]:
    """One type is measured; the others' harms are to it as their errors are."""
    errors = {type_: sampled_error(meter.model, tensor, type_) for type_ in types}
    one = min(types, key=lambda type_: abs(GGML_TYPES[type_].bits_per_weight - bits + BELOW))
    if errors[one] == 0:
        return dict.fromkeys(types, 0.0)
    with with_types(meter.model, [(tensor, one)]):
        harm = meter.measure()
    return {type_: harm * (error / errors[one]) for type_, error in errors.items()}


@dataclass(frozen=True, slots=True)
class HarmTable:
    """The harms of the tensors that are free, and the types of those that are not."""

    shapes: Shapes
    fixed: Types
    harms: Harms

    def nbytes(self, types: Types) -> int:
        return sum(padded_bytes(types[name], shape) for name, shape in self.shapes.items())

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
        return padded_bytes(type_, self.shapes[name])


@dataclass(frozen=True, slots=True)
class Trial:
    """Measures a model with all its tensors in their types."""

    meter: OutputDivergence
    tensors: Tensors

    def divergence(self, types: Types) -> float:
        """Nats per token from the model as it is."""
        chosen = ((self.tensors[name], type_) for name, type_ in types.items() if type_ != "F32")
        with with_types(self.meter.model, chosen):
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
