"""The keys of a GGUF that describe the model, from its config.json, and a config.json from a file's keys. No torch."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantkit.errors import UserError
from quantkit.formats.gguf import rope
from quantkit.formats.gguf.architectures import (
    ARCHITECTURES,
    GEMMA3,
    LLAMA,
    PHI3,
    QWEN3_MOE,
    Architecture,
    find,
    layer_types,
    settings,
    window,
)
from quantkit.formats.gguf.config_checks import check_config, gemma3_scalar

if TYPE_CHECKING:
    from quantkit.checkpoint.gguf_writer import KeyValue

# Settings of config.json that are keys of the file as they are, under the architecture's prefix.
_KEYS: dict[str, tuple[str, str]] = {
    "max_position_embeddings": ("context_length", "u32"),
    "hidden_size": ("embedding_length", "u32"),
    "num_hidden_layers": ("block_count", "u32"),
    "intermediate_size": ("feed_forward_length", "u32"),
    "num_attention_heads": ("attention.head_count", "u32"),
    "num_key_value_heads": ("attention.head_count_kv", "u32"),
    "rms_norm_eps": ("attention.layer_norm_rms_epsilon", "f32"),
}
_EXPERT_KEYS: dict[str, tuple[str, str]] = {
    "num_experts": ("expert_count", "u32"),
    "num_experts_per_tok": ("expert_used_count", "u32"),
    "moe_intermediate_size": ("expert_feed_forward_length", "u32"),
}
_TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
_WINDOW, _PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
_GEMMA3_PATTERN = 6  # every so many-th layer sees all tokens where the file does not say


def model_metadata(config: Mapping[str, Any], *, name: str, vocab_size: int) -> "dict[str, KeyValue]":
    """Every key of the file but general.file_type and the tokenizer's. UserError for a setting without a place.

    name: general.name; vocab_size: rows of the embedding.
    """
    check_config(config)
    full, arch = settings(config), find(config)
    keys: dict[str, KeyValue] = {key: (kind, full[setting]) for setting, (key, kind) in _KEYS.items()}
    keys["context_length"] = ("u32", context_length(config))
    keys["vocab_size"] = ("u32", vocab_size)
    keys |= {key: ("u32", full["head_dim"]) for key in ("attention.key_length", "attention.value_length")}
    if arch.experts:
        keys |= {key: (kind, full[setting]) for setting, (key, kind) in _EXPERT_KEYS.items()}
    keys |= _attention_keys(full, arch) | rope.rope_keys(rope.read_rope(full))
    if arch is PHI3:  # read for every phi3, scaled or not
        keys["rope.scaling.original_context_length"] = ("u32", full["original_max_position_embeddings"])
    general: dict[str, KeyValue] = {
        "general.architecture": ("string", arch.name),
        "general.type": ("string", "model"),
        "general.name": ("string", name),
        "general.quantization_version": ("u32", 2),
    }
    return general | {f"{arch.name}.{key}": value for key, value in keys.items()}


def origin(recipe: Mapping[str, Any], calibration: Mapping[str, Any] | None) -> "dict[str, KeyValue]":
    """Keys that tell how the weights were made: a recipe without places, and what it was calibrated on, as JSON.

    Without what is null or empty: those are the defaults, and a small model's file should not grow by words.
    """
    found: dict[str, KeyValue] = {"quantkit.recipe": ("string", _json(_stated(recipe)))}
    if calibration is not None:
        found["quantkit.calibration"] = ("string", _json(calibration))
    return found


def _stated(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    inner = ((key, _stated(item)) for key, item in value.items())
    return {key: item for key, item in inner if item is not None and item != {} and item != []}


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _attention_keys(full: Mapping[str, Any], arch: Architecture) -> "dict[str, KeyValue]":
    keys: dict[str, KeyValue] = {}
    if arch is PHI3:  # 0: none; today's llama.cpp reads it and computes no window
        keys[_WINDOW] = ("u32", window(full) or 0)
    if arch is GEMMA3:
        if full["final_logit_softcapping"]:
            keys["final_logit_softcapping"] = ("f32", full["final_logit_softcapping"])
        sliding = [kind == "sliding_attention" for kind in layer_types(full)]
        if any(sliding):
            keys[_WINDOW] = ("u32", full["sliding_window"])
            if sliding != _pattern(_GEMMA3_PATTERN, len(sliding)):
                keys[_PATTERN] = ("bool[]", sliding)
    return keys


def _pattern(n: int, layers: int) -> list[bool]:
    """Whether each layer has a sliding window where every n-th has none; all have one where n is 0."""
    return [n == 0 or (i + 1) % n != 0 for i in range(layers)]


def context_length(config: Mapping[str, Any]) -> int:
    """Tokens for which the file computes the model: its context, or its sliding window where llama.cpp has none."""
    full, arch = settings(config), find(config)
    context, limit = full["max_position_embeddings"], window(full)
    return context if arch.windows or limit is None else min(context, limit)


def notes(config: Mapping[str, Any]) -> list[str]:
    """What a user should know of the file's model, one line each."""
    full = settings(config)
    if (context := context_length(config)) < full["max_position_embeddings"]:
        return [
            f"llama.cpp computes no sliding window for {find(config).name}: the file's context is the window, "
            f"{context} tokens, not {full['max_position_embeddings']}"
        ]
    return []


