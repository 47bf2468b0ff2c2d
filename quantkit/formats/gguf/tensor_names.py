"""Where a checkpoint's tensors go in a GGUF, and where a GGUF's come from. No torch."""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantkit.errors import UserError
from quantkit.formats.gguf import rope
from quantkit.formats.gguf.architectures import ENDS, Architecture, find, settings
from quantkit.formats.gguf.config_checks import check_config

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(.+)")
# Wrappers of a language model in one of text and images, as checkpoints and modules of transformers spell them.
_PREFIXES = (
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
# The parts for images: llama.cpp reads them from a file of their own.
_IMAGES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


@dataclass(frozen=True)
class Place:
    """Where the rows of a checkpoint tensor lie in a GGUF.

    tensor    its GGUF name
    expert    index along the first dimension of a tensor [E, N, K]; None for a tensor of its own
    heads     the rows of each of so many heads are reordered, see `row_order`; None where they are not
    plus_one  w + 1 is stored
    """

    tensor: str
    expert: int | None = None
    heads: int | None = None
    plus_one: bool = False


def architecture(config: Mapping[str, Any]) -> str:
    """general.architecture of a config.json. UserError by name for a model or a setting that a GGUF cannot hold."""
    check_config(config)
    return find(config).name


def row_order(rows: int, heads: int) -> np.ndarray:
    """The checkpoint's row at each row of the GGUF, int64 [rows], where q and k are permuted.

    transformers turns column j of a head with column j + half, llama.cpp with its neighbour: halves become pairs.
    """
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(rows)


def places(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    """The place of every checkpoint tensor that goes into the file; `left_out` says which do not.

    shapes: of the unquantized checkpoint, by tensor name. UserError for a tensor that has no place.
    """
    full, arch = settings(config), find(config)
    out = left_out(config, shapes)
    found, unknown = {}, []
    for name, shape in shapes.items():
        if name in out:
            continue
        if (place := _place(plain_name(name), full, arch)) is None:
            unknown.append(name)
            continue
        if place.heads and shape[0] % (2 * place.heads):
            raise UserError(
                f"{name}: {shape[0]} rows, expected a multiple of {2 * place.heads} for {place.heads} heads\n"
                "hint: config.json and the weights are of different models"
            )
        found[name] = place
    if unknown:
        more = f" and {len(unknown) - 1} more tensors" if len(unknown) > 1 else ""
        raise UserError(
            f"{unknown[0]}{more}: no place in a GGUF of architecture {arch.name}\n"
            "hint: llama.cpp computes no such tensor; remove it where the model does not use it"
        )
    _check_head(found, full)
    return found


def _check_head(found: Mapping[str, Place], full: Mapping[str, Any]) -> None:
    """llama.cpp takes the embedding for a head that is missing: right for tied models only."""
    if not full["tie_word_embeddings"] and all(place.tensor != "output.weight" for place in found.values()):
        raise UserError(
            "lm_head.weight: missing, and config.json says `tie_word_embeddings: false`\n"
            "hint: set `tie_word_embeddings: true` if the head is the embedding"
        )


def left_out(config: Mapping[str, Any], names: Collection[str]) -> dict[str, str]:
    """Checkpoint tensors that a GGUF of the language model does not hold, and why."""
    tied = settings(config)["tie_word_embeddings"]
    out = {}
    for name in names:
        if name.startswith(_IMAGES):
            out[name] = "part for images: llama.cpp reads it from a file of its own (mmproj)"
        elif tied and plain_name(name) == "lm_head.weight":
            out[name] = "tied to the embedding"
        elif name.endswith(".rotary_emb.inv_freq"):
            out[name] = "computed from config.json"
    return out


def plain_name(name: str) -> str:
    """A tensor's name as the language model alone would have it."""
    for prefix, plain in _PREFIXES:
        if name.startswith(prefix):
            return plain + name.removeprefix(prefix)
    return name


def _place(name: str, full: Mapping[str, Any], arch: Architecture) -> Place | None:
    """The place of a tensor of the language model; None where it has none."""
    module, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if module in ENDS and kind == "weight":
        return Place(f"{ENDS[module]}.weight", plus_one=arch.plus_one and module == "model.norm")
    if not (match := _LAYER.fullmatch(module)) or int(match[1]) >= full["num_hidden_layers"]:
        return None
    layer, part = int(match[1]), match[2]
    if expert := _EXPERT.fullmatch(part):
        stem = arch.experts.get(expert[2])
        if stem is None or kind != "weight" or int(expert[1]) >= full["num_experts"]:
            return None
        return Place(f"blk.{layer}.{stem}.weight", expert=int(expert[1]))
    stem = arch.blocks.get(part)
    if stem is None or (kind == "bias" and stem not in arch.biases):
        return None
    return _block_place(layer, stem, kind, full, arch)


def _block_place(layer: int, stem: str, kind: str, full: Mapping[str, Any], arch: Architecture) -> Place:
    heads = {"attn_q": full["num_attention_heads"], "attn_k": full["num_key_value_heads"]}.get(stem)
    plus_one = arch.plus_one and stem.endswith("norm")
    return Place(f"blk.{layer}.{stem}.{kind}", heads=heads if arch.permuted else None, plus_one=plus_one)


def extra_tensors(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Tensors that only a GGUF has, float32 by name: divisors of the rotary embedding's frequencies."""
    return rope.rope_tensors(rope.read_rope(settings(config)))


def gguf_shapes(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of the file, in its order: embedding, extra tensors, blocks, norm, head; experts [E, N, K].

    shapes: of the unquantized checkpoint. UserError as `places`, and where experts are missing.
    """
    found: dict[str, tuple[int, ...]] = {}
    counts: dict[str, int] = {}
    for name, place in places(config, shapes).items():
        counts[place.tensor] = counts.get(place.tensor, 0) + 1
        found[place.tensor] = tuple(shapes[name])
    experts = settings(config).get("num_experts", 0)
    for stem in find(config).experts.values():
        for tensor in [name for name in found if name.endswith(f".{stem}.weight")]:
            if counts[tensor] != experts:
                raise UserError(
                    f"{tensor}: {counts[tensor]} experts in the checkpoint, expected {experts}\n"
                    "hint: the checkpoint is incomplete: download it again"
                )
            found[tensor] = (experts, *found[tensor])
    found |= {name: values.shape for name, values in extra_tensors(config).items()}
    order = {name: i for i, name in enumerate(_file_order(config))}
    return {name: found[name] for name in sorted(found, key=lambda name: order[name])}


def _file_order(config: Mapping[str, Any]) -> Iterator[str]:
    yield "token_embd.weight"
    yield from rope.TENSORS
    for place in _all_places(settings(config), find(config)).values():
        if place.tensor.startswith("blk."):
            yield place.tensor
    yield from ("output_norm.weight", "output.weight")


def _all_places(full: Mapping[str, Any], arch: Architecture) -> dict[str, Place]:
    """The places of all tensors that a checkpoint of this architecture may have, by checkpoint name."""
    found = {f"{module}.weight": _place(f"{module}.weight", full, arch) for module in ENDS}
    for layer in range(full["num_hidden_layers"]):
        for module, stem in arch.blocks.items():
            for kind in ("weight", "bias") if stem in arch.biases else ("weight",):
                found[f"model.layers.{layer}.{module}.{kind}"] = _block_place(layer, stem, kind, full, arch)
        for module, stem in arch.experts.items():
            for expert in range(full["num_experts"]):
                name = f"model.layers.{layer}.mlp.experts.{expert}.{module}.weight"
                found[name] = Place(f"blk.{layer}.{stem}.weight", expert=expert)
    return {name: place for name, place in found.items() if place is not None}


def checkpoint_names(config: Mapping[str, Any], tensors: Collection[str]) -> dict[str, Place]:
    """The checkpoint tensors that a GGUF's tensors hold, by checkpoint name, each with its place in the file.

    config: what `config_of` made of the file's keys; tensors: the file's names. Each expert is a name of its own.
    Divisors of rotary frequencies have no checkpoint tensor. UserError for names that the architecture does not have.
    """
    full, arch = settings(config), find(config)
    found = {name: place for name, place in _all_places(full, arch).items() if place.tensor in tensors}
    known = {place.tensor for place in found.values()} | set(rope.TENSORS)
    # of NVFP4 weights: part of the values of the tensor they are named after
    scales = {f"{name.removesuffix('.weight')}.{end}" for name in known for end in ("scale", "input_scale")}
    if unknown := [name for name in tensors if name not in known | scales]:
        more = f" and {len(unknown) - 1} more tensors" if len(unknown) > 1 else ""
        raise UserError(
            f"{unknown[0]}{more}: unknown tensor in a GGUF of architecture {arch.name}\n"
            "hint: the file is of another architecture than it says, or of a newer llama.cpp"
        )
    return found
