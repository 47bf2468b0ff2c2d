"""A quantized cache of keys and values, simulated in transformers' own models: what attention reads is what it holds.

Attention of transformers hands each new key and value to its cache's `update(keys, values, layer_idx)`, positions
already encoded, and attends to what that returns. A cache that rounds what it is given thus changes the model as one
that stores codes does. Rounded once, an entry is never rounded again. Kernels that also round the queries or the
probabilities (the fp8 attention of FlashAttention 3) do more than this.

    static  one scale for a layer, or for each of its heads; fp8 as vLLM writes its cache: e4m3(x / scale) clamped to
            +-448, times the scale
    token   each token of each head has a scale of its own, or one for `group_size` of its features; rounded as inputs
            of linears are (`grids.activations`), after constants of channels where the spec has them

Keys and values have formats of their own: a `CacheSpec`; one `KVSpec` stands for both.

Shapes: B = batch, H = key/value heads, T = tokens, D = features of a head.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig

from quantkit.cache_spec import CacheSpec
from quantkit.errors import UserError
from quantkit.grids.activations import UNCALIBRATED, KVRange, quantize_cache
from quantkit.types import KVSpec


class QuantizedCache(DynamicCache):
    """A DynamicCache that rounds each key and value once, when it comes in (see `round_entries`).

    ranges  what calibration found, by layer index, where the spec is calibrated
    config  the model's, for caches that keep no more of sliding layers than they need; models with layers other than
            attention need it

    Use a new one for each batch of sequences.
    """

    def __init__(
        self,
        spec: CacheSpec | KVSpec,
        ranges: Mapping[int, KVRange] | None = None,
        config: PretrainedConfig | None = None,
    ) -> None:
        super().__init__(config=config)
        round_entries(self, spec, ranges or {})


def round_entries(cache: Cache, spec: CacheSpec | KVSpec, ranges: Mapping[int, KVRange]) -> None:
    """From now on `cache`, of any class, rounds each key and value as it comes in; a cache that does so stays as it is.

    ranges  what calibration found, by layer index, where the spec is calibrated

    `cache.update` then raises UserError for a layer without scales.
    """
    if "update" not in vars(cache):
        spec = CacheSpec(spec, spec) if isinstance(spec, KVSpec) else spec
        cache.update = partial(_rounded_update, cache.update, spec, ranges)  # type: ignore[method-assign]


def _rounded_update(
    update: Callable[..., tuple[Tensor, Tensor]], spec: CacheSpec, ranges: Mapping[int, KVRange],
    key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`update` of a cache, with the new keys and values [B, H, T, D] rounded before it."""
    found = UNCALIBRATED
    if spec.calibrated:
        if layer_idx not in ranges:
            raise UserError(f"layer {layer_idx} has no scales for its {spec} cache: calibrate it")
        place = key_states.device  # the model may have been moved
        found = KVRange(*(None if scale is None else scale.to(place) for scale in ranges[layer_idx]))
    return update(*quantize_cache(key_states, value_states, spec, found), layer_idx, *args, **kwargs)