def config_of(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    divisors: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, Any]:
    """A config.json for transformers from a GGUF's keys; what a file does not say follows from its tensors.

    metadata: key -> plain value; shapes: of all its tensors, rows first; divisors: the values of its tensors of
    `rope.TENSORS`, where it has any. UserError for another architecture, missing keys, and values per layer.
    """
    model_type, arch = _model_type(metadata)
    keys = {
        key.removeprefix(f"{arch.name}."): value for key, value in metadata.items() if key.startswith(f"{arch.name}.")
    }
    table = _KEYS | (_EXPERT_KEYS if arch.experts else {})
    config: dict[str, Any] = {name: _number(keys, key, kind, arch) for name, (key, kind) in table.items()}
    _check_numbers(keys, arch)
    head_dim = keys.get("attention.key_length", config["hidden_size"] // config["num_attention_heads"])
    config["head_dim"] = head_dim
    if keys.get("attention.value_length", head_dim) != head_dim:
        raise UserError(
            f"{arch.name}.attention.value_length: differs from key_length\nhint: such a model cannot be decoded"
        )
    if arch is LLAMA and keys.get("expert_count"):
        raise UserError(
            "llama.expert_count: a mixture of experts of this architecture cannot be decoded\nhint: give a dense model"
        )
    _check_shapes(config, arch, shapes)
    config |= {"model_type": model_type, "vocab_size": shapes["token_embd.weight"][0]}
    config["tie_word_embeddings"] = "output.weight" not in shapes
    config |= {setting: metadata.get(f"tokenizer.ggml.{key}_token_id") for setting, key in _TOKENS.items()}
    config["rope_parameters"] = rope.rope_parameters(keys, divisors or {}, config["max_position_embeddings"])
    return {"architectures": [_CLASSES[model_type]]} | config | _own_settings(config, keys, arch, shapes)


_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}


def _model_type(metadata: Mapping[str, Any]) -> tuple[str, Architecture]:
    name = metadata.get("general.architecture")
    for kind in _CLASSES:
        if ARCHITECTURES[kind].name == name:
            return kind, ARCHITECTURES[kind]
    known = ", ".join(ARCHITECTURES[kind].name for kind in _CLASSES)
    raise UserError(f"general.architecture {name!r}: cannot be decoded\nhint: possible are {known}")


def _number(keys: Mapping[str, Any], key: str, kind: str, arch: Architecture) -> Any:
    """A key's one number; an array per layer must hold the same one throughout."""
    value = keys.get(key)
    if value is None and key == "attention.head_count_kv":
        value = keys.get("attention.head_count")
    if isinstance(value, list | tuple):
        if len(set(value)) != 1:
            raise UserError(f"{arch.name}.{key}: differs between layers\nhint: such a model cannot be decoded")
        value = value[0]
    if not isinstance(value, int if kind == "u32" else float) or not 0 < value < 1 << 32:
        found = "missing" if value is None else f"{value!r}"
        raise UserError(f"{arch.name}.{key}: {found}, expected a positive number\nhint: make the file again")
    return value


