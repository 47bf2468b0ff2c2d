"""Activations to int8 or float8 e4m3 with scales from the tokens at hand, alone or behind RMSNorm or SiLU(gate) * up.

Contract: x bfloat16, float16 or float32 [M, K] (for silu_mul [M, 2K]: gate, then up), rows contiguous.
  v      = x, or x * rsqrt(mean(x**2) + eps) * norm_weight, or silu(gate) * up, in float32 throughout
  scale  = max|v| / 127 (int8) or / 448 (fp8), of the row (group -1: [M]) or of each 128 columns ([M, ceil(K / 128)],
           stored column by column, as w8a8 reads it); 1 where all v are zero
  codes  = v * (1 / scale), rounded to nearest even
"""

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit_kernels.checks import check_same_device, check_tensor
from quantkit_kernels.common import check_gpu, native_fp8

Fuse = Literal["none", "rmsnorm", "silu_mul"]
GROUP = 128
MAX_K = 65536  # a row is held in registers


def quantize_reference(
    x: Tensor, norm_weight: Tensor | None, eps: float, fuse: Fuse, element: str, group: int
) -> tuple[Tensor, Tensor]:
    """The definition, in float32."""
    v = x.float()
    if fuse == "rmsnorm":
        assert norm_weight is not None
        v = v * torch.rsqrt(v.square().mean(1, keepdim=True) + eps) * norm_weight.float()
    elif fuse == "silu_mul":
        gate, up = v.chunk(2, 1)
        v = gate * torch.sigmoid(gate) * up
    M, K = v.shape
    width = K if group == -1 else group
    padded = torch.nn.functional.pad(v, (0, -K % width)).reshape(M, -1, width)
    peak = padded.abs().amax(2)
    scale = torch.where(peak == 0, torch.ones_like(peak), peak * (1 / 127 if element == "int8" else 1 / 448))
    scaled = (padded * (1 / scale)[:, :, None]).reshape(M, -1)[:, :K]
    codes = scaled.round().to(torch.int8) if element == "int8" else scaled.clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, scale[:, 0] if group == -1 else scale


