"""A model of transformers that reads its keys and values from a quantized cache."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache

from quantkit.cache_spec import CacheSpec
from quantkit.errors import UserError
from quantkit.grids.activations import KVRange
from quantkit.runtime.quantized_cache import round_entries

NAMES = ("cache", "past_key_values")  # of the argument, of newer and of older transformers


def cache_argument(model: Any) -> str | None:
    """What a model of transformers calls the argument (and the output) that is its cache; None where it has none."""
    taken = inspect.signature(model.forward).parameters
    return next((known for known in NAMES if known in taken), None)


class CachedModel:
    """A model that is called like one of transformers, each call with a new cache that rounds what enters it.

    spec    None: keys and values stay as they are computed, whatever the model's folder says
    ranges  what calibration found, by layer index, where the spec is calibrated
    make    another empty cache than transformers' own, of the model's config
    """

    def __init__(
        self,
        model: Any,
        name: str,
        spec: CacheSpec | None,
        ranges: Mapping[int, KVRange] | None = None,
        make: Callable[[Any], Cache] = lambda config: DynamicCache(config=config),
    ) -> None:
        self._make = make
        self._model, self._name, self._spec, self._ranges = model, name, spec or CacheSpec(None, None), ranges or {}
        self.device, self.config = model.device, model.config
        self.argument = cache_argument(model)

    def fresh_cache(self) -> Cache:
        """An empty cache that rounds what enters it."""
        cache = self._make(self.config)
        round_entries(cache, self._spec, self._ranges)
        return cache

    def __call__(self, input_ids: Tensor, use_cache: bool = False, **inputs: Any) -> Any:
        """The model's output; UserError where it keeps no keys and values in the cache it is given."""
        cache = self.fresh_cache()
        out = None
        if self.argument is not None:
            out = self._model(input_ids=input_ids, use_cache=True, **inputs, **{self.argument: cache})
        if out is None or all(getattr(layer, "keys", None) is None for layer in cache.layers):
            raise UserError(
                f"{self._name}: transformers keeps no keys and values of this model, so none can be quantized\n"
                "hint: leave out --kv-cache"
            )
        return out
