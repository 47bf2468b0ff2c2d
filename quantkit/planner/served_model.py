"""What serving a model moves and multiplies: weights, cached keys and values, products, per step and per device.

Counted from config.json by way of the inventory. What the config cannot say is in `ServedModel.unknown`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from quantkit.cache_spec import CacheSpec, cache_named
from quantkit.planner.model_inventory import ModelInventory, cached_heads, kv_bytes
from quantkit.planner.roofline import Work, all_reduce_bytes, all_reduces
from quantkit.types import KVSpec

SERVED = 2  # bytes of a weight that is not quantized: engines keep float32 checkpoints in 16 bits
WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
_FP8 = KVSpec(8, "float")
CACHES: dict[str, CacheSpec | None] = {"bf16": None, "fp8": CacheSpec(_FP8, _FP8), "int8": cache_named("int8")}


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """A model's weights as one scheme stores them, of the whole model.

    nbytes, expert_bytes  all of it, and the experts among it
    quantized, expert_quantized  parameters that are multiplied in `kind`; the second ones are experts
    kind    the format of products: bf16, fp8, int8, fp4
    """

    nbytes: int
    expert_bytes: int
    quantized: int = 0
    expert_quantized: int = 0
    kind: str = "bf16"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model as serving sees it.

    params      all of them; active: those that a token passes through
    linears, experts, head  parameters of matrices every token passes through, of all experts, of the output matrix
    embedding   parameters of a table of which a step reads a few rows; 0 where the output matrix is the same table
    share       of the experts, that a token passes through
    windows     tokens that each layer with a cache keeps; None: all of them
    token_bytes bytes of a token in the cache of all layers, by the cache's format
    heads, kv_heads, copied  of queries and of cached keys; copied: each device holds all of a cache (latent attention)
    pair_flops  FLOP of one query and one key in one layer
    longest     tokens the model takes; None where config.json does not say
    unknown     what could not be counted
    """

    params: int
    active: int
    layers: int
    hidden: int
    linears: int
    experts: int
    head: int
    embedding: int
    share: float
    windows: tuple[int | None, ...]
    token_bytes: Mapping[str, float]
    heads: int
    kv_heads: int
    copied: bool
    pair_flops: float
    longest: int | None
    unknown: tuple[str, ...]

    def kept(self, context: float) -> float:
        """Tokens that the caches of all layers keep of a sequence, together."""
        return sum(context if window is None else min(context, window) for window in self.windows)

    def cache_bytes(self, context: float, cache: str = "bf16") -> float:
        """Bytes of the keys and values of one sequence."""
        return self.token_bytes[cache] / max(1, len(self.windows)) * self.kept(context)

    def cache_share(self, tp: int, pp: int = 1) -> float:
        """Of a cache, what each device holds: devices beyond the number of heads hold copies."""
        return 1 / pp if self.copied else max(1, self.kv_heads / tp) / self.kv_heads / pp

    def touched(self, tokens: int) -> float:
        """Share of the experts that some token of a step passes through, if each chooses at random."""
        return 1 - (1 - self.share) ** tokens

    def read_bytes(self, weights: StoredWeights, tokens: int) -> float:
        """Bytes of weights that a step over so many tokens reads."""
        dense = weights.nbytes - weights.expert_bytes - SERVED * self.embedding
        return dense + weights.expert_bytes * self.touched(tokens)

    def products(self, weights: StoredWeights, tokens: int, logits: int) -> dict[str, float]:
        """FLOP of all matrices by format, without attention; logits: tokens that the output matrix is asked for."""
        low = weights.quantized - weights.expert_quantized * (1 - self.share)
        whole = self.linears + self.experts * self.share
        flops = {"bf16": 2.0 * ((whole - low) * tokens + self.head * logits)}
        flops[weights.kind] = flops.get(weights.kind, 0.0) + 2.0 * low * tokens
        return flops

    def decode(self, weights: StoredWeights, sequences: int, context: float, cache: str, tp: int, pp: int) -> Work:
        """One token for each of `sequences`, each of which has `context` tokens, on one device of one stage."""
        flops = self.products(weights, sequences, sequences)
        flops["bf16"] += sequences * self.pair_flops * self.kept(context)
        held = sequences * self.cache_bytes(context, cache) * self.cache_share(tp, pp)
        read = self.read_bytes(weights, sequences) / (tp * pp)
        return self._spread(flops, read + held, sequences, tp, pp)

    def prefill(self, weights: StoredWeights, prompt: int, cache: str, tp: int, pp: int) -> Work:
        """All tokens of one prompt on one device of one stage."""
        flops = self.products(weights, prompt, 1)
        pairs = sum(
            prompt * prompt / 2 if window is None or window >= prompt else window * (prompt - window / 2)
            for window in self.windows
        )
        flops["bf16"] += self.pair_flops * pairs
        held = self.cache_bytes(prompt, cache) * self.cache_share(tp, pp)
        return self._spread(flops, self.read_bytes(weights, prompt) / (tp * pp) + held, prompt, tp, pp)

    def _spread(self, flops: Mapping[str, float], nbytes: float, tokens: int, tp: int, pp: int) -> Work:
        reduces = 0 if tp == 1 else math.ceil(all_reduces(self.layers) / pp)
        reduced = 0 if tp == 1 else tokens * all_reduce_bytes(self.hidden, self.layers, SERVED) / pp
        return Work({kind: each / (tp * pp) for kind, each in flops.items()}, nbytes, reduces, reduced)


