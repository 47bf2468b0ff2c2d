"""A quantized cache of keys and values, simulated in transformers' own models: what attention reads is what it holds.

Attention of transformers hands each new key and value to its cache's `update(keys, values, layer_idx)`, positions
already encoded, and attends to what that returns. A cache that rounds what it is given thus changes the model as one
that stores codes does. Rounded once, an entry is never rounded again. Kernels that also round the queries or the
probabilities (the fp8 attention of FlashAttention 3) do more than this.

    static  one scale for a layer, or for each of its heads; fp8 as vLLM writes its cache: e4m3(x / scale) clamped to
            +-448, times the scale
    token   each token of each head has a scale of its own, or one for `group_size` of its features; rounded as inputs
            of linears are (`grids.activations`)

Shapes: B = batch, H = key/value heads, T = tokens, D = features of a head.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PretrainedConfig

from quantkit.algorithms.observers import Histogram, choose_range
from quantkit.errors import UserError
from quantkit.grids.activations import fake_quantize, static_range
from quantkit.grids.elements import round_float_
from quantkit.types import ActivationSpec, InputRange, KVSpec

BINS = 1 << 12  # of a head's histogram: there are many heads


class KVRange(NamedTuple):
    """Static scales of a layer's keys and values, float32 [] or, for each head, [H]."""

    k_scale: Tensor
    v_scale: Tensor


class LayerSeen(NamedTuple):
    """What calibration showed of a layer: a histogram for each head's keys and values."""

    keys: list[Histogram]
    values: list[Histogram]


def quantize_kv(x_BHTD: Tensor, spec: KVSpec, scale: Tensor | None = None) -> Tensor:
    """Keys or values [B, H, T, D] rounded as `spec` says, in their dtype.

    scale  float32 [] or [H], where the spec is static; UserError where H is not the number of heads
    """
    if spec.per == "token":
        assert scale is None
        return fake_quantize(x_BHTD, ActivationSpec(spec.bits, spec.group_size, spec.symmetric, spec.element))
    assert scale is not None
    assert spec.symmetric, "static scales have no zero point"
    if scale.dim():
        H = x_BHTD.shape[1]
        if len(scale) != H:
            raise UserError(f"{len(scale)} scales of cached keys or values for {H} heads: they are another model's")
        scale = scale[:, None, None]
    if spec.element == "float":
        wide_BHTD = x_BHTD.to(torch.promote_types(x_BHTD.dtype, torch.float32))
        scale = scale.to(wide_BHTD.device, wide_BHTD.dtype)
        return round_float_(wide_BHTD / scale, spec.bits).mul_(scale).to(x_BHTD.dtype)
    return fake_quantize(x_BHTD, _static(spec), InputRange(scale))


class QuantizedCache(DynamicCache):
    """A DynamicCache that rounds each key and value once, when it comes in (see `round_entries`).

    config  the model's, for caches that keep no more of sliding layers than they need; models with layers other than
            attention need it

    Use a new one for each batch of sequences.
    """

    def __init__(
        self, spec: KVSpec, ranges: Mapping[int, KVRange] | None = None, config: PretrainedConfig | None = None
    ) -> None:
        super().__init__(config=config)
        round_entries(self, spec, ranges or {})


def round_entries(cache: Cache, spec: KVSpec, ranges: Mapping[int, KVRange]) -> None:
    """From now on `cache`, of any class, rounds each key and value as it comes in; a cache that does so stays as it is.

    ranges  the static scales by layer index, where the spec is static

    `cache.update` then raises UserError for a layer without scales.
    """
    if "update" not in vars(cache):
        cache.update = partial(_rounded_update, cache.update, spec, ranges)  # type: ignore[method-assign]


