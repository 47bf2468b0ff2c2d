"""W4A16: y = x W^T with 4-bit integer weights, bfloat16 or float16 activations, float32 sums.

Contract: codes uint8 [N, K] in 0..15; scale [N, G]; zero points uint8 [N, G] in 0..15 or None (symmetric: zero is 8);
groups of 16, 32, 64, 128 columns or one a row (-1). W = (codes - zero) * scale, rounded to the scales' dtype, then to
the activations', whatever the number of tokens. Any N, K, M.

sums=True is for activations that are whole numbers themselves (int8 codes, in 16 bits): W is (codes - zero) * scale,
not rounded, and y is float32. Groups of 128, or one a row.

From how many tokens on the weight is decoded once and multiplied by cuBLAS is a matter of configs.py.
"""

import torch
from torch import Tensor

from quantkit_kernels.layout import PackedWeight, pack, rounded_weight, unpack_groups, unpack_words
from quantkit_kernels.weight_only import linear


def pack_w4a16(
    codes_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor | None = None, *, group_size: int, dtype: torch.dtype,
    sums: bool = False,
) -> PackedWeight:  # fmt: skip
    """Repack once at load; dtype is the activations'. ValueError where a shape or dtype is not supported."""
    return pack(codes_NK, scale_NG, zero_NG, format="int4", group_size=group_size, dtype=dtype, sums=sums)


def w4a16_reference(x: Tensor, weight: PackedWeight) -> Tensor:
    """The definition, in float64: the kernel is right when it agrees with this up to x's rounding."""
    codes_NK = unpack_words(weight.words, "int4", weight.in_features).double()
    K = weight.in_features
    zero_NK = torch.full_like(codes_NK, 8)
    if weight.zero is not None:
        width = weight.group_size or 128
        magic = 128 if weight.dtype == torch.bfloat16 else 1024
        zero_NK = unpack_groups(weight.zero, -(-K // width)).double().repeat_interleave(width, 1)[:, :K] - magic
    return x.double() @ rounded_weight(codes_NK - zero_NK, weight).T


def w4a16(x: Tensor, weight: PackedWeight) -> Tensor:
    """x [..., K] -> [..., N] in x's dtype (sums: float32). ValueError where x does not fit the weight."""
    if weight.format != "int4":
        raise ValueError(f"w4a16 takes int4 weights, this one is {weight.format}")
    return linear("w4a16", x, weight)
