"""AutoAWQ's `gemm` layout: 4-bit integers packed along the out features (github.com/casper-hansen/AutoAWQ).

Per module: qweight int32 [K, N / 8], qzeros int32 [G, N / 8], scales float16 [G, N], w[k, n] = (q - z) * s with q and z
0 .. 15. A word holds eight neighbouring columns, bits [4i, 4i + 4) the column ORDER[i]. Symmetric weights have qzeros
too, all 8. There is no place for quantized inputs or a KV cache.

Scales may be negative: engines run these weights by the kernels they have for compressed-tensors' int4, and gptqmodel's
multiply by them like by any other (tests/interop/test_gptqmodel.py).

Shapes: N = out features, K = in features, G = groups of a row.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import UserError
from quantkit.formats import common
from quantkit.types import KVSpec, QuantizedWeight, Scheme, TensorSpec

MARK = "qweight"
SUFFIXES = ("qweight", "qzeros", "scales")
SIGNED_SCALES = True
KV_NAMES: tuple[str, str] | None = None
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GROUP_SIZES = (-1, 16, 32, 64, 128)  # what gptqmodel, the reader behind transformers, has kernels for
SCALE_DTYPES = (torch.float16, torch.bfloat16)  # bfloat16 only in folders of others


def scale_dtype(scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
    """float16, whatever the weight was stored as."""
    return torch.float16


def layout(shape: tuple[int, int], scheme: Scheme, scale_dtype: torch.dtype) -> common.Layout:
    """Suffix -> (dtype, shape) of what `pack` makes of a weight of shape (N, K); UserError if it cannot hold it."""
    (N, K), spec = shape, scheme.weights
    if scheme.activations is not None:
        raise UserError(f"awq has no quantized inputs ({scheme.activations}); compressed-tensors holds {scheme}")
    if (spec.bits, spec.element, spec.scale_format, spec.scale_rows) != (4, "int", "float", 1):
        raise UserError(f"awq holds 4-bit integers with a scale per group of a row, not {spec}")
    if spec.group_size not in GROUP_SIZES:
        raise UserError(f"awq readers know the group sizes {', '.join(map(str, GROUP_SIZES))}, not {spec.group_size}")
    if N % 8:
        raise UserError(f"awq packs 8 out features in a word, and {N} is not a multiple of 8")
    if scale_dtype not in SCALE_DTYPES:
        raise UserError(f"awq scales are float16, not {scale_dtype}")
    G = spec.groups(K)
    return {
        "qweight": (torch.int32, (K, N // 8)),
        "qzeros": (torch.int32, (G, N // 8)),
        "scales": (scale_dtype, (G, N)),
    }


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
    common.require(tensors, set(SUFFIXES), scheme)
    K, words = common.matrix(tensors, "qweight")
    N = words * 8
    common.check_shapes(tensors, layout((N, K), scheme, tensors["scales"].dtype), (N, K), scheme)
    return N, K


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


def config(schemes: Mapping[str, Scheme], ignored: Iterable[str], kv: KVSpec | None) -> dict[str, Any]:
    """quantization_config for config.json; UserError for mixed schemes, a KV cache, or names readers would confuse."""
    ignored = sorted(set(ignored), key=common.natural)
    spec = common.sole_scheme(schemes, "awq").weights
    common.refuse_both(schemes, ignored)
    common.refuse_substrings(schemes, ignored, "awq")
    common.refuse_kv(kv, "awq")
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": spec.group_size,
        "zero_point": not spec.symmetric,
        "version": "gemm",
        "modules_to_not_convert": ignored,
    }


def files(quantization_config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """None: config.json says it all."""
    return {}


def read_config(quantization_config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Scheme]:
    """Which of the modules are stored quantized, and how; UserError for another layout than 4-bit gemm."""
    qc = quantization_config
    if qc.get("quant_method") != "awq":
        raise UserError(f"quant_method {qc.get('quant_method')!r} is not awq")
    if str(qc.get("version", "gemm")).lower() != "gemm":
        raise UserError(f"awq version {qc['version']!r} cannot be read, only 'gemm'")
    bits, size = qc.get("bits", qc.get("w_bit", 4)), qc.get("group_size", qc.get("q_group_size", 128))
    zero_point = qc.get("zero_point", True)
    if bits != 4 or not isinstance(size, int) or not isinstance(zero_point, bool):
        raise UserError(f"awq with bits {bits!r}, group_size {size!r} and zero_point {zero_point!r} cannot be read")
    scheme = Scheme(TensorSpec(4, size, not zero_point))
    dense = common.names_of(qc, "modules_to_not_convert")
    return {name: scheme for name in modules if not any(entry in name for entry in dense)}


def read_kv(quantization_config: Mapping[str, Any]) -> KVSpec | None:
    """None: the format has no place for one."""
    return None


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
