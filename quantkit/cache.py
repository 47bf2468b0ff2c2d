"""Scales of a quantized key and value cache: where they are named in the checkpoint, and their calibration.

A block's attention hands its keys and values to whatever cache it is called with; one that only looks gathers their
histograms, one that rounds is what evaluation runs (runtime/kv.py).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from quantkit.blocks import BlockCall, Skeleton
from quantkit.calibration import States
from quantkit.checkpoint.writer import TensorLayout
from quantkit.errors import UserError
from quantkit.plan import Plan
from quantkit.recipe import KVCache
from quantkit.runtime.kv import ObservingCache, attention_path, check_seen, choose_kv_scales
from quantkit.trial import once_per_structure, trial_ids
from quantkit.types import KVSpec

METHODS = {"minmax": "absmax", "percentile": "percentile", "mse": "mse"}


def cache_places(skeleton: Skeleton) -> list[int | str]:
    """Where each block takes its cache (see `BlockCall.cache_place`), from a call of the model that uses one.

    UserError naming the block that is given none.
    """
    _, calls = skeleton.first_call(trial_ids(skeleton), use_cache=True)
    places = []
    for index, call in enumerate(calls):
        place = call.cache_place()
        if place is None:
            kind = type(skeleton.blocks[index]).__name__
            raise UserError(
                f"{skeleton.prefix(index)[:-1]}: transformers gives this {kind} no cache of keys and values; "
                "remove kv_cache from the recipe"
            )
        places.append(place)
    return places


def scale_layouts(spec: KVSpec, names: tuple[str, str] | None, plan: Plan, skeleton: Skeleton) -> list[TensorLayout]:
    """Two scales per block, in block order; UserError where the format has no names, or attention no cache for them."""
    places = cache_places(skeleton)

    def owner(index: int, block: nn.Module, hidden: Tensor, call: BlockCall) -> str:
        def run(cache: Cache) -> None:
            call.with_cache(places[index], cache).run(block, hidden)

        return attention_path(block, run, skeleton.model.config)

    paths = once_per_structure(skeleton, owner)
    if spec.per == "token":
        return []
    if names is None:
        raise UserError(f"output.format cannot hold the scales of a {spec} cache; compressed-tensors and modelopt can")
    shape = (1,)
    if spec.per == "head":
        text = skeleton.model.config.get_text_config()
        shape = (getattr(text, "num_key_value_heads", None) or text.num_attention_heads, 1, 1)
    return [
        TensorLayout(f"{module}.{name}", torch.float32, shape)
        for module in (_on_file(plan, skeleton, index, path) for index, path in enumerate(paths))
        for name in names
    ]


def _on_file(plan: Plan, skeleton: Skeleton, index: int, path: str) -> str:
    """The checkpoint's name of a block's attention module, as its own linears show it."""
    for linear in plan.of_block(index):
        rest = linear.site.name.removeprefix(f"{path}.")
        if rest != linear.site.name and linear.name.endswith(f".{rest}"):
            return linear.name.removesuffix(f".{rest}")
    return f"{skeleton.prefix(index)}{path}"


def calibrate(
    states: States, block: nn.Module, index: int, place: int | str, spec: KVSpec, options: KVCache
) -> tuple[Tensor, Tensor]:
    """Scales of a block's keys and values on all calibration states, in the shapes of `scale_layouts`.

    place: where the block takes its cache (`cache_places`).
    """
    seen: dict[int, Any] = {}
    for _, hidden, call in states.batches(index):
        call.with_cache(place, ObservingCache(seen)).run(block, hidden)
    check_seen(seen, [next(iter(seen), index)], f"block {index}")
    found = choose_kv_scales(next(iter(seen.values())), spec, METHODS[options.observer])  # type: ignore[arg-type]
    k_scale, v_scale = ((t.reshape(-1, 1, 1) if spec.per == "head" else t.reshape(1)) for t in found)
    return k_scale, v_scale
