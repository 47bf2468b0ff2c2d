"""Keys and tensors that llama.cpp (October 2026) expects of each architecture, from its loader, not from our writer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from quantkit.checkpoint.gguf_header import GgufFile
from quantkit.verification.findings import Finding, error, warning
from quantkit.verification.subject import some

_AGAIN = "convert the model again"
_KEYS = {  # name behind the architecture's -> kind of its value
    "context_length": "u32",
    "embedding_length": "u32",
    "block_count": "u32",
    "feed_forward_length": "u32",
    "attention.head_count": "u32",
    "attention.layer_norm_rms_epsilon": "f32",
}
_EXPERT_KEYS = {"expert_count": "u32", "expert_used_count": "u32"}
_OPTIONAL_KEYS = {
    "attention.head_count_kv": "u32",
    "attention.key_length": "u32",
    "attention.value_length": "u32",
    "attention.sliding_window": "u32",
    "rope.dimension_count": "u32",
    "rope.freq_base": "f32",
    "rope.scaling.factor": "f32",
    "rope.scaling.type": "string",
    "rope.scaling.original_context_length": "u32",
    "vocab_size": "u32",
    "expert_feed_forward_length": "u32",
}
_BY_LAYER = ("feed_forward_length", "attention.head_count", "attention.head_count_kv")  # may be an array

Sizes = Mapping[str, int]
Shapes = Mapping[str, tuple[str | int, ...]]  # tensor -> its shape, in words of `_sizes`

_ATTENTION: Shapes = {
    "attn_norm.weight": ("embed",),
    "attn_q.weight": ("q", "embed"),
    "attn_k.weight": ("k", "embed"),
    "attn_v.weight": ("v", "embed"),
    "attn_output.weight": ("embed", "q"),
    "ffn_norm.weight": ("embed",),
}
_FUSED: Shapes = {"attn_qkv.weight": ("qkv", "embed")}
_MLP: Shapes = {
    "ffn_gate.weight": ("ff", "embed"),
    "ffn_up.weight": ("ff", "embed"),
    "ffn_down.weight": ("embed", "ff"),
}
_EXPERTS: Shapes = {
    "ffn_gate_inp.weight": ("experts", "embed"),
    "ffn_gate_exps.weight": ("experts", "expert_ff", "embed"),
    "ffn_up_exps.weight": ("experts", "expert_ff", "embed"),
    "ffn_down_exps.weight": ("experts", "embed", "expert_ff"),
}
_QK_NORMS: Shapes = {"attn_q_norm.weight": ("head",), "attn_k_norm.weight": ("head",)}
_BIASES: Shapes = {"attn_q.bias": ("q",), "attn_k.bias": ("k",), "attn_v.bias": ("v",), "attn_qkv.bias": ("qkv",)}
_MLP_BIASES: Shapes = {"ffn_gate.bias": ("ff",), "ffn_up.bias": ("ff",), "ffn_down.bias": ("embed",)}
_ENDS: Shapes = {"token_embd.weight": ("vocab", "embed"), "output_norm.weight": ("embed",)}
_HEAD: Shapes = {"output.weight": ("vocab", "embed")}
_FACTORS: Shapes = {"rope_factors_long.weight": ("half_rope",), "rope_factors_short.weight": ("half_rope",)}


@dataclass(frozen=True, slots=True)
class Architecture:
    """Tensors of each block, and of the whole model, that must and that may be there.

    whole_width  q is as wide as the model, whatever the heads' size
    experts      whether the experts' keys are required
    """

    block: Shapes
    block_optional: Shapes
    ends_optional: Shapes
    whole_width: bool = False
    experts: bool = False


ARCHITECTURES = {
    "llama": Architecture(
        _ATTENTION | _MLP,
        {**_BIASES, "attn_output.bias": ("embed",), **_MLP_BIASES},
        {**_HEAD, **_FACTORS, "rope_freqs.weight": ("half_rope",)},
    ),
    "qwen2": Architecture(_ATTENTION | _MLP, _BIASES, {**_HEAD, "output.bias": ("vocab",)}, whole_width=True),
    "qwen3": Architecture({**_ATTENTION, **_QK_NORMS, **_MLP}, _BIASES, _HEAD),
    "gemma3": Architecture(
        {
            **_ATTENTION,
            **_QK_NORMS,
            **_MLP,
            "post_attention_norm.weight": ("embed",),
            "post_ffw_norm.weight": ("embed",),
        },
        _BIASES,
        _HEAD,
    ),
    "phi3": Architecture(
        {**_ATTENTION, "ffn_up.weight": ("gate_up", "embed"), "ffn_down.weight": ("embed", "ff")},
        _BIASES,
        _HEAD | _FACTORS,
        whole_width=True,
    ),
    "qwen3moe": Architecture({**_ATTENTION, **_QK_NORMS, **_EXPERTS}, _BIASES, _HEAD, experts=True),
}
_MIXTRAL = Architecture(
    {**_ATTENTION, **_EXPERTS}, ARCHITECTURES["llama"].block_optional, ARCHITECTURES["llama"].ends_optional
)


def architecture_of(file: GgufFile) -> Architecture | None:
    """The table of the file's architecture; None where there is none."""
    name = file.metadata["general.architecture"]
    if name == "llama" and _is_count(count := file.metadata.get("llama.expert_count", 0)) and count > 0:
        return _MIXTRAL
    return ARCHITECTURES.get(name)


