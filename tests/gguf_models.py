"""Tiny random models of the architectures that a GGUF can hold, in many variants, and their tensors in the file."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as t
from safetensors.numpy import load_file

from quantkit.formats.gguf.tensor_names import extra_tensors, gguf_shapes, places, row_order

COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDE = COMMON | {"head_dim": 32}
EXPERTS = COMMON | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.9], "long_factor": [1.0, 2.0, 3.5, 7.0]}
GEMMA = COMMON | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "num_hidden_layers": 6}


def _rope(parameters: Mapping[str, Any], theta: float = 10000.0) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": theta} | parameters}


def _gemma_rope(full: Mapping[str, Any], local: float = 10000.0) -> dict[str, Any]:
    nested = {"rope_type": "default", "rope_theta": local}
    return {"rope_parameters": {"full_attention": {"rope_theta": 1e6} | full, "sliding_attention": nested}}


VARIANTS: dict[str, Callable[[], t.PretrainedConfig]] = {
    "llama": lambda: t.LlamaConfig(**COMMON),
    "llama-tied": lambda: t.LlamaConfig(**COMMON, tie_word_embeddings=True),
    "llama-mha": lambda: t.LlamaConfig(**COMMON | {"num_key_value_heads": 4}),
    "llama-mqa": lambda: t.LlamaConfig(**COMMON | {"num_key_value_heads": 1}),
    "llama-head_dim": lambda: t.LlamaConfig(**WIDE),
    "llama-biases": lambda: t.LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True),
    "llama-llama3": lambda: t.LlamaConfig(**COMMON, **_rope(LLAMA3, 500.0)),
    "llama-linear": lambda: t.LlamaConfig(**COMMON, **_rope(LINEAR)),
    "llama-yarn": lambda: t.LlamaConfig(**COMMON, **_rope(YARN)),
    "llama-yarn-own": lambda: t.LlamaConfig(**COMMON, **_rope(YARN | {"attention_factor": 1.3})),
    "llama-yarn-mscale": lambda: t.LlamaConfig(**COMMON, **_rope(YARN | {"mscale": 0.7, "mscale_all_dim": 1.0})),
    "llama-longrope-short": lambda: t.LlamaConfig(
        **COMMON, **_rope(_eight(LONG) | {"original_max_position_embeddings": 256})
    ),
    "llama-longrope-long": lambda: t.LlamaConfig(
        **COMMON, **_rope(_eight(LONG) | {"original_max_position_embeddings": 16, "factor": 4.0})
    ),
    "llama-theta": lambda: t.LlamaConfig(**COMMON, **_rope({"rope_type": "default"}, 500000.0)),
    "mistral": lambda: t.MistralConfig(**COMMON, sliding_window=None),
    "mistral-window": lambda: t.MistralConfig(**WIDE, sliding_window=256),
    "qwen2": lambda: t.Qwen2Config(**COMMON),
    "qwen2-tied": lambda: t.Qwen2Config(**COMMON, tie_word_embeddings=True),
    "qwen2-yarn": lambda: t.Qwen2Config(**COMMON, **_rope(YARN, 1e6)),
    "qwen3": lambda: t.Qwen3Config(**COMMON, head_dim=128),
    "qwen3-tied": lambda: t.Qwen3Config(**COMMON, head_dim=16, tie_word_embeddings=True),
    "qwen3-yarn": lambda: t.Qwen3Config(**COMMON, head_dim=32, **_rope(YARN, 1e6)),
    "gemma3": lambda: t.Gemma3TextConfig(**GEMMA),
    "gemma3-256": lambda: t.Gemma3TextConfig(**GEMMA | {"head_dim": 256, "query_pre_attn_scalar": 256}),
    "gemma3-62": lambda: t.Gemma3TextConfig(**GEMMA | {"num_hidden_layers": 62, "query_pre_attn_scalar": 16}),
    "gemma3-untied": lambda: t.Gemma3TextConfig(**GEMMA, tie_word_embeddings=False),
    "gemma3-linear": lambda: t.Gemma3TextConfig(**GEMMA, **_gemma_rope(LINEAR, 5000.0)),
    "gemma3-pattern": lambda: t.Gemma3TextConfig(
        **GEMMA, layer_types=["sliding_attention", "full_attention", "full_attention"] * 2
    ),
    "gemma3-full": lambda: t.Gemma3TextConfig(**GEMMA, layer_types=["full_attention"] * 6),
    "gemma3-softcap": lambda: t.Gemma3TextConfig(**GEMMA, final_logit_softcapping=2.0),
    "phi3": lambda: t.Phi3Config(**COMMON),
    "phi3-tied": lambda: t.Phi3Config(**COMMON, tie_word_embeddings=True),
    "phi3-partial": lambda: t.Phi3Config(**COMMON, **_rope({"rope_type": "default", "partial_rotary_factor": 0.75})),
    "phi3-longrope-short": lambda: t.Phi3Config(**COMMON, original_max_position_embeddings=256, **_rope(_eight(LONG))),
    "phi3-longrope-long": lambda: t.Phi3Config(
        **COMMON, original_max_position_embeddings=16, **_rope(LONG | {"partial_rotary_factor": 0.5})
    ),
    "qwen3_moe": lambda: t.Qwen3MoeConfig(**EXPERTS, head_dim=32),
    "qwen3_moe-768": lambda: t.Qwen3MoeConfig(**EXPERTS | {"moe_intermediate_size": 768}, head_dim=32),
    "qwen3_moe-tied": lambda: t.Qwen3MoeConfig(**EXPERTS, head_dim=16, tie_word_embeddings=True),
}


def _eight(long: Mapping[str, Any]) -> dict[str, Any]:
    """Twice as many factors, for heads that are turned whole."""
    return {
        key: [*value, *(x * 1.2 for x in value)] if isinstance(value, list) else value for key, value in long.items()
    }


def make(variant: str, folder: Path, seed: int = 0) -> t.PreTrainedModel:
    """A random float32 model, saved in `folder`; norms and biases are random too, logits of a few units."""
    torch.manual_seed(seed)
    config = VARIANTS[variant]()
    model = t.AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager").eval()
    with torch.no_grad():
        for path, param in model.named_parameters():
            if param.dim() == 1:
                param.add_(0.3 * torch.randn_like(param))
            else:
                param.normal_(std=0.5 if "embed" in path else 1.5 * param.shape[-1] ** -0.5)
    model.tie_weights()
    model.save_pretrained(folder)
    return model


def checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(config.json, tensors) of a saved model."""
    tensors: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return json.loads((folder / "config.json").read_text()), tensors


def gguf_tensors(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a float32 GGUF by their places, in the file's order."""
    shapes = {name: values.shape for name, values in tensors.items()}
    out = {name: np.full(shape, np.nan, np.float32) for name, shape in gguf_shapes(config, shapes).items()}
    for name, place in places(config, shapes).items():
        values = tensors[name] + 1 if place.plus_one else tensors[name]
        if place.heads:
            values = values[row_order(len(values), place.heads)]
        (out[place.tensor] if place.expert is None else out[place.tensor][place.expert])[...] = values
    for name, values in extra_tensors(config).items():
        out[name][...] = values
    return out
