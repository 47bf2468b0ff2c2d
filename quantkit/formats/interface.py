"""The interface of a checkpoint format: how codes and scales lie in a file. Pure functions of tensors and JSON.

A format is anything with these names: a module, or one object for each of several dialects in one module.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from quantkit.formats.common import Layout
from quantkit.types import KVSpec, QuantizedWeight, Scheme


class Format(Protocol):
    """One checkpoint format.

    MARK           the tensor that tells a quantized module from a dense one: its name is MODULE + "." + MARK
    SUFFIXES       all tensors a quantized module may have besides its bias
    SIGNED_SCALES  whether a scale may be negative
    KV_NAMES       names of the static key and value scales within an attention module, None: the format has none
    """

    @property
    def MARK(self) -> str: ...  # noqa: N802

    @property
    def SUFFIXES(self) -> Sequence[str]: ...  # noqa: N802

    @property
    def SIGNED_SCALES(self) -> bool: ...  # noqa: N802

    @property
    def KV_NAMES(self) -> tuple[str, str] | None: ...  # noqa: N802

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        """What a weight stored as `dtype` gets its scales in."""
        ...

    def layout(self, shape: tuple[int, int], scheme: Scheme, scale_dtype: torch.dtype) -> Layout:
        """Suffix -> (dtype, shape) of a weight (N, K); UserError where the format cannot hold it."""
        ...

    def pack(self, q: QuantizedWeight, scheme: Scheme) -> dict[str, Tensor]:
        """A module's tensors by suffix, as `layout` announces them."""
        ...

    def check_tensors(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> tuple[int, int]:
        """(N, K) of a module's tensors; UserError where one of them does not fit."""
        ...

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        """The inverse of `pack`."""
        ...

    def config(self, schemes: Mapping[str, Scheme], ignored: Iterable[str], kv: KVSpec | None) -> dict[str, Any]:
        """The quantization_config of these modules, with the names of dense linears and the format of the cache."""
        ...

    def files(self, quantization_config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Further JSON files that belong to a quantization_config, by name."""
        ...

    def read_config(self, quantization_config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Scheme]:
        """Module -> Scheme of those of `modules` that are quantized; UserError where the config is foreign."""
        ...

    def read_kv(self, quantization_config: Mapping[str, Any]) -> KVSpec | None:
        """The format of the cache; None where it is not quantized."""
        ...
