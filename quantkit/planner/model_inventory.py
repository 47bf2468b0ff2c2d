"""What a model consists of, from config.json alone: its parameters by kind, its matrices, its cache.

Nothing runs and no weight is read, so which linears share an input follows from names here (a run finds it out by
tracing). Where the folder holds weights their headers say names and dtypes; else both follow from config.json.

Shapes: N = out features, K = in features, E = experts.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from quantkit.cache_spec import CacheSpec
from quantkit.checkpoint.header import TensorInfo, TensorLayout, read_json
from quantkit.checkpoint.model_folder import check_model_folder
from quantkit.checkpoint.quantization_config import refuse_quantized
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import UserError
from quantkit.model.block_graph import FEWEST_INPUTS, FEWEST_OUTPUTS
from quantkit.model.expert_stacks import StackLayout, stack_layouts, unstacked
from quantkit.model.matmul_tracing import LinearSite
from quantkit.model.meta_model import (
    build_meta_model,
    find_blocks,
    read_config,
)
from quantkit.model.weight_sources import TensorSlice, linear_names, weight_sources, written_tensor
from quantkit.quantization.dense_modules import dense_modules
from quantkit.quantization.early_checks import has_weights
from quantkit.types import KVSpec

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "moe_k", "top_k")
WRITES = re.compile(r"(o|out|down|c)_proj$|(^|_)dense(_4h_to_h)?$|wo$|w2$|fc2$|fc_out$")


@dataclass(frozen=True, slots=True)
class LinearShape:
    """One linear of a block.

    group   linears with one input share it; expert: it is one of a layer's experts
    rows    of the site's matrix; limit: why it cannot be quantized yet, where it cannot
    """

    name: str
    class_name: str
    block: int
    group: str
    shape: tuple[int, int]
    dtype: torch.dtype
    expert: bool
    site: LinearSite
    rows: slice
    limit: str | None

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass
class ModelInventory:
    """params: number of them by kind; stored: bytes of all tensors; blocks: parameters of each block.

    model   without weights, on the meta device
    active  share of an expert layer's experts that a token passes through
    head    (tied to the embedding, bytes it takes as a tensor of its own)
    tensors  what the checkpoint holds or, without one, would hold; skipped: name there -> why it is never quantized
    """

    model: PreTrainedModel
    config: PretrainedConfig
    dtype: torch.dtype
    params: Counter[str]
    stored: int
    blocks: list[int]
    matrices: list[LinearShape]
    active: float
    head: tuple[bool, int]
    from_headers: bool
    tensors: Mapping[str, TensorInfo | TensorLayout] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def hidden_size(self) -> int:
        return self.config.get_text_config().hidden_size


def take_inventory(folder: Path, *, trust_remote_code: bool = False, whole_experts: bool = False) -> ModelInventory:
    """Read config.json, and headers where there are weights; UserError where transformers cannot build the model.

    whole_experts: the output keeps a layer's experts in one tensor where the checkpoint does.
    """
    check_model_folder(folder)
    checkpoint = Checkpoint.open(folder) if has_weights(folder) else None
    refuse_quantized(checkpoint or Checkpoint(folder, read_json(folder / "config.json", "give a model folder"), {}))
    config = read_config(folder, trust_remote_code=trust_remote_code)
    try:
        with torch.device("meta"):
            model = build_meta_model(config, trust_remote_code=trust_remote_code)
    except Exception:  # many models compute with their buffers while they are made; what is wrong shows below
        model = build_meta_model(config, trust_remote_code=trust_remote_code)
    dtype = _dtype(config) if checkpoint is None else checkpoint.dtype
    sources = None if checkpoint is None else weight_sources(model, checkpoint.tensors)
    layouts = stack_layouts(model)
    if checkpoint is not None and sources is not None and not whole_experts:
        sources, checkpoint = unstacked(model, sources, checkpoint)
    path, blocks = find_blocks(model)
    text = config.get_text_config()
    head = model.get_output_embeddings()
    shared = [id(table.weight) for table in model.modules() if isinstance(table, nn.Embedding)]
    tied = head is not None and id(head.weight) in shared
    params = _count(model, path, text, None if tied else head)
    inventory = ModelInventory(
        model,
        config,
        dtype,
        params,
        sum(params.values()) * dtype.itemsize,
        [sum(param.numel() for param in block.parameters()) for block in blocks],
        [],
        _first(text, CHOSEN, 1) / _first(text, EXPERTS, 1),
        (tied, 0 if head is None else head.weight.numel() * dtype.itemsize),
        checkpoint is not None,
    )
    if checkpoint is not None:
        inventory.stored = sum(info.nbytes for info in checkpoint.tensors.values())
    reasons = {
        name: "outside the decoder blocks"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(path + ".")
    }
    for index, block in enumerate(blocks):
        for site, shape in _sites(block, text, reasons, f"{path}.{index}.", layouts):
            for name, rows in _names(f"{path}.{index}", site, shape[0], sources):
                own, limit = (dtype, None) if checkpoint is None else _stored(checkpoint, name, dtype)
                expert = ".experts." in f".{name}."
                parent, _, leaf = name.rpartition(".")
                role = "write" if WRITES.search(leaf) else "read"
                N = len(range(shape[0])[rows])
                inventory.matrices.append(
                    LinearShape(
                        name, site.class_name, index, f"{parent} {role} {shape[1]}", (N, shape[1]), own, expert,
                        site, rows, limit,
                    )
                )  # fmt: skip
    if checkpoint is not None and sources is not None:
        inventory.tensors = checkpoint.tensors
        names = {matrix.name for matrix in inventory.matrices}
        inventory.skipped = dense_modules(model, sources, checkpoint.tensors, names, reasons)
    else:
        inventory.tensors = _as_written(model, inventory.matrices, dtype)
        inventory.skipped = reasons
    return inventory


def _as_written(model: nn.Module, matrices: list[LinearShape], dtype: torch.dtype) -> dict[str, TensorLayout]:
    """The tensors a checkpoint of the model would hold, experts one by one."""
    found = {f"{matrix.name}.weight": matrix.shape for matrix in matrices}
    others = {name: tuple(param.shape) for name, param in model.named_parameters() if param.dim() < 3}
    return {name: TensorLayout(name, dtype, shape) for name, shape in (others | found).items()}


def _stored(checkpoint: Checkpoint, name: str, default: torch.dtype) -> tuple[torch.dtype, str | None]:
    """A linear's dtype in the checkpoint, and why it cannot be quantized yet, where it cannot."""
    try:
        return written_tensor(checkpoint.tensors, name).dtype, None
    except UserError as refusal:
        return default, str(refusal)