def _check_numbers(keys: Mapping[str, Any], arch: Architecture) -> None:
    """UserError where a key that may be left out is there and no positive number."""
    for key in _OPTIONAL:
        value = keys.get(key, 1)
        if not isinstance(value, int | float) or not (0 if key in _ZERO else 1e-30) <= value < 1e30:
            raise UserError(f"{arch.name}.{key}: {value!r}, expected a number\nhint: make the file again")


_OPTIONAL = ("attention.key_length", "attention.value_length", "expert_count", "final_logit_softcapping", _WINDOW)
_OPTIONAL += (
    "rope.dimension_count",
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.scaling.factor",
    "rope.scale_linear",
)
_OPTIONAL += ("rope.scaling.attn_factor", "rope.scaling.original_context_length")
_ZERO = ("expert_count", "final_logit_softcapping", _WINDOW, "rope.scaling.factor", "rope.scale_linear")


def _check_shapes(config: Mapping[str, Any], arch: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """UserError where the keys speak of more than the file has: whoever decodes goes by them."""
    table = shapes.get("token_embd.weight")
    if table is None:
        raise UserError("token_embd.weight: missing\nhint: a file of a vocabulary alone has no model to decode")
    blocks = len({name.split(".")[1] for name in shapes if name.startswith("blk.")})
    pairs = {
        "embedding_length": (config["hidden_size"], table[-1]),
        "block_count": (config["num_hidden_layers"], blocks),
    }
    if arch.experts:
        pairs["expert_count"] = (config["num_experts"], shapes.get("blk.0.ffn_up_exps.weight", (0,))[0])
    for key, (stated, found) in pairs.items():
        if stated != found:
            raise UserError(f"{arch.name}.{key}: {stated}, but the tensors are of {found}\nhint: make the file again")


def _own_settings(
    config: Mapping[str, Any], keys: Mapping[str, Any], arch: Architecture, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """What only one architecture has."""
    if arch is LLAMA:
        return {"attention_bias": "blk.0.attn_q.bias" in shapes, "mlp_bias": "blk.0.ffn_up.bias" in shapes}
    if arch is QWEN3_MOE:
        return {"num_local_experts": config["num_experts"], "norm_topk_prob": True}
    if arch is PHI3:
        partial = _partial_factor(keys.get("rope.dimension_count", config["head_dim"]), config["head_dim"])
        original = keys.get("rope.scaling.original_context_length", config["max_position_embeddings"])
        scaled = config["rope_parameters"] | {"partial_rotary_factor": partial}
        return {"rope_parameters": scaled, "original_max_position_embeddings": original}
    return _gemma3_settings(config, keys) if arch is GEMMA3 else {}


def _partial_factor(columns: int, head_dim: int) -> float:
    """The share of a head that transformers' int(head_dim * share) makes these columns again."""
    share = columns / head_dim
    return share if int(head_dim * share) == columns else (columns + 0.5) / head_dim


def _gemma3_settings(config: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    layers, width = config["num_hidden_layers"], keys.get(_WINDOW, 0)
    pattern = keys.get(_PATTERN, _GEMMA3_PATTERN)
    sliding = _pattern(pattern, layers) if isinstance(pattern, int) else pattern
    if not isinstance(sliding, list | tuple) or len(sliding) != layers:
        raise UserError(f"gemma3.{_PATTERN}: {sliding!r}, expected {layers} layers\nhint: make the file again")
    local = {"rope_type": "default", "rope_theta": float(keys.get("rope.freq_base_swa", 10000.0))}
    return {
        "layer_types": ["sliding_attention" if width and slides else "full_attention" for slides in sliding],
        "sliding_window": width or config["max_position_embeddings"],  # transformers masks with it even where none has
        "rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": local},
        "query_pre_attn_scalar": gemma3_scalar(config),
        "final_logit_softcapping": keys.get("final_logit_softcapping"),
    }
