"""compressed-tensors, the tensors of each of its layouts (github.com/vllm-project/compressed-tensors); ct_config has
what it writes into config.json. Which layout a scheme gets is `layout_name`.

pack-quantized        integers of 2 to 8 bits: weight_packed int32 [N, ceil(K * bits / 32)], weight_scale [N, G],
                      weight_shape int64 [2] = (N, K); asymmetric: weight_zero_point int32 [ceil(N * bits / 32), G].
                      The format defines signed codes and zero points but stores both with 2**(bits - 1) added: the
                      very unsigned numbers of a QuantizedWeight. Codes are packed along a row, zero points along a
                      column, both as in `bitstream`
int-quantized         weight int8 [N, K] (signed), weight_scale [N, 1] or [1]
float-quantized       weight float8_e4m3fn [N, K], weight_scale [N, 1], [1] or [ceil(N / 128), ceil(K / 128)];
naive-quantized       the same for weights whose inputs are not quantized
nvfp4-pack-quantized  weight_packed uint8 [N, K / 2], the even column in the low nibble, weight_scale float8_e4m3fn
                      [N, K / 16], weight_global_scale float32 [1], which DIVIDES
mxfp4-pack-quantized  weight_packed as above, weight_scale uint8 [N, K / 32]: the exponent plus 127
mxfp8-quantized       weight float8_e4m3fn [N, K], weight_scale likewise

Static inputs add input_scale [1] (asymmetric: input_zero_point int8 [1], signed), NVFP4 inputs input_global_scale [1],
which divides too. compressed-tensors 0.17 unpacks words of 3, 5, 6 or 7 bits as padded; from 0.18 on, and in vLLM's
kernels, they are the dense stream written here.

Shapes: N = out features, K = in features, G = groups of a row.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from quantkit.checkpoint.header import tag_of
from quantkit.errors import UserError
from quantkit.formats import common
from quantkit.formats.bitstream import pack_words, unpack_words
from quantkit.formats.compressed_tensors.config import check, config, files, layout_name, read_config, read_kv
from quantkit.formats.compressed_tensors.headers import KV_NAMES, MARK, SIGNED_SCALES, SUFFIXES, shape_of, stored
from quantkit.grids.dequantize import (
    collapse,
    expand,
)
from quantkit.grids.elements import (
    FP8,
)
from quantkit.types import ActivationRange, QuantizedWeight, Scheme

__all__ = [
    "KV_NAMES",
    "MARK",
    "SIGNED_SCALES",
    "SUFFIXES",
    "check",
    "config",
    "files",
    "layout_name",
    "read_config",
    "read_kv",
]

SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def scale_dtype(scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
    """Of packed integers the weight's own (vLLM allocates exactly that), else float32."""
    return dtype if layout_name(scheme) == "pack-quantized" and dtype in SCALE_DTYPES else torch.float32


def layout(shape: tuple[int, int], scheme: Scheme, scale_dtype: torch.dtype) -> common.Layout:
    """Suffix -> (dtype, shape) of what `pack` makes of a weight of shape (N, K); UserError if it cannot hold it."""
    return common.as_layout(stored(shape, scheme, tag_of(scale_dtype)))


