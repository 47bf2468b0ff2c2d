"""A recipe's measured mix: what the search for types needs, from a run's plan, model and calibration text."""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantkit.formats.gguf.mixes import MIXES, given_types, tensor_types
from quantkit.model.streamed_model import StreamedModel, read_param, set_param
from quantkit.progress import Progress
from quantkit.quantization.gguf_allocation import Allocation, allocated_types, byte_budget, check_budget
from quantkit.quantization.gguf_layout import GgufPlan
from quantkit.quantization.gguf_weights import model_parts
from quantkit.quantization.imatrix import gather
from quantkit.recipe.gguf import FLOATS, Gguf, Measured

TOKENS = 4096  # of the calibration text whose output is compared
LOGITS_BYTES = 2 << 30  # of the original model's output on them, float32: fewer tokens for a large vocabulary


def measured_types(plan: GgufPlan, section: Gguf, streamed: StreamedModel, ids_ST: Tensor, bar: Progress) -> Allocation:
    """The types of all tensors of the plan, by their measured harm to the model as it is stored.

    ids_ST  int64 [samples, tokens], of which the first few thousand tokens are used
    The whole model is in memory meanwhile, in the streamed model's dtype. UserError where the size asked for is too
    small for the smallest types, before anything is measured.
    """
    mix = section.mix
    assert isinstance(mix, Measured)
    named = {
        name: tensor_types(
            name, plan.shapes, architecture=plan.architecture, metadata=plan.metadata, imatrix=True,
            overrides=section.tensor_types, token_embedding=section.token_embedding, output=section.output,
        )
        for name in MIXES
        if name not in FLOATS
    }  # fmt: skip
    fixed = given_types(plan.shapes, section.tensor_types, section.token_embedding, section.output)
    check_budget(plan.shapes, fixed, byte_budget(plan.shapes, mix.bits_per_weight, mix.size))
    vocabulary = streamed.model.config.get_text_config().vocab_size
    tokens = min(TOKENS, LOGITS_BYTES // (4 * vocabulary))
    ids_ST = ids_ST[: max(1, tokens // ids_ST.shape[1])]
    bar.stage(f"measuring what each tensor's type does to the output, on {ids_ST.numel():,} tokens")
    importance = {
        name: torch.from_numpy(entry.importance()) for name, entry in gather(streamed, ids_ST, plan.places, bar).items()
    }
    return allocated_types(
        whole_model(streamed), ids_ST, plan.shapes, parts=model_parts(plan.places, streamed.sources),
        importance=importance, fixed=fixed, named=named, bits_per_weight=mix.bits_per_weight, size=mix.size,
    )  # fmt: skip


def whole_model(streamed: StreamedModel) -> PreTrainedModel:
    """A copy of the model with all its weights, as they are stored, in the streamed model's dtype and on its device."""
    model = copy.deepcopy(streamed.model)
    owners: dict[int, list[tuple[nn.Module, str, str]]] = {}
    for path, module in model.named_modules():
        for leaf, param in module.named_parameters(recurse=False):
            owners.setdefault(id(param), []).append((module, leaf, f"{path}.{leaf}" if path else leaf))
    for places in owners.values():
        pieces = next(streamed.sources[name] for _, _, name in places if name in streamed.sources)
        shape = places[0][0].get_parameter(places[0][1]).shape
        value = read_param(streamed.checkpoint, pieces, shape, streamed.dtype).to(streamed.device)
        set_param(places[0][0], places[0][1], value)
        for module, leaf, _ in places[1:]:
            setattr(module, leaf, places[0][0].get_parameter(places[0][1]))
    return model
