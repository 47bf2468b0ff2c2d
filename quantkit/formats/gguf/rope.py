"""Rotary embeddings: from the many spellings of config.json to the keys and tensors llama.cpp reads, and back.

Frequencies are those of transformers' `modeling_rope_utils`; llama.cpp divides the plain ones by a factor (linear), by
one tensor of divisors (llama3), by one of two (longrope), or ramps between two (yarn). No torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantkit.errors import UserError

# Tensors of float32 divisors [rotated columns / 2].
LLAMA3_TENSOR = "rope_freqs.weight"
LONG_TENSOR, SHORT_TENSOR = "rope_factors_long.weight", "rope_factors_short.weight"
_MOST = 1e30  # far beyond any base or factor, and within float32
TENSORS = (LLAMA3_TENSOR, LONG_TENSOR, SHORT_TENSOR)


@dataclass(frozen=True)
class Rope:
    """One model's rotary embedding.

    kind              default, linear, yarn, longrope, llama3, or one that no engine of ours knows
    theta             base of the frequencies; local_theta: of the layers with a sliding window, where it is another
    columns           of each head that are turned
    factor            the frequencies' (linear, yarn, llama3)
    attention_factor  of cos and sin (yarn, longrope)
    original_context  tokens that the model was first trained for (yarn, longrope, llama3)
    """

    kind: str
    theta: float
    columns: int
    factor: float = 1.0
    original_context: int | None = None
    attention_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    long_factor: tuple[float, ...] = ()
    short_factor: tuple[float, ...] = ()
    local_theta: float | None = None


def raw_parameters(full: Mapping[str, Any]) -> dict[str, Any]:
    """The dict of config.json that scales the full-attention layers: `rope_scaling` goes before `rope_parameters`."""
    if full["model_type"] == "gemma3_text":
        nested = full.get("rope_parameters") or {}
        return dict(nested.get("full_attention") or {}) | dict(full.get("rope_scaling") or {})
    return dict(full.get("rope_scaling") or full.get("rope_parameters") or {})


def local_parameters(full: Mapping[str, Any]) -> dict[str, Any]:
    """The dict of config.json for layers with a sliding window, where they have their own."""
    nested = full.get("rope_parameters") or {}
    return dict(nested.get("sliding_attention") or {}) if full["model_type"] == "gemma3_text" else {}


def read_rope(full: Mapping[str, Any]) -> Rope:
    """The rotary embedding of complete settings. UserError where what its kind needs is missing or no number."""
    try:
        rope = _read_rope(full)
        for number in (rope.theta, rope.local_theta or 1.0, rope.factor, rope.attention_factor):
            if not 0 < number < _MOST:
                raise ValueError(f"{number} where a positive number is expected")
        return rope
    except UserError:
        raise
    except (AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"config.json: the rotary embedding cannot be read: {error}\nhint: take config.json from the model's source"
        ) from error


def _read_rope(full: Mapping[str, Any]) -> Rope:
    raw = raw_parameters(full)
    kind = str(raw.get("rope_type") or raw.get("type") or "default")
    if full["model_type"] == "phi3" and kind in ("su", "yarn"):  # older names of the same
        kind = "longrope"
    partial = partial_factor(full)
    plain = Rope(
        kind=kind,
        theta=float(raw.get("rope_theta") or full["rope_theta"]),
        columns=int(full["head_dim"] * partial),
        local_theta=_local_theta(full),
    )
    return _scaled(plain, raw, full) if kind in ("linear", "yarn", "longrope", "llama3") else plain


def partial_factor(full: Mapping[str, Any]) -> float:
    """The share of each head that is turned."""
    return float(raw_parameters(full).get("partial_rotary_factor") or full.get("partial_rotary_factor") or 1.0)


def _local_theta(full: Mapping[str, Any]) -> float | None:
    if full["model_type"] != "gemma3_text":
        return None
    return float(local_parameters(full).get("rope_theta") or full["rope_local_base_freq"])


def _scaled(plain: Rope, raw: Mapping[str, Any], full: Mapping[str, Any]) -> Rope:
    def needed(key: str) -> Any:
        if raw.get(key) is None:
            raise UserError(
                f"config.json: rope_parameters of type {plain.kind} lack `{key}`\n"
                "hint: take config.json from the model's source"
            )
        return raw[key]

    context = full["max_position_embeddings"]
    original = full.get("original_max_position_embeddings") or raw.get("original_max_position_embeddings") or context
    common: dict[str, Any] = {"kind": plain.kind, "theta": plain.theta, "columns": plain.columns}
    common |= {"local_theta": plain.local_theta, "original_context": int(original)}
    if plain.kind == "linear":
        return Rope(**common, factor=float(needed("factor")))
    if plain.kind == "llama3":
        numbers: dict[str, Any] = {key: float(needed(key)) for key in ("factor", "low_freq_factor", "high_freq_factor")}
        return Rope(**common, **numbers)
    factor = float(raw.get("factor") or context / original)
    if plain.kind == "yarn":
        return Rope(**common, factor=factor, attention_factor=_yarn_attention(raw, factor))
    attention = raw.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    long, short = (tuple(float(x) for x in needed(key)) for key in ("long_factor", "short_factor"))
    for key, values in (("long_factor", long), ("short_factor", short)):
        if len(values) != plain.columns // 2:
            raise UserError(
                f"config.json: rope_parameters.{key}: {len(values)} numbers, expected {plain.columns // 2} "
                "(half of the rotated columns)\nhint: take config.json from the model's source"
            )
    return Rope(**common, attention_factor=float(attention), long_factor=long, short_factor=short)


def _mscale(factor: float, scale: float = 1.0) -> float:
    """What yarn multiplies cos and sin with."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_attention(raw: Mapping[str, Any], factor: float) -> float:
    if raw.get("attention_factor") is not None:
        return float(raw["attention_factor"])
    if raw.get("mscale") and raw.get("mscale_all_dim"):
        return _mscale(factor, raw["mscale"]) / _mscale(factor, raw["mscale_all_dim"])
    return _mscale(factor)