def _rounded_update(
    update: Callable[..., tuple[Tensor, Tensor]], spec: KVSpec, ranges: Mapping[int, KVRange],
    key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`update` of a cache, with the new keys and values [B, H, T, D] rounded before it."""
    scales: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
    if spec.per != "token":
        if layer_idx not in ranges:
            raise UserError(f"layer {layer_idx} has no scales for its {spec} cache: calibrate it")
        scales = ranges[layer_idx]
    keys, values = (quantize_kv(x, spec, s) for x, s in zip((key_states, value_states), scales, strict=True))
    return update(keys, values, layer_idx, *args, **kwargs)


class ObservingCache(DynamicCache):
    """A cache that leaves keys and values as they are and adds them to `seen` by layer index.

    Made anew for each batch of sequences, around the same `seen`.
    """

    def __init__(self, seen: dict[int, LayerSeen], config: PretrainedConfig | None = None) -> None:
        super().__init__(config=config)
        self.seen = seen

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer so far; the new ones [B, H, T, D] are counted."""
        H = key_states.shape[1]
        if layer_idx not in self.seen:
            self.seen[layer_idx] = LayerSeen(*([Histogram(BINS) for _ in range(H)] for _ in range(2)))
        for histograms, states_BHTD in zip(self.seen[layer_idx], (key_states, value_states), strict=True):
            for histogram, states_BTD in zip(histograms, states_BHTD.unbind(1), strict=True):
                histogram.add(states_BTD)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def choose_kv_scales(
    seen: LayerSeen,
    spec: KVSpec,
    method: Literal["absmax", "percentile", "mse"] = "absmax",
    percentile: float = 99.99,
) -> KVRange:
    """Static scales from what a layer showed: amax / 448 for fp8, with amax or what the method clips it to."""
    assert spec.per != "token"
    assert spec.symmetric
    static = _static(spec)

    def scale(histogram: Histogram) -> Tensor:
        low, high = choose_range(histogram, static, "minmax" if method == "absmax" else method, percentile)
        return static_range(low, high, static).scale

    def scales(histograms: list[Histogram]) -> Tensor:
        if spec.per == "head":
            return torch.stack([scale(histogram) for histogram in histograms])
        whole = Histogram(BINS)
        for histogram in histograms:
            whole.merge(histogram)
        return scale(whole)

    return KVRange(scales(seen.keys), scales(seen.values))


def check_seen(seen: Mapping[int, object], layers: Iterable[int], what: str) -> None:
    """UserError where one of the layers of `what` (a model's name) never gave its keys and values to the cache."""
    missing = [layer for layer in layers if layer not in seen]
    if missing:
        raise UserError(
            f"{what}: the attention of layers {', '.join(map(str, missing))} keeps no keys and values in transformers' "
            "cache, so that a quantized cache cannot be calibrated or simulated; remove kv_cache from the recipe"
        )


def attention_path(block: nn.Module, call: Callable[[Cache], object], config: PretrainedConfig | None = None) -> str:
    """The path within the block ("self_attn") of the module that owns its keys and values: whose scales are named so.

    call    runs the block with the cache it is given
    config  the model's, where layers other than attention keep states of their own in the cache

    It is the innermost module whose forward runs when the cache is updated. UserError where there is none.
    """
    running: list[str] = []
    owners: list[str] = []

    class Spy(DynamicCache):
        def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            owners.append(running[-1] if running else "")
            return super().update(*args, **kwargs)

    def enter(path: str) -> Callable[..., None]:
        return lambda *_: running.append(path)

    def leave(*_: object) -> None:
        running.pop()

    handles = []
    for path, module in block.named_modules():
        handles.append(module.register_forward_pre_hook(enter(path)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        call(Spy(config=config))
    finally:
        for handle in handles:
            handle.remove()
    if len(set(owners)) != 1:
        found = ", ".join(sorted(set(owners))) or "no module"
        raise UserError(
            f"{type(block).__name__}: {found} keeps keys and values in transformers' cache where one module should; "
            "remove kv_cache from the recipe"
        )
    return owners[0]


def _static(spec: KVSpec) -> ActivationSpec:
    return ActivationSpec(spec.bits, element=spec.element, dynamic=False)