@triton.jit
def e4m3_code(value):
    """The byte of float32 values within +-448, rounded to nearest even."""
    bits = value.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
    small = (tl.abs(value) * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 15  # 2**23: the mantissa's last bit is 1
    code = tl.where(magnitude < 0x3C800000, small, normal)  # below 2**-6 codes are subnormal
    return (code | ((bits >> 24) & 128)).to(tl.uint8)


@triton.jit
def round_even(value):
    """float32 values below 2**22 in magnitude, rounded to integers: beyond 2**23 the last mantissa bit is 1."""
    return (value + 12582912.0) - 12582912.0


@triton.jit
def quantize_kernel(
    x_ptr, norm_weight_ptr, codes_ptr, scale_ptr, stride_x, stride_sm, stride_sg, eps,
    K: tl.constexpr, FUSE: tl.constexpr, INT8: tl.constexpr, NATIVE: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row. GROUPS: 1, or BLOCK // 128."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    inside = k < K
    v = tl.load(x_ptr + row * stride_x + k, mask=inside, other=0.0).to(tl.float32)
    if FUSE == "rmsnorm":
        v *= tl.rsqrt(tl.sum(v * v, 0) / K + eps)
        v *= tl.load(norm_weight_ptr + k, mask=inside, other=0.0).to(tl.float32)
    elif FUSE == "silu_mul":
        v *= tl.sigmoid(v)
        v *= tl.load(x_ptr + row * stride_x + K + k, mask=inside, other=0.0).to(tl.float32)
    TOP: tl.constexpr = 1 / 127 if INT8 else 1 / 448
    grouped = v.reshape(GROUPS, BLOCK // GROUPS)
    peak = tl.max(tl.abs(grouped), 1)
    scale = tl.where(peak == 0.0, 1.0, peak * TOP)
    scaled = (grouped * (1.0 / scale)[:, None]).reshape(BLOCK)
    g = tl.arange(0, GROUPS)
    tl.store(scale_ptr + row * stride_sm + g * stride_sg, scale, mask=g * (BLOCK // GROUPS) < K)
    if INT8:
        codes = round_even(tl.minimum(tl.maximum(scaled, -127.0), 127.0)).to(tl.int8)
    else:
        scaled = tl.minimum(tl.maximum(scaled, -448.0), 448.0)
        codes = scaled.to(tl.float8e4nv) if NATIVE else e4m3_code(scaled)
    tl.store(codes_ptr + row * K + k, codes, mask=inside)


@torch.library.custom_op("quantkit_kernels::quantize_activations", mutates_args=())
def quantize_op(
    x: Tensor, norm_weight: Tensor | None, eps: float, fuse: str, element: str, group: int
) -> tuple[Tensor, Tensor]:
    """The operator torch.compile and export see; `quantize_activations` is its checked front."""
    codes, scale = _outputs(x, fuse, element, group)
    M, K = codes.shape
    if M == 0:
        return codes, scale
    native = native_fp8(x.device)
    block = triton.next_power_of_2(max(K, GROUP))
    stored = codes if native or element == "int8" else codes.view(torch.uint8)
    quantize_kernel[(M,)](
        x, norm_weight if norm_weight is not None else x, stored, scale, x.stride(0), scale.stride(0),
        scale.stride(1) if group != -1 else 0, eps,
        K=K, FUSE=fuse, INT8=element == "int8", NATIVE=native, GROUPS=1 if group == -1 else block // GROUP,
        BLOCK=block, num_warps=min(16, max(1, block // 1024)), enable_fp_fusion=True,
    )  # fmt: skip
    return codes, scale


def _outputs(x: Tensor, fuse: str, element: str, group: int) -> tuple[Tensor, Tensor]:
    """Empty codes and scales."""
    M, K = x.shape[0], x.shape[1] // (2 if fuse == "silu_mul" else 1)
    codes = torch.empty(M, K, dtype=torch.int8 if element == "int8" else torch.float8_e4m3fn, device=x.device)
    if group == -1:
        return codes, torch.empty(M, dtype=torch.float32, device=x.device)
    return codes, torch.empty(-(-K // GROUP), M, dtype=torch.float32, device=x.device).T


@quantize_op.register_fake
def _(x, norm_weight, eps, fuse, element, group):
    return _outputs(x, fuse, element, group)


def quantize_activations(
    x: Tensor,
    *,
    element: Literal["int8", "fp8"],
    group: int = -1,
    fuse: Fuse = "none",
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """(codes [M, K], scales) of x; ValueError where a dtype, shape or combination is not supported."""
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    if x.dim() != 2 or x.dtype not in kinds or x.stride(1) != 1:
        raise ValueError(
            f"quantize_activations: x is {x.dtype} {tuple(x.shape)} with strides {x.stride()}; "
            "supported: bfloat16, float16, float32 [M, K] with contiguous rows"
        )
    if element not in ("int8", "fp8"):
        raise ValueError(f"quantize_activations: element is {element!r}; supported: int8, fp8")
    if group not in (-1, GROUP):
        raise ValueError(f"quantize_activations: group is {group}; supported: -1 (row) and {GROUP}")
    if fuse not in ("none", "rmsnorm", "silu_mul"):
        raise ValueError(f"quantize_activations: fuse is {fuse!r}; supported: none, rmsnorm, silu_mul")
    if fuse == "silu_mul" and x.shape[1] % 2:
        raise ValueError(f"silu_mul: x is {tuple(x.shape)}, gate and up need even columns")
    K = x.shape[1] // (2 if fuse == "silu_mul" else 1)
    if not 0 < K <= MAX_K:
        raise ValueError(f"quantize_activations: {K} columns; supported: 1 to {MAX_K}")
    if (norm_weight is not None) != (fuse == "rmsnorm"):
        raise ValueError("norm_weight goes with fuse='rmsnorm', and only with it")
    if norm_weight is not None:
        check_tensor("norm_weight", norm_weight, kinds, (K,))
        check_same_device(x=x, norm_weight=norm_weight)
    check_gpu("quantize_activations", x)
    return quantize_op(x, norm_weight, eps, fuse, element, group)