def check_keys(file: GgufFile, architecture: Architecture) -> list[Finding]:
    """Keys without which the loader stops, or whose values have another kind than it reads."""
    prefix, found = file.metadata["general.architecture"], []
    required = _KEYS | (_EXPERT_KEYS if architecture.experts else {})
    for name, kind in (required | _OPTIONAL_KEYS).items():
        key = f"{prefix}.{name}"
        given = file.metadata_types.get(key)
        if given is None:
            if name in required:
                found.append(error("gguf-key", key, "this key is required and missing", _AGAIN))
            continue
        if given != kind and not (name in _BY_LAYER and given in ("u32[]", "i32[]")):
            found.append(error("gguf-key", key, f"its value is {given}, and is read as {kind}", _AGAIN))
        elif name in required and kind == "u32" and file.metadata[key] == 0:
            found.append(error("gguf-key", key, "it is 0", _AGAIN))
    return found


def check_tensors(file: GgufFile, architecture: Architecture) -> list[Finding]:
    """Tensors that are missing, too many or of another shape than the keys say."""
    key = f"{file.metadata['general.architecture']}.block_count"
    if _is_count(blocks := file.metadata.get(key)) and blocks > len(file.tensors):  # checked before anything is built
        message = f"the file has {len(file.tensors)} tensors, and this key says {blocks} blocks"
        return [error("gguf-tensor-missing", key, message, "give a file with weights, or convert the model again")]
    sizes = list(_sizes(file, architecture))
    if not sizes:
        return []  # keys are missing: said already
    wanted, optional = _shapes(file, architecture, sizes)
    found = _check_heads(file, sizes[0])
    missing = [name for name in wanted if name not in file.tensors]
    if missing:
        found.append(error("gguf-tensor-missing", some(missing), "the architecture needs this tensor", _AGAIN))
    known = wanted | optional
    extra = [name for name in file.tensors if name not in known and not _is_scale(file, name)]
    if extra:
        message = "the architecture has no such tensor: llama.cpp stops at a file with one too many"
        found.append(error("gguf-tensor-extra", some(extra), message, _AGAIN))
    for name, tensor in file.tensors.items():
        if name in known and _without_ones(tensor.shape) != _without_ones(known[name]):
            message = f"its shape is {_text(tensor.shape)}, and the keys say {_text(known[name])}"
            found.append(error("gguf-shape", name, message, _AGAIN))
    return found + _check_biases(file)


