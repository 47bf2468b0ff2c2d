"""Measured mixes in a run: the model as a whole, what its linears read, and the types that come of it."""

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantkit.algorithms.gptq import factor, share_left
from quantkit.formats.gguf.imatrix import ImatrixEntry
from quantkit.formats.gguf.mixes import tensor_types
from quantkit.model.streamed_model import StreamedModel, read_param, set_param
from quantkit.progress import Progress
from quantkit.quantization.calibration.statistics import Statistic
from quantkit.quantization.gguf_allocation import Allocation, allocated_types
from quantkit.quantization.gguf_budget import measured_budget
from quantkit.quantization.gguf_importance import Importance
from quantkit.quantization.gguf_layout import GgufPlan
from quantkit.quantization.gguf_weights import TensorParts, model_parts
from quantkit.quantization.imatrix import gather
from quantkit.recipe.gguf import MIXES, Gguf, Measured

TOKENS = 2048  # whose output is compared: twice as many, or half, changed the choice's harm by less than 1 %
KEPT_BYTES = 2 << 30  # of their log-probabilities: fewer tokens for a large vocabulary


def measured_types(
    section: Gguf,
    plan: GgufPlan,
    streamed: StreamedModel,
    ids_ST: Tensor,
    dense: Iterable[str],
    bar: Progress,
    given: Importance | None = None,
    *,
    gptq: bool,
    headers: int = 0,
) -> Allocation:
    """The types for `section.mix`'s size; the original model is whole in memory meanwhile.

    ids_ST   calibration tokens (int64); dense: checkpoint tensors that stay as they are stored
    given    what an importance matrix says: goes before what these tokens do
    gptq     whether the blocks' codes are chosen by GPTQ, not by rounding
    headers  bytes of the file that are no tensor's
    UserError where the size is too small for the model, before anything is measured.
    """
    assert isinstance(section.mix, Measured)
    fixed, budget = measured_budget(section, plan.shapes, plan.dense_types(dense), headers)
    few_ST = ids_ST[: compared_samples(streamed.model.config.get_text_config().vocab_size, ids_ST.shape[1])]
    bar.stage(f"measuring what each tensor's type does to the output on {few_ST.numel():,} tokens")
    left = _Left()
    text_ST = ids_ST if gptq else few_ST  # what GPTQ gains depends on how many tokens it knows
    entries = gather(streamed, text_ST, plan.places, Progress(False), left.observe if gptq else None)
    model = whole_model(streamed)
    first: dict[int, str] = {}  # of the names of a tied parameter
    names = {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}
    parts = model_parts(
        plan.places, {names[name]: pieces for name, pieces in streamed.sources.items() if name in names}
    )
    importance = _importance(plan, entries, given or {})
    return allocated_types(
        model,
        few_ST,
        plan.shapes,
        tensors={name: TensorParts(found, importance.get(name), left.of(name)) for name, found in parts.items()},
        fixed=fixed,
        named={mix: named_types(mix, plan, section) | fixed for mix in MIXES},
        budget=budget,
    )


def compared_samples(vocabulary: int, seq_len: int) -> int:
    """Windows of the calibration text whose output is compared."""
    return max(1, min(TOKENS, KEPT_BYTES // (4 * vocabulary)) // seq_len)


class _Left:
    """What GPTQ leaves of the squared errors of rounding, by GGUF tensor: a mean over its matrices."""

    def __init__(self) -> None:
        self.shares: dict[str, list[float]] = {}
        self._last: tuple[Statistic, float] | None = None  # linears that share an input share its Hessian

    def observe(self, name: str, statistic: Statistic) -> None:
        if self._last is None or self._last[0] is not statistic:
            assert statistic.hessian_KK is not None
            self._last = statistic, share_left(factor(statistic.hessian_KK, tokens=statistic.count))
        self.shares.setdefault(name, []).append(self._last[1])

    def of(self, name: str) -> float:
        """1 where GPTQ does not choose the codes."""
        shares = self.shares.get(name, [1.0])
        return sum(shares) / len(shares)


def _importance(plan: GgufPlan, entries: Mapping[str, ImatrixEntry], given: Importance) -> dict[str, Tensor]:
    """E[x^2] by GGUF tensor, float32 [M, K]."""
    found = {name: torch.from_numpy(entry.importance()) for name, entry in entries.items()}
    for name, place in plan.places.items():
        if (value_K := given.get(name.removesuffix(".weight"))) is not None and place.tensor in found:
            found[place.tensor][place.expert or 0] = torch.from_numpy(value_K)
    return found


def named_types(mix: str, plan: GgufPlan, section: Gguf) -> dict[str, str]:
    """The types of one of llama.cpp's mixes with the recipe's other words on types."""
    return tensor_types(
        mix,
        plan.shapes,
        architecture=plan.architecture,
        metadata=plan.metadata,
        imatrix=True,
        overrides=section.tensor_types,
        token_embedding=section.token_embedding,
        output=section.output,
    )


def whole_model(streamed: StreamedModel) -> PreTrainedModel:
    """A copy of the model with all its weights as they are stored, in the streamed model's dtype and on its device."""
    model = copy.deepcopy(streamed.model)
    owners: dict[int, list[tuple[nn.Module, str, str]]] = {}  # of each parameter: tied ones have several
    for path, module in model.named_modules():
        for leaf, param in module.named_parameters(recurse=False):
            owners.setdefault(id(param), []).append((module, leaf, f"{path}.{leaf}" if path else leaf))
    for places in owners.values():
        pieces = next(streamed.sources[name] for _, _, name in places if name in streamed.sources)
        first, leaf, _ = places[0]
        value = read_param(streamed.checkpoint, pieces, first.get_parameter(leaf).shape, streamed.dtype)
        set_param(first, leaf, value.to(streamed.device))
        for module, name, _ in places[1:]:
            setattr(module, name, first.get_parameter(leaf))
    return model