def kv_bytes(config: PretrainedConfig, spec: CacheSpec | KVSpec | None, dtype: torch.dtype) -> float:
    """Bytes one token takes in the key-value cache of all layers; without a spec in the model's dtype.

    spec: of keys and values, or the one of both
    Layers that keep no cache by their type (linear attention) are left out. Of latent attention it is the latent.
    """
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    layers = sum("attention" in kind and "linear" not in kind for kind in kinds)
    heads, size = cached_heads(config)
    sides = [spec.keys, spec.values] if isinstance(spec, CacheSpec) else [spec, spec]
    if getattr(text, "kv_lora_rank", None):
        sides, heads, size = sides[:1], 1, text.kv_lora_rank + text.qk_rope_head_dim
    bits = sum(8 * dtype.itemsize if side is None else side.bits_per_entry(size) for side in sides)
    return layers * heads * size * bits / 8


def cached_heads(config: PretrainedConfig) -> tuple[int, int]:
    """How many heads of keys a layer caches, and how many features each has."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return heads, getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _count(model: nn.Module, path: str, text: Any, head: nn.Module | None) -> Counter[str]:
    """Parameters by kind, each tied one once."""
    counted: Counter[str] = Counter()
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for leaf, param in module.named_parameters(recurse=False):
            if id(param) in seen:
                continue
            seen.add(id(param))
            inside = f"{module_name}.".startswith(path + ".")
            if isinstance(module, nn.Embedding):
                kind = "embeddings"
            elif module is head:
                kind = "head"
            elif param.dim() == 1:
                kind = "norms and biases"
            elif not inside:
                kind = "outside the blocks"
            elif (param.dim() == 3 and not isinstance(module, nn.Conv1d)) or ".experts." in f"{module_name}.{leaf}":
                kind = "experts"
            elif _is_router(f"{module_name}.{leaf}", param.shape[0], text):
                kind = "routers"
            else:
                kind = "linears"
            counted[kind] += param.numel()
    return counted


def _sites(
    block: nn.Module, text: Any, skipped: dict[str, str], prefix: str, layouts: Mapping[str, StackLayout]
) -> list[tuple[LinearSite, tuple[int, int]]]:
    """The matrices of a block that would be quantized, by what parameters look like."""
    found = []
    for path, module in block.named_modules():
        if isinstance(module, nn.Conv1d):  # of state-space layers: three dimensions, but no experts
            continue
        for leaf, param in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}" if path else leaf
            if param.dim() == 3:
                writes = "down" in leaf or leaf in ("w2", "wo")
                swapped = param.shape[-1 if writes else -2] == text.hidden_size != param.shape[-2 if writes else -1]
                if (layout := layouts.get(prefix + name)) is not None:
                    swapped = layout.transposed
                N, K = param.shape[-2:] if not swapped else (param.shape[-1], param.shape[-2])
                found += [
                    (LinearSite(f"{name}.{e}", name, e, swapped, type(module).__name__), (N, K))
                    for e in range(len(param))
                ]
            elif param.dim() == 2 and leaf == "weight" and not isinstance(module, nn.Embedding):
                swapped = type(module).__name__ == "Conv1D"
                N, K = param.shape if not swapped else (param.shape[1], param.shape[0])
                if N < FEWEST_OUTPUTS or K < FEWEST_INPUTS or _is_router(name, N, text):
                    skipped[prefix + path] = "a router, or too few outputs or inputs"
                    continue
                found.append((LinearSite(path, name, None, swapped, type(module).__name__), (N, K)))
    return found


def _is_router(name: str, outputs: int, text: Any) -> bool:
    return outputs == _first(text, EXPERTS, -1) and bool(re.search("gate|router", name))


def _names(
    prefix: str, site: LinearSite, rows: int, sources: dict[str, list[TensorSlice]] | None
) -> list[tuple[str, slice]]:
    """The names and rows a site is written as: of the file where there is one, else as transformers writes them."""
    if sources is not None:
        return linear_names(sources, prefix, site)
    if site.index is None:
        return [(f"{prefix}.{site.name}", slice(None))]
    stem, _, leaf = site.param.rpartition(".")
    if leaf == "gate_up_proj":
        halves = (("gate_proj", slice(0, rows // 2)), ("up_proj", slice(rows // 2, rows)))
        return [(f"{prefix}.{stem}.{site.index}.{half}", cut) for half, cut in halves]
    return [(f"{prefix}.{stem}.{site.index}.{leaf}", slice(None))]


def _dtype(config: PretrainedConfig) -> torch.dtype:
    found = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.bfloat16
    return getattr(torch, found) if isinstance(found, str) else found


def _first(text: Any, keys: tuple[str, ...], default: int) -> int:
    return next((value for key in keys if isinstance(value := getattr(text, key, None), int) and value > 0), default)
