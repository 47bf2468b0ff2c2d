"""AutoAWQ's `gemm` layout: 4-bit integers packed along the out features (github.com/casper-hansen/AutoAWQ).

Per module: qweight int32 [K, N / 8], qzeros int32 [G, N / 8], scales float16 [G, N], w[k, n] = (q - z) * s with q and z
0 .. 15. A word holds eight neighbouring columns, bits [4i, 4i + 4) the column ORDER[i]. Symmetric weights have qzeros
too, all 8. There is no place for quantized inputs or a KV cache.

Scales may be negative: engines run these weights by the kernels they have for compressed-tensors' int4, and gptqmodel's
multiply by them like by any other (tests/interop/test_gptqmodel.py).

Shapes: N = out features, K = in features, G = groups of a row.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from quantkit.checkpoint.header import tag_of
from quantkit.errors import UserError
from quantkit.formats import common
from quantkit.formats.config.awq import (
    KV_NAMES,
    MARK,
    SIGNED_SCALES,
    SUFFIXES,
    config,
    files,
    read_config,
    read_kv,
    shape_of,
    stored,
)
from quantkit.types import QuantizedWeight, Scheme

__all__ = ["KV_NAMES", "MARK", "SIGNED_SCALES", "SUFFIXES", "config", "files", "read_config", "read_kv"]

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def scale_dtype(scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
    """float16, whatever the weight was stored as."""
    return torch.float16


def layout(shape: tuple[int, int], scheme: Scheme, scale_dtype: torch.dtype) -> common.Layout:
    """Suffix -> (dtype, shape) of what `pack` makes of a weight of shape (N, K); UserError if it cannot hold it."""
    return common.as_layout(stored(shape, scheme, tag_of(scale_dtype)))


def pack(q: QuantizedWeight, scheme: Scheme | None = None) -> dict[str, Tensor]:
    """The module's tensors by suffix, as `layout` announces them; UserError for scales float16 cannot hold."""
    N, K = q.codes_NK.shape
    layout((N, K), scheme or Scheme(q.spec), q.scale_NG.dtype)
    common.check_scales(q, "awq")
    zero_NG = torch.full_like(q.scale_NG, 8, dtype=torch.uint8) if q.zero_NG is None else q.zero_NG
    return {
        "qweight": _pack_columns(q.codes_NK),
        "qzeros": _pack_columns(zero_NG),
        "scales": q.scale_NG.T.contiguous(),
    }


def check_tensors(tensors: Mapping[str, Tensor], scheme: Scheme) -> tuple[int, int]:
    """(N, K) of a module's tensors; UserError where one of them does not fit the scheme."""
    return shape_of(common.headers_of(tensors), scheme)


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
    """The inverse of `pack`; UserError where a tensor does not fit, or symmetric weights have other zero points."""
    check_tensors(tensors, scheme)
    zero_NG = _unpack_columns(tensors["qzeros"])
    if scheme.weights.symmetric:
        if not (zero_NG == 8).all():
            raise UserError("zero_point is false in quantization_config, but qzeros holds others than 8")
        zero_NG = None
    codes_NK = _unpack_columns(tensors["qweight"])
    return QuantizedWeight(codes_NK, tensors["scales"].T.contiguous(), zero_NG, scheme.weights)


def _pack_columns(codes_NR: Tensor) -> Tensor:
    """uint8 [N, R] -> int32 [R, N / 8]."""
    N, R = codes_NR.shape
    eights = codes_NR.reshape(N // 8, 8, R)
    words_WR = torch.zeros(N // 8, R, dtype=torch.int32, device=codes_NR.device)
    for i, column in enumerate(ORDER):
        words_WR |= eights[:, column].int() << 4 * i
    return words_WR.T.contiguous()


def _unpack_columns(words_RW: Tensor) -> Tensor:
    """The inverse of `_pack_columns`."""
    R, W = words_RW.shape
    words_WR = words_RW.T.contiguous()
    eights = torch.empty(W, 8, R, dtype=torch.uint8, device=words_RW.device)
    for i, column in enumerate(ORDER):
        eights[:, column] = words_WR >> 4 * i & 15
    return eights.reshape(W * 8, R)
