"""Scales of a quantized key and value cache: where they are named in the checkpoint, and their calibration.

A block's attention hands its keys and values to whatever cache it is called with; one that only looks gathers what
scales are chosen from: histograms for static ones, the channels' moments for constants of channels.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PretrainedConfig

from quantkit.algorithms.activation_range import Histogram, choose_range
from quantkit.cache_spec import CacheSpec
from quantkit.checkpoint.quantization_config import CHANNEL_NAMES
from quantkit.checkpoint.writer import TensorLayout
from quantkit.errors import UserError
from quantkit.grids.activations import KVRange, _static, static_range
from quantkit.model.block_trial import (
    once_per_structure,
    trial_ids,
)
from quantkit.model.streamed_model import (
    BlockCall,
    StreamedModel,
)
from quantkit.quantization.calibration.hidden_states import HiddenStates
from quantkit.quantization.calibration.kv_channels import ChannelCache, choose_channels
from quantkit.recipe.number_formats import KVCache
from quantkit.types import KVSpec

BINS = 1 << 12  # of a head's histogram: there are many heads

METHODS = {"minmax": "absmax", "percentile": "percentile", "mse": "mse"}


def cache_places(streamed: StreamedModel) -> list[int | str]:
    """Where each block takes its cache (see `BlockCall.cache_place`), from a call of the model that uses one.

    UserError naming the block that is given none.
    """
    _, calls = streamed.first_call(trial_ids(streamed), use_cache=True)
    places = []
    for index, call in enumerate(calls):
        place = call.cache_place()
        if place is None:
            kind = type(streamed.blocks[index]).__name__
            raise UserError(
                f"{streamed.prefix(index)[:-1]}: transformers gives this {kind} no cache of keys and values; "
                "remove kv_cache from the recipe"
            )
        places.append(place)
    return places


def scale_layouts(spec: CacheSpec, names: tuple[str, str] | None, streamed: StreamedModel) -> list[list[TensorLayout]]:
    """What calibration finds for each block's cache; UserError where a block's attention is given no cache.

    names: what the format calls the static scales of keys and values within an attention module; None: it has none.
    """
    places = cache_places(streamed)

    def owner(index: int, block: nn.Module, hidden: Tensor, call: BlockCall) -> tuple[str, CacheShape]:
        def run(cache: Cache) -> None:
            call.with_cache(places[index], cache).run(block, hidden)

        path, spy = attention_path(block, run, streamed.model.config), ShapeCache()
        run(spy)
        assert spy.seen is not None, "attention_path raises where no cache is updated"
        return path, spy.seen

    modules = (
        (_checkpoint_name(streamed, index, path), shape)
        for index, (path, shape) in enumerate(once_per_structure(streamed, owner))
    )
    return [block_scales(spec, names, module, shape) for module, shape in modules]


class CacheShape(NamedTuple):
    """Heads of a layer's cache, and the features of its keys and of its values."""

    heads: int
    key_features: int
    value_features: int


class ShapeCache(DynamicCache):
    """A cache that notes the shapes of what it is given."""

    seen: CacheShape | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T, D] as a DynamicCache keeps them."""
        self.seen = CacheShape(key_states.shape[1], key_states.shape[-1], value_states.shape[-1])
        return super().update(key_states, value_states, *args, **kwargs)


def block_scales(spec: CacheSpec, names: tuple[str, str] | None, module: str, shape: CacheShape) -> list[TensorLayout]:
    """The tensors of one attention module's cache: of its keys, then of its values, where they are calibrated.

    names: of static scales, None only where there are none.
    """
    found = []
    for at, (side, features) in enumerate(((spec.keys, shape.key_features), (spec.values, shape.value_features))):
        if side is None or not side.calibrated:
            continue
        if side.channels:
            found.append(TensorLayout(f"{module}.{CHANNEL_NAMES[at]}", torch.float32, (2, shape.heads, features)))
            continue
        assert names is not None, "resolve refuses formats without a place for the scales"
        sizes = (1,) if side.per == "tensor" else (shape.heads, 1, 1)
        found.append(TensorLayout(f"{module}.{names[at]}", torch.float32, sizes))
    return found


def _checkpoint_name(streamed: StreamedModel, index: int, path: str) -> str:
    """The checkpoint's name of a block's attention module, as the tensors of its parameters show it."""
    inside = f"{streamed.prefix(index)}{path}."
    for param, pieces in streamed.sources.items():
        rest = param.removeprefix(inside)
        if rest != param and pieces[0].name.endswith(f".{rest}"):
            return pieces[0].name.removesuffix(f".{rest}")
    return inside.removesuffix(".")


def calibrate(
    states: HiddenStates, block: nn.Module, index: int, place: int | str, spec: CacheSpec, options: KVCache
) -> KVRange:
    """What a block's keys and values need from all calibration states, as `quantize_kv` takes it.

    place: where the block takes its cache (`cache_places`).
    """
    static = spec.shared if spec.shared is not None and not spec.shared.channels else None
    seen: dict[int, Any] = {}
    for _, hidden, call in states.batches(index):
        cache = ChannelCache(seen) if static is None else ObservingCache(seen)
        call.with_cache(place, cache).run(block, hidden)
    check_seen(seen, [next(iter(seen), index)], f"block {index}")
    layer = next(iter(seen.values()))
    if static is None:
        return choose_channels(layer, spec)
    side = options.sides[0]
    return choose_kv_scales(layer, static, METHODS["minmax" if side is None else side.observer])  # type: ignore[arg-type]


class LayerSeen(NamedTuple):
    """What calibration showed of a layer: a histogram for each head's keys and values."""

    keys: list[Histogram]
    values: list[Histogram]


class ObservingCache(DynamicCache):
    """A cache that leaves keys and values as they are and adds them to `seen` by layer index.

    Use a new one for each batch of sequences, around the same `seen`.
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