def pack(q: QuantizedWeight, scheme: Scheme | None = None) -> dict[str, Tensor]:
    """The module's tensors by suffix, as `layout` announces them."""
    spec, name = q.spec, layout_name(scheme or Scheme(q.spec))
    scale = collapse(q.scale_NG, spec)
    scale = scale.reshape(1) if spec.scale_rows == -1 else scale.contiguous()
    if name == "pack-quantized":
        if scale.dtype not in SCALE_DTYPES:
            raise UserError(f"compressed-tensors scales are bfloat16, float16 or float32, not {scale.dtype}")
        tensors = {
            "weight_packed": pack_words(q.codes_NK, spec.bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor(q.codes_NK.shape, dtype=torch.int64),
        }
        if q.zero_NG is not None:
            tensors["weight_zero_point"] = pack_words(q.zero_NG.T, spec.bits).T.contiguous()
    elif name == "int-quantized":
        tensors = {"weight": q.codes_NK.bitwise_xor(0x80).view(torch.int8), "weight_scale": scale}
    elif spec.scale_format == "float":
        tensors = {"weight": q.codes_NK.contiguous().view(FP8), "weight_scale": scale}
    elif spec.scale_format == "e4m3":
        assert q.global_scale is not None
        tensors = {
            "weight_packed": pack_nibbles(q.codes_NK),
            "weight_scale": (scale / q.global_scale).to(FP8),
            "weight_global_scale": torch.tensor([1 / q.global_scale], dtype=torch.float32),
        }
    else:
        exponent = {"weight_scale": (torch.frexp(scale).exponent + 126).to(torch.uint8)}
        weight = pack_nibbles(q.codes_NK) if spec.bits == 4 else q.codes_NK.contiguous().view(FP8)
        tensors = {"weight_packed" if spec.bits == 4 else "weight": weight} | exponent
    if q.input is not None:
        one = q.input.scale.float().reshape(1)
        tensors |= {"input_global_scale": 1 / one} if spec.scale_format == "e4m3" else {"input_scale": one}
        if q.input.zero is not None:
            tensors["input_zero_point"] = torch.tensor([q.input.zero - 128], dtype=torch.int8)
    return tensors


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
    """The inverse of `pack`; UserError naming the tensor whose dtype or shape does not fit the scheme."""
    N, K = check_tensors(tensors, scheme)
    spec, name, global_scale, zero_NG = scheme.weights, layout_name(scheme), None, None
    stored = tensors["weight_scale"]
    if name == "pack-quantized":
        codes_NK = unpack_words(tensors["weight_packed"], spec.bits, K)
        if not spec.symmetric:
            zero_NG = unpack_words(tensors["weight_zero_point"].T, spec.bits, N).T.contiguous()
    elif name == "int-quantized":
        codes_NK = tensors["weight"].contiguous().view(torch.uint8).bitwise_xor(0x80)
    elif spec.bits == 4:
        codes_NK = unpack_nibbles(tensors["weight_packed"])
    else:
        codes_NK = tensors["weight"].contiguous().view(torch.uint8)
    if spec.scale_format == "e4m3":
        global_scale = 1 / tensors["weight_global_scale"].float().item()
        stored = stored.float() * torch.tensor(global_scale, dtype=torch.float32, device=stored.device)
    elif spec.scale_format == "e8m0":
        stored = torch.ldexp(torch.ones(stored.shape, device=stored.device), stored.int() - 127)
    elif spec.scale_rows == -1:
        stored = stored.reshape(1, 1)
    return QuantizedWeight(codes_NK, expand(stored, spec, N), zero_NG, spec, global_scale, _input(tensors))


def _input(tensors: Mapping[str, Tensor]) -> ActivationRange | None:
    if "input_global_scale" in tensors:
        return ActivationRange(1 / tensors["input_global_scale"].float().reshape([]))
    if "input_scale" not in tensors:
        return None
    zero = int(tensors["input_zero_point"].item()) + 128 if "input_zero_point" in tensors else None
    return ActivationRange(tensors["input_scale"].float().reshape([]), zero)


def check_tensors(tensors: Mapping[str, Tensor], scheme: Scheme) -> tuple[int, int]:
    """(N, K) of a module's tensors; UserError where one of them does not fit the scheme."""
    return shape_of(common.headers_of(tensors), scheme)


def pack_nibbles(codes_NK: Tensor) -> Tensor:
    """4-bit codes [N, K] to bytes [N, K / 2], the even column in the low nibble."""
    return codes_NK[:, ::2] | (codes_NK[:, 1::2] << 4)


def unpack_nibbles(bytes_NP: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    return torch.stack([bytes_NP & 0xF, bytes_NP >> 4], 2).flatten(1)
