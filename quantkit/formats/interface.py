"""The interface of a format: how codes and scales lie in a file. No file is opened behind it."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from quantkit.types import KVSpec, QuantizedWeight, Scheme

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # suffix -> (dtype, shape)


class Format(Protocol):
    """What every entry of FORMATS has: a module of functions, or an object where one module serves several formats.

    MARK           the tensor that tells a quantized module from a dense one: its name is MODULE + "." + MARK
    SUFFIXES       all tensors a quantized module may have besides its bias
    SIGNED_SCALES  whether a scale may be negative
    KV_NAMES       names of the static key and value scales within an attention module; None: it holds none
    """

    @property
    def MARK(self) -> str: ...  # noqa: N802 (a constant of a module)

    @property
    def SUFFIXES(self) -> tuple[str, ...]: ...  # noqa: N802

    @property
    def SIGNED_SCALES(self) -> bool: ...  # noqa: N802

    @property
    def KV_NAMES(self) -> tuple[str, str] | None: ...  # noqa: N802

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype, /) -> torch.dtype:
        """What a weight stored as `dtype` gets its scales in."""
        ...

    def layout(self, shape: tuple[int, int], scheme: Scheme, scale_dtype: torch.dtype, /) -> Layout:
        """The tensors of a weight (N, K); UserError where the format cannot hold it."""
        ...

    def pack(self, q: QuantizedWeight, scheme: Scheme, /) -> dict[str, Tensor]:
        """Tensors by suffix, as `layout` announces them."""
        ...

    def check_tensors(self, tensors: Mapping[str, Tensor], scheme: Scheme, /) -> tuple[int, int]:
        """(N, K) of a module's tensors, which may be on the meta device; UserError where one of them does not fit."""
        ...

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme, /) -> QuantizedWeight:
        """The inverse of `pack`."""
        ...

    def config(self, schemes: Mapping[str, Scheme], ignored: Collection[str], kv: KVSpec | None, /) -> dict[str, Any]:
        """quantization_config; schemes by module, ignored: names of dense linears."""
        ...

    def files(self, quantization_config: Mapping[str, Any], /) -> dict[str, Any]:
        """Further JSON files that belong to it, by name."""
        ...

    def read_config(self, quantization_config: Mapping[str, Any], modules: Iterable[str], /) -> dict[str, Scheme]:
        """Scheme of those of `modules` that are quantized; UserError where the settings are foreign."""
        ...

    def read_kv(self, quantization_config: Mapping[str, Any], /) -> KVSpec | None:
        """The format of the cache; None: it is not quantized."""
        ...
