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

from quantkit.errors import UserError
from quantkit.formats.bitstream import pack_words, unpack_words, words_for
from quantkit.formats.common import Layout
from quantkit.formats.compressed_tensors.config import check, config, files, layout_name, read_config, read_kv
from quantkit.grids.dequantize import (
    collapse,
    expand,
)
from quantkit.grids.elements import (
    FP8,
)
from quantkit.types import ActivationRange, QuantizedWeight, Scheme, TensorSpec

__all__ = ["check", "config", "files", "layout_name", "read_config", "read_kv"]

MARK = "weight_scale"
SUFFIXES = (
    *("weight_packed", "weight", "weight_scale", "weight_shape", "weight_zero_point", "weight_global_scale"),
    *("input_scale", "input_zero_point", "input_global_scale"),
)
SIGNED_SCALES = True  # a negative scale is multiplied like any other by every reader that was tried
KV_NAMES = ("k_scale", "v_scale")
SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def scale_dtype(scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
    """Of packed integers the weight's own (vLLM allocates exactly that), else float32."""
    return dtype if layout_name(scheme) == "pack-quantized" and dtype in SCALE_DTYPES else torch.float32


def layout(shape: tuple[int, int], scheme: Scheme, scale_dtype: torch.dtype) -> Layout:
    """Suffix -> (dtype, shape) of what `pack` makes of a weight of shape (N, K); UserError if it cannot hold it."""
    (N, K), spec, name = shape, scheme.weights, layout_name(scheme)
    G = spec.groups(K)
    if scale_dtype not in SCALE_DTYPES:
        raise UserError(f"compressed-tensors scales are bfloat16, float16 or float32, not {scale_dtype}")
    rows = (1,) if spec.scale_rows == -1 else (-(-N // spec.scale_rows), G)
    tensors: Layout
    if name == "pack-quantized":
        tensors = {
            "weight_packed": (torch.int32, (N, words_for(K, spec.bits))),
            "weight_scale": (scale_dtype, (N, G)),
            "weight_shape": (torch.int64, (2,)),
        }
        if not spec.symmetric:
            tensors["weight_zero_point"] = (torch.int32, (words_for(N, spec.bits), G))
    elif name == "int-quantized":
        tensors = {"weight": (torch.int8, (N, K)), "weight_scale": (scale_dtype, rows)}
    elif name in ("float-quantized", "naive-quantized"):
        tensors = {"weight": (FP8, (N, K)), "weight_scale": (scale_dtype, rows)}
    else:
        if spec.bits == 4 and K % 2:
            raise UserError(f"two 4-bit floats share a byte: {K} input features are odd")
        weight: Layout = {"weight": (FP8, (N, K))} if spec.bits == 8 else {"weight_packed": (torch.uint8, (N, K // 2))}
        tensors = {**weight, "weight_scale": (FP8 if spec.scale_format == "e4m3" else torch.uint8, (N, G))}
        if spec.scale_format == "e4m3":
            tensors["weight_global_scale"] = (torch.float32, (1,))
    acts = scheme.activations
    if acts is not None and acts.calibrated:
        tensors["input_scale" if acts.scale_format == "float" else "input_global_scale"] = (torch.float32, (1,))
        if not acts.symmetric:
            tensors["input_zero_point"] = (torch.int8, (1,))
    return tensors


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
    spec = scheme.weights
    if "weight_scale" not in tensors:
        raise UserError(
            f"{scheme} needs the tensors weight_scale and more; there are {', '.join(sorted(tensors)) or 'none'}"
        )
    N, K = _shape(tensors, spec)
    plain = spec.scale_format == "float"
    expected = layout((N, K), scheme, tensors["weight_scale"].dtype if plain else torch.float32)
    if tensors.keys() | {"weight_shape"} != expected.keys() | {"weight_shape"}:
        found = ", ".join(sorted(tensors)) or "none"
        raise UserError(f"{scheme} needs the tensors {', '.join(sorted(expected))}; there are {found}")
    for suffix, (dtype, shape) in expected.items():
        if suffix == "weight_shape":
            continue
        found = tensors[suffix]
        one = shape == (1,) and found.numel() == 1  # 0-d or [1] are both about
        if (tuple(found.shape) != shape and not one) or found.dtype != dtype:
            raise UserError(
                f"{suffix} is {found.dtype} {list(found.shape)}, expected {dtype} {list(shape)} "
                f"for a weight of {N} x {K} in {scheme}"
            )
    return N, K


def _shape(tensors: Mapping[str, Tensor], spec: TensorSpec) -> tuple[int, int]:
    """(N, K) as one of the tensors tells it."""
    if "weight_shape" in tensors:
        shape = tensors["weight_shape"]
        if shape.numel() != 2 or shape.is_floating_point() or int(shape.min()) < 1:
            raise UserError(f"weight_shape holds {shape.tolist()}, expected out and in features")
        N, K = shape.flatten().tolist()
        return N, K
    if spec.element == "int" and "weight_packed" in tensors and spec.group_size != -1:
        N, G = tensors["weight_scale"].shape
        return N, G * spec.group_size
    for suffix, codes in (("weight", 1), ("weight_packed", 2)):
        if suffix in tensors and tensors[suffix].dim() == 2 and tensors[suffix].dtype != torch.int32:
            N, columns = tensors[suffix].shape
            return N, columns * codes
    raise UserError(f"{spec} needs the tensors weight_shape or weight; there are {', '.join(sorted(tensors))}")


def pack_nibbles(codes_NK: Tensor) -> Tensor:
    """4-bit codes [N, K] to bytes [N, K / 2], the even column in the low nibble."""
    return codes_NK[:, ::2] | (codes_NK[:, 1::2] << 4)


def unpack_nibbles(bytes_NP: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    return torch.stack([bytes_NP & 0xF, bytes_NP >> 4], 2).flatten(1)