def served_model(inventory: ModelInventory) -> ServedModel:
    """The counts of an inventory."""
    text, params = inventory.config.get_text_config(), inventory.params
    total, experts = sum(params.values()), params["experts"]
    tied, head_bytes = inventory.head
    head = head_bytes // inventory.dtype.itemsize
    unknown = []
    share = inventory.active if experts else 1.0
    if experts and share == 1.0:
        unknown.append("how many experts a token passes through: all are counted")
    heads = getattr(text, "num_attention_heads", None)
    windows = () if heads is None else _windows(text)
    if without := text.num_hidden_layers - len(windows):
        unknown.append(f"the state of the {without} layers without a cache of keys and values: it is not counted")
    longest = getattr(text, "max_position_embeddings", None)
    if longest is None:
        unknown.append("the longest context: any is taken")
    kv_heads, size, tokens = _cache_shape(inventory, attends=heads is not None)
    latent = bool(getattr(text, "kv_lora_rank", None))
    keys, values = size, size
    if latent:
        keys, values = text.qk_nope_head_dim + text.qk_rope_head_dim, text.v_head_dim
    return ServedModel(
        params=total,
        active=round(total - experts * (1 - share)),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        linears=params["linears"] + params["routers"],
        experts=experts,
        head=head,
        embedding=0 if tied else params["embeddings"],
        share=share,
        windows=windows,
        token_bytes=tokens,
        heads=heads or 1,
        kv_heads=kv_heads,
        copied=latent,
        pair_flops=2.0 * (heads or 0) * (keys + values),
        longest=longest if isinstance(longest, int) else None,
        unknown=tuple(unknown),
    )


def _cache_shape(inventory: ModelInventory, *, attends: bool) -> tuple[int, int, dict[str, float]]:
    """Heads of cached keys, features of each, and bytes of a token in all layers by the cache's format."""
    if not attends:
        return 1, 0, dict.fromkeys(CACHES, 0.0)
    text = inventory.config.get_text_config()
    found, size = cached_heads(inventory.config)
    heads = found
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        heads = 1  # Falcon and BigCode say it this way
    dtype = _served_dtype(inventory)
    sizes = {name: kv_bytes(inventory.config, spec, dtype) * heads / found for name, spec in CACHES.items()}
    return heads, size, sizes


def _windows(text: Any) -> tuple[int | None, ...]:
    """Of each layer that caches keys and values: how many tokens it keeps."""
    everywhere = None if getattr(text, "use_sliding_window", True) is False else getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        return (everywhere,) * text.num_hidden_layers
    cached = [kind for kind in kinds if "attention" in kind and "linear" not in kind]
    return tuple(getattr(text, WINDOWS[kind], None) if kind in WINDOWS else None for kind in cached)


def _served_dtype(inventory: ModelInventory) -> torch.dtype:
    return inventory.dtype if inventory.dtype.itemsize == SERVED else torch.bfloat16