def _shapes(
    file: GgufFile, architecture: Architecture, sizes: list[Sizes]
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Shapes of the tensors that must and that may be there."""
    ends = sizes[0]
    wanted = {name: _resolved(shape, ends) for name, shape in _ENDS.items()}
    optional = {name: _resolved(shape, ends) for name, shape in architecture.ends_optional.items()}
    for i, block in enumerate(sizes):
        must = dict(architecture.block)
        if f"blk.{i}.attn_qkv.weight" in file.tensors:
            must = {n: s for n, s in must.items() if n not in ("attn_q.weight", "attn_k.weight", "attn_v.weight")}
            must |= _FUSED
        wanted |= {f"blk.{i}.{name}": _resolved(shape, block) for name, shape in must.items()}
        optional |= {f"blk.{i}.{name}": _resolved(shape, block) for name, shape in architecture.block_optional.items()}
    return wanted, optional


def _sizes(file: GgufFile, architecture: Architecture) -> Iterator[Sizes]:
    """What the words of the tables stand for, block by block; nothing where keys are missing."""
    prefix, metadata = file.metadata["general.architecture"], file.metadata

    def get(name: str, default: Any = None, layer: int = 0) -> int:
        value = metadata.get(f"{prefix}.{name}", default)
        if isinstance(value, list):
            value = value[layer] if layer < len(value) else 0
        return value if _is_count(value) else 0

    embed, blocks = get("embedding_length"), get("block_count")
    if not embed or not get("attention.head_count"):
        return
    tokens = metadata.get("tokenizer.ggml.tokens")
    vocab = len(tokens) if isinstance(tokens, list) else get("vocab_size")
    for i in range(blocks):
        heads = get("attention.head_count", layer=i)
        kv = get("attention.head_count_kv", heads, i)
        head = get("attention.key_length", embed // heads if heads else 0)
        value = get("attention.value_length", embed // heads if heads else 0)
        q = embed if architecture.whole_width else heads * head
        ff = get("feed_forward_length", layer=i)
        yield {
            "embed": embed,
            "vocab": vocab,
            "head": head,
            "q": q,
            "k": kv * head,
            "v": kv * value,
            "qkv": q + kv * head + kv * value,
            "ff": ff,
            "gate_up": 2 * ff,
            "experts": get("expert_count"),
            "expert_ff": get("expert_feed_forward_length")
            or (ff if prefix == "llama" else ff // max(1, get("expert_used_count"))),
            "half_rope": get("rope.dimension_count", head) // 2,
        }


def _check_heads(file: GgufFile, sizes: Sizes) -> list[Finding]:
    """Heads whose rotated part is not what the loader takes."""
    prefix = file.metadata["general.architecture"]
    rotated = file.metadata.get(key := f"{prefix}.rope.dimension_count", sizes["head"])
    if prefix == "llama" and rotated != sizes["head"]:
        message = f"{rotated} of each head's {sizes['head']} features are rotated: a llama file rotates all"
        return [error("gguf-rope", key, message, _AGAIN)]
    return []


def _check_biases(file: GgufFile) -> list[Finding]:
    """A Qwen2 whose biases were dropped loads, and answers nonsense."""
    names = [f"blk.0.attn_{part}.bias" for part in "qkv"]
    if file.metadata["general.architecture"] != "qwen2" or {*names, "blk.0.attn_qkv.bias"} & file.tensors.keys():
        return []
    message = "Qwen2's attention has biases, and there are none here: it loads, with wrong results"
    return [warning("gguf-bias", names[0], message, _AGAIN)]


def _is_scale(file: GgufFile, name: str) -> bool:
    """The float32 scale of an NVFP4 weight, which llama.cpp reads beside any weight."""
    stem, _, leaf = name.rpartition(".")
    return leaf in ("scale", "input_scale") and f"{stem}.weight" in file.tensors


def _resolved(shape: tuple[str | int, ...], sizes: Sizes) -> tuple[int, ...]:
    return tuple(sizes[part] if isinstance(part, str) else part for part in shape)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape as GGUF pads it: leading ones say nothing."""
    kept = list(shape)
    while len(kept) > 1 and kept[0] == 1:
        kept.pop(0)
    return tuple(kept)


def _text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
