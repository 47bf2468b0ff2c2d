"""The model an engine runs: refused by its configuration before weights are read, loaded, and its cache's size."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from quantkit.cache_spec import CacheSpec, cache_named
from quantkit.checkpoint.gguf_path import find_gguf
from quantkit.checkpoint.hub import locate_config
from quantkit.checkpoint.model_folder import TOKENIZERS
from quantkit.checkpoint.tokenizer import locate_tokenizer
from quantkit.errors import UserError
from quantkit.model.meta_model import is_encoder, read_config, refusal
from quantkit.runtime.engine.cache import CacheFormat
from quantkit.runtime.load import load
from quantkit.types import KVSpec

KNOWN_LAYERS = {"full_attention", "sliding_attention"}
PLAIN = (None, "auto", "fp32", "fp16", "bf16", "float32", "float16", "bfloat16")  # the model's dtype, as vLLM calls it
ROPE_BY_LENGTH = {"dynamic", "longrope"}  # whose angles depend on the longest sequence of a batch
CACHE_SHARE = 0.25  # of the free memory of a computer without a GPU
HINT = "\nhint: quantkit.load(...).generate(...) runs it"


@dataclass(frozen=True)
class Source:
    """A loaded model, its tokenizer if it has one, and how its cache is kept. context: tokens it was made for."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    context: int
    cache: CacheFormat


def load_source(
    model: str | os.PathLike[str] | PreTrainedModel, dtype: Any, device: str, kv_cache: Any, trust_remote_code: bool
) -> Source:
    """The model of a folder, a Hub id or a GGUF file, or a loaded one; UserError for one the engine does not run."""
    if isinstance(model, PreTrainedModel):
        if is_encoder(model):
            raise UserError(refusal(model.config, "an encoder"))
        context = check_config(model.config)
        return Source(model, None, context, _cache_format(model, kv_cache))
    if not isinstance(model, str | os.PathLike):
        raise UserError(f"model is {model!r}; expected a model folder, a Hub id or a loaded model")
    file = find_gguf(os.fspath(model))
    tokenizer: PreTrainedTokenizerBase | None = None
    if file is None:
        folder = locate_config(os.fspath(model))
        check_config(read_config(folder, trust_remote_code=trust_remote_code))
    loaded = load(os.fspath(model), dtype, device, trust_remote_code=trust_remote_code, simulate_cache=False)
    context = check_config(loaded.config)
    if file is not None:
        from quantkit.runtime.gguf_tokenizer import gguf_tokenizer

        tokenizer = gguf_tokenizer(file)[0]
    elif any((folder := Path(str(loaded.name_or_path))).joinpath(name).exists() for name in TOKENIZERS):
        tokenizer = locate_tokenizer(folder, trust_remote_code)
    return Source(loaded, tokenizer, context, _cache_format(loaded, kv_cache))


def check_config(config: PretrainedConfig) -> int:
    """The context of a model of this configuration; UserError naming what of it the engine does not run."""
    text = config.get_text_config()
    name = (getattr(config, "architectures", None) or [f"model_type {config.model_type!r}"])[0]
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    kinds = set(getattr(text, "layer_types", None) or [])
    reason = None
    if getattr(config, "is_encoder_decoder", False):
        reason = "an encoder-decoder model"
    elif any(getattr(config, part, None) is not None for part in ("vision_config", "audio_config")):
        reason = "a model with vision or sound inputs"
    elif getattr(text, "kv_lora_rank", None):
        reason = "a model with multi-head latent attention (MLA)"
    elif getattr(kind, "_is_stateful", False) or kinds - KNOWN_LAYERS:
        names = f": {', '.join(sorted(kinds - KNOWN_LAYERS))}" if kinds - KNOWN_LAYERS else ""
        reason = f"a model with layers other than full and sliding attention (linear attention, state space{names})"
    elif getattr(text, "use_bidirectional_attention", None):
        reason = "a model whose tokens see those behind them"
    elif getattr(text, "alibi", False) or getattr(kind, "_supports_attention_backend", True) is False:
        reason = "a model whose attention does not go through transformers' AttentionInterface"
    if reason is not None:
        raise UserError(f"{name} is {reason}, which the paged engine does not run{HINT}")
    context = getattr(text, "max_position_embeddings", None) or 1 << 20
    rope = getattr(text, "rope_parameters", None) or {}
    if isinstance(rope, dict) and rope.get("rope_type") in ROPE_BY_LENGTH:
        context = min(context, rope.get("original_max_position_embeddings") or context)
    return context


def _cache_format(model: PreTrainedModel, wanted: Any) -> CacheFormat:
    """The cache a user asks for, or, where he does not, the one the checkpoint describes."""
    if wanted is None:
        spec, ranges = getattr(model, "quantkit_cache", None) or (CacheSpec(None, None), {})
        keys, values = ({layer: pair[side] for layer, pair in ranges.items()} for side in (0, 1))
        return CacheFormat(spec.keys, spec.values, keys, values)
    if isinstance(wanted, KVSpec):
        wanted = CacheSpec(wanted, wanted)
    if isinstance(wanted, CacheSpec):
        return CacheFormat(wanted.keys, wanted.values)
    if isinstance(wanted, Mapping):
        wanted = ",".join(f"{side}={'none' if kind in PLAIN else kind}" for side, kind in wanted.items())
    if not isinstance(wanted, str):
        raise UserError(f"kv_cache is {wanted!r}; expected a name like int8, or keys=int8,values=int4")
    return _cache_format(model, (None if wanted in PLAIN else cache_named(wanted)) or CacheSpec(None, None))


def cache_blocks(block_bytes: int, wanted: int, longest: int, device: torch.device, share: float) -> int:
    """Blocks of a cache: `wanted`, as far as memory allows; `longest` at least.

    share: of a GPU's memory, for model and cache together. UserError where not even `longest` fit.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        memory = free - total * (1 - share)
    else:
        memory = psutil.virtual_memory().available * CACHE_SHARE
    if longest * block_bytes > memory:
        raise UserError(
            f"a sequence of the model's context needs {longest * block_bytes / 2**30:.1f} GiB of cache; "
            f"{max(memory, 0) / 2**30:.1f} are to be had\nhint: set max_model_len, or kv_cache='int8'"
        )
    return int(min(wanted, memory // block_bytes))


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> set[int]:
    """The tokens that end a sequence, as `generate` knows them; the tokenizer's where the model says none."""
    for owner in (getattr(model, "generation_config", None), model.config.get_text_config(), tokenizer):
        if (found := getattr(owner, "eos_token_id", None)) is not None:
            return set(found) if isinstance(found, list | tuple) else {int(found)}
    return set()


def check_draft(draft: Source, source: Source, longest: int) -> None:
    """UserError where the draft model's guesses would mean nothing to the model."""
    sizes = [each.model.get_input_embeddings().num_embeddings for each in (draft, source)]  # type: ignore[union-attr]
    if sizes[0] != sizes[1]:
        raise UserError(f"the draft model has {sizes[0]} tokens, the model {sizes[1]}: they need one vocabulary")
    if draft.context < longest:
        raise UserError(
            f"the draft model's context has {draft.context} tokens, the model's {longest}\n"
            f"hint: max_model_len={draft.context}"
        )
