"""Measured mixes in a run: the model as a whole, what its linears read, and the types that come of it."""

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from quantkit.device_names import torch_device
from quantkit.errors import UserError
from quantkit.formats.gguf.mixes import tensor_types
from quantkit.ggml_types import QUANTIZED
from quantkit.model.meta_model import build_meta_model
from quantkit.model.streamed_model import StreamedModel, materialize
from quantkit.progress import Progress
from quantkit.quantization.gguf_allocation import Allocation, allocated_types, model_parts
from quantkit.quantization.gguf_layout import GgufPlan
from quantkit.quantization.imatrix import gather
from quantkit.recipe.gguf import MIXES, Gguf, Measured

TOKENS = 4096  # whose output is compared
KEPT_BYTES = 512 << 20  # of their log-probabilities


def measured_types(
    section: Gguf,
    plan: GgufPlan,
    streamed: StreamedModel,
    ids_ST: Tensor,
    dense: Iterable[str],
    bar: Progress,
) -> Allocation:
    """The types for `section.mix`'s size; the original model is whole in memory meanwhile, in float32.

    ids_ST  calibration tokens (int64); dense: checkpoint tensors that stay as they are stored
    UserError where the size is too small for the model.
    """
    assert isinstance(section.mix, Measured)
    if streamed.rewrite is not None:
        raise UserError(
            "gguf.mix by measured harm cannot go with a rotation: harms are measured on the model as it is stored\n"
            "hint: name a mix, or remove the rotation"
        )
    bar.stage("measuring what each tensor's type does to the output")
    vocabulary, seq_len = plan.shapes["token_embd.weight"][0], ids_ST.shape[1]
    few_ST = ids_ST[: max(1, min(TOKENS, KEPT_BYTES // (4 * vocabulary)) // seq_len)]
    entries = gather(streamed, few_ST, plan.places, Progress(False))
    model = build_meta_model(streamed.model.config)
    materialize(model, "", streamed.sources, streamed.checkpoint, torch.float32, torch_device("cpu"))
    model.tie_weights()
    live = {name for name, _ in model.named_parameters()}
    fixed = {plan.places[name].tensor: plan.type_of(name) for name in dense if name in plan.places}
    fixed |= {name: kind for name, kind in plan.types.items() if kind not in QUANTIZED or _is_named(section, name)}
    fixed = {name: kind for name, kind in fixed.items() if name in plan.shapes}
    named = {mix: tensor_types_of(mix, plan) | fixed for mix in MIXES}
    return allocated_types(
        model,
        few_ST,
        plan.shapes,
        parts=model_parts(plan.places, {name: s for name, s in streamed.sources.items() if name in live}),
        importance={name: torch.from_numpy(entry.importance()) for name, entry in entries.items()},
        fixed=fixed,
        named=named,
        bits_per_weight=section.mix.bits_per_weight,
        size=section.mix.size,
    )


def tensor_types_of(mix: str, plan: GgufPlan) -> dict[str, str]:
    """The types that llama.cpp's quantizer gives the tensors, with an importance matrix."""
    return tensor_types(mix, plan.shapes, architecture=plan.architecture, metadata=plan.metadata, imatrix=True)


def _is_named(section: Gguf, name: str) -> bool:
    """Whether the user has chosen a tensor's type."""
    if name == "token_embd.weight" and section.token_embedding is not None:
        return True
    if name == "output.weight" and section.output is not None:
        return True
    return any(re.search(pattern, name) for pattern in section.tensor_types)