def rope_keys(rope: Rope) -> dict[str, tuple[str, Any]]:
    """Keys under the architecture's prefix: name -> (kind, value)."""
    keys: dict[str, tuple[str, Any]] = {
        "rope.dimension_count": ("u32", rope.columns),
        "rope.freq_base": ("f32", rope.theta),
    }
    if rope.local_theta is not None:
        keys["rope.freq_base_swa"] = ("f32", rope.local_theta)
    if rope.kind in ("linear", "yarn", "longrope"):
        keys["rope.scaling.type"] = ("string", rope.kind)
    if rope.kind in ("linear", "yarn"):
        keys["rope.scaling.factor"] = ("f32", rope.factor)
    if rope.kind in ("yarn", "longrope"):
        keys["rope.scaling.original_context_length"] = ("u32", rope.original_context)
    # llama.cpp multiplies yarn's own factor of cos and sin with this one, and uses it alone for longrope
    attention = rope.attention_factor / (_mscale(rope.factor) if rope.kind == "yarn" else 1.0)
    if not math.isclose(attention, 1.0, rel_tol=1e-7):
        keys["rope.scaling.attn_factor"] = ("f32", attention)
    return keys


def rope_tensors(rope: Rope) -> dict[str, np.ndarray]:
    """Tensors of divisors of the frequencies, float32 [rotated columns / 2], by GGUF name."""
    if rope.kind == "llama3":
        return {LLAMA3_TENSOR: _llama3_divisors(rope)}
    if rope.kind == "longrope":
        long, short = (np.array(values, np.float32) for values in (rope.long_factor, rope.short_factor))
        return {LONG_TENSOR: long, SHORT_TENSOR: short}
    return {}


def _llama3_divisors(rope: Rope) -> np.ndarray:
    """Llama 3.1: long waves are slowed by `factor`, short ones kept, those between ramped."""
    assert rope.original_context is not None
    wave_lengths = 2 * math.pi * rope.theta ** (np.arange(0, rope.columns, 2) / rope.columns)
    turns = rope.original_context / wave_lengths
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return (1 / ((1 - smooth) / rope.factor + smooth)).astype(np.float32)


def rope_parameters(keys: Mapping[str, Any], tensors: Mapping[str, Sequence[float]], context: int) -> dict[str, Any]:
    """transformers' `rope_parameters` of the full-attention layers from a GGUF's keys and tensors of divisors.

    keys: without the architecture's prefix; context: tokens. One tensor for all lengths becomes a longrope with equal
    halves: llama3's own numbers are not in the file. UserError for a scaling that llama.cpp knows and this does not.
    """
    theta = float(keys.get("rope.freq_base", 10000.0))
    attention = float(keys.get("rope.scaling.attn_factor", 1.0))
    original = int(keys.get("rope.scaling.original_context_length", context))
    named = keys.get("rope.scaling.type", "linear")
    factor = float(keys.get("rope.scaling.factor", 0.0) or keys.get("rope.scale_linear", 0.0) or 1.0)
    if long := tensors.get(LONG_TENSOR) or tensors.get(LLAMA3_TENSOR):
        short = tensors.get(SHORT_TENSOR) or tensors[LLAMA3_TENSOR]
        numbers = {"long_factor": [float(x) for x in long], "short_factor": [float(x) for x in short]}
        kind = {"rope_type": "longrope", "attention_factor": attention, "original_max_position_embeddings": original}
        return {"rope_theta": theta, **kind, **numbers}
    if named == "yarn":
        kind = {"rope_type": "yarn", "factor": factor, "attention_factor": attention * _mscale(factor)}
        return {"rope_theta": theta, **kind, "original_max_position_embeddings": original}
    if named not in ("none", "linear", "longrope"):
        raise UserError(
            f"rope.scaling.type {named!r}: cannot be decoded\nhint: possible are none, linear, yarn, longrope"
        )
    if factor == 1.0 or named == "none":
        return {"rope_theta": theta, "rope_type": "default"}
    return {"rope_theta": theta, "rope_type": "linear", "factor": factor}
