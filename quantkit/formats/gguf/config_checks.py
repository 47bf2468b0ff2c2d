"""What config.json may ask of a model that llama.cpp does not compute: refused by name, before any work. No torch."""

from collections.abc import Iterator, Mapping
from typing import Any

from quantkit.errors import UserError
from quantkit.formats.gguf.architectures import GEMMA3, LLAMA, Architecture, find, layer_types, settings
from quantkit.formats.gguf.rope import local_parameters, partial_factor, raw_parameters, read_rope


def check_config(config: Mapping[str, Any]) -> None:
    """UserError naming the first setting of a config.json that changes the model and has no place in a GGUF."""
    arch, full = find(config), settings(config)
    for what, expected in _problems(full, arch):
        raise UserError(
            f"config.json: {what} has no place in a GGUF of architecture {arch.name}, expected {expected}\n"
            "hint: llama.cpp would compute another model; use `output: {format: compressed-tensors}`"
        )


def _problems(full: Mapping[str, Any], arch: Architecture) -> Iterator[tuple[str, str]]:
    """(setting and value, what llama.cpp computes)."""
    for key in ("hidden_act", "hidden_activation"):
        if full.get(key) not in (None, arch.activation):
            yield f"`{key}: {full[key]}`", f"{arch.activation}"
    if full.get("attention_bias") and arch is not LLAMA:
        yield "`attention_bias: true`", "false"
    if full.get("is_causal") is False:
        yield "`is_causal: false`", "true"
    yield from _heads(full, arch)
    yield from _rope(full, arch)
    if len(layer_types(full)) != full["num_hidden_layers"]:
        yield f"`layer_types` of {len(layer_types(full))} layers", f"{full['num_hidden_layers']}"
    for kind in dict.fromkeys(layer_types(full)):
        if kind not in ("full_attention", "sliding_attention"):
            yield f"`layer_types: {kind}`", "full_attention or sliding_attention"
    if "sliding_attention" in layer_types(full) and not full.get("sliding_window"):
        yield "`sliding_window: null` with `layer_types: sliding_attention`", "a number of tokens"
    if arch is GEMMA3:
        yield from _gemma3(full)
    if arch.experts:
        yield from _experts(full)


def _heads(full: Mapping[str, Any], arch: Architecture) -> Iterator[tuple[str, str]]:
    heads, kv_heads = full["num_attention_heads"], full["num_key_value_heads"]
    if heads % kv_heads:
        yield f"`num_key_value_heads: {kv_heads}`", f"a divisor of num_attention_heads ({heads})"
    if not arch.free_head and full["head_dim"] * heads != full["hidden_size"]:
        yield f"`head_dim: {full['head_dim']}`", f"hidden_size / num_attention_heads ({full['hidden_size'] // heads})"


def _rope(full: Mapping[str, Any], arch: Architecture) -> Iterator[tuple[str, str]]:
    rope, raw = read_rope(full), raw_parameters(full)
    if any(isinstance(value, Mapping) for value in raw.values()):
        yield "`rope_parameters` per type of layer", "one rotary embedding for all layers"
    if rope.kind not in arch.rope_types:
        yield f"`rope_type: {rope.kind}`", f"{' or '.join(arch.rope_types)}"
    if rope.kind == "yarn":  # llama.cpp has keys for these and reads them for other architectures only
        for key, value in (("beta_fast", 32), ("beta_slow", 1), ("truncate", True)):
            if raw.get(key) not in (None, value):
                yield f"`{key}: {str(raw[key]).lower()}` of yarn", str(value).lower()
    if raw.get("mrope_section"):
        yield "`mrope_section`", "none"
    if partial_factor(full) != 1.0 and not arch.partial_rope:
        yield f"`partial_rotary_factor: {partial_factor(full)}`", "1.0"
    local = local_parameters(full).get("rope_type", "default")
    if local != "default":
        yield f"`rope_type: {local}` of the layers with a sliding window", "default"


def gemma3_scalar(full: Mapping[str, Any]) -> int:
    """query_pre_attn_scalar that llama.cpp assumes of a Gemma 3: head_dim, but for the 27B model of 62 layers."""
    heads = full["hidden_size"] // full["num_attention_heads"]
    return heads if full["num_hidden_layers"] == 62 else full["head_dim"]


def _gemma3(full: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if full["query_pre_attn_scalar"] != (scalar := gemma3_scalar(full)):
        yield f"`query_pre_attn_scalar: {full['query_pre_attn_scalar']}`", f"{scalar}"
    if full["attn_logit_softcapping"]:
        yield f"`attn_logit_softcapping: {full['attn_logit_softcapping']}`", "null"
    if full["use_bidirectional_attention"]:
        yield "`use_bidirectional_attention: true`", "false"


def _experts(full: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if full["norm_topk_prob"] is not True:
        yield f"`norm_topk_prob: {str(full['norm_topk_prob']).lower()}`", "true"
    if full["decoder_sparse_step"] != 1:
        yield f"`decoder_sparse_step: {full['decoder_sparse_step']}`", "1 (experts in every layer)"
    if full["mlp_only_layers"]:
        yield f"`mlp_only_layers: {full['mlp_only_layers']}`", "[] (experts in every layer)"
