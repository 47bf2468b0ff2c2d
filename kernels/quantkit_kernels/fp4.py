"""FP4 weight-only: y = x W^T with e2m1 weights, bfloat16 or float16 activations, float32 sums.

Contract: codes uint8 [N, K] in 0..15, sign in bit 3, magnitudes 0, .5, 1, 1.5, 2, 3, 4, 6 by the rest.
NVFP4: a float8_e4m3fn scale for each 16 columns, times one float32 for the tensor.
MXFP4: a power of two for each 32 columns, as uint8 exponent + 127 (e8m0; 255, its NaN, is refused). In bfloat16 the
products are exact; groups more than 2**80 below the largest one may round to zero. For float16 activations the scales
may span at most 2**14.
"""

import torch
from torch import Tensor

from quantkit_kernels.checks import check, check_tensor
from quantkit_kernels.layout import PackedWeight, pack, rounded_weight, unpack_words
from quantkit_kernels.weight_only import linear

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def pack_nvfp4(codes_NK: Tensor, scale_NG: Tensor, global_scale: float, *, dtype: torch.dtype) -> PackedWeight:
    """global_scale multiplies (checkpoints that store its inverse are inverted by who reads them)."""
    check_tensor("NVFP4 codes", codes_NK, (torch.uint8,), (None, None))
    N, K = codes_NK.shape
    check(K % 16 == 0, f"NVFP4 weight of shape {N}x{K}: groups of 16 do not divide {K}")
    check_tensor("NVFP4 scale", scale_NG, (torch.float8_e4m3fn,), (N, K // 16))
    bad = int((scale_NG.view(torch.uint8) & 127 == 127).sum())
    check(bad == 0, f"NVFP4 weight of shape {N}x{K} has {bad} scales that are NaN")
    scale = scale_NG.to(torch.float32)
    return pack(codes_NK, scale, None, format="fp4", group_size=16, dtype=dtype, global_scale=global_scale)


def pack_mxfp4(codes_NK: Tensor, exponent_NG: Tensor, *, dtype: torch.dtype) -> PackedWeight:
    """Exponents are taken relative to the tensor's largest, which the finished sums are multiplied by."""
    check_tensor("MXFP4 codes", codes_NK, (torch.uint8,), (None, None))
    N, K = codes_NK.shape
    check(K % 32 == 0, f"MXFP4 weight of shape {N}x{K}: groups of 32 do not divide {K}")
    check_tensor("MXFP4 scale", exponent_NG, (torch.uint8,), (N, K // 32))
    check(int(exponent_NG.max()) < 255, f"MXFP4 weight of shape {N}x{K} has scales of 255, which is NaN")
    top = int(exponent_NG.max())
    spread = top - int(exponent_NG.min())
    limit = 14 if dtype == torch.float16 else 254
    check(spread <= limit, f"MXFP4 weight of shape {N}x{K}: scales span 2**{spread}; {dtype} takes up to 2**{limit}")
    scale = torch.ldexp(torch.ones(exponent_NG.shape, device=codes_NK.device), exponent_NG.int() - top)
    packed = pack(codes_NK, scale, None, format="fp4", group_size=32, dtype=dtype)
    row_scale = torch.full((N,), 2.0 ** (top - 127), device=codes_NK.device)
    return PackedWeight(packed.words, packed.scale, None, row_scale, "fp4", K, 32, dtype)


def fp4_reference(x: Tensor, weight: PackedWeight) -> Tensor:
    """The definition, in float64."""
    codes_NK = unpack_words(weight.words, "fp4", weight.in_features).long()
    table = torch.tensor(E2M1 + tuple(-v for v in E2M1), dtype=torch.float64, device=x.device)
    return x.double() @ rounded_weight(table[codes_NK], weight).T


def fp4_linear(x: Tensor, weight: PackedWeight) -> Tensor:
    """x [..., K] -> [..., N] in x's dtype. ValueError where x does not fit the weight."""
    if weight.format != "fp4":
        raise ValueError(f"fp4_linear takes fp4 weights, this one is {weight.format}")
    return linear("fp4_linear", x, weight)
