"""W8A16: y = x W^T with 8-bit weights (integers or float8 e4m3), bfloat16 or float16 activations, float32 sums.

Contract: W = element * scale. Elements are int8 [N, K] or float8_e4m3fn [N, K] without NaN; scales [N, G] for groups
of 32, 64 or 128 columns, [N, 1] for rows, or for float8 [ceil(N / 128), ceil(K / 128)] for blocks (block=True).
W is rounded to the scales' dtype, then to the activations', whatever the number of tokens.

sums=True: as in `w4a16`.
"""

import torch
from torch import Tensor

from quantkit_kernels.checks import check, check_tensor
from quantkit_kernels.layout import BLOCK_K, PackedWeight, pack, rounded_weight, unpack_words
from quantkit_kernels.weight_only import linear


def pack_w8a16(
    elements_NK: Tensor, scale_NG: Tensor, *, group_size: int = -1, block: bool = False, dtype: torch.dtype,
    sums: bool = False,
) -> PackedWeight:  # fmt: skip
    """Repack once at load; dtype is the activations'. ValueError where a shape or dtype is not supported."""
    check_tensor("W8A16 weight", elements_NK, (torch.int8, torch.float8_e4m3fn), (None, None))
    N, K = elements_NK.shape
    format = "int8" if elements_NK.dtype == torch.int8 else "fp8"
    codes_NK = elements_NK.view(torch.uint8)
    if format == "fp8":
        bad = int(((codes_NK & 127) == 127).sum())
        check(bad == 0, f"W8A16 weight of shape {N}x{K} holds {bad} NaN; only finite float8 values are supported")
    if block:
        check(format == "fp8", f"W8A16 weight of shape {N}x{K}: 128x128 blocks are for float8, not {elements_NK.dtype}")
        wanted = (-(-N // BLOCK_K), -(-K // BLOCK_K))
        check_tensor("W8A16 block scale", scale_NG, (torch.bfloat16, torch.float16, torch.float32), wanted)
        scale_NG = scale_NG.repeat_interleave(BLOCK_K, 0)[:N].contiguous()
        pad = -K % BLOCK_K  # the last block may be cut short: zeros beyond it
        codes_NK = torch.nn.functional.pad(codes_NK, (0, pad))
        packed = pack(codes_NK, scale_NG, None, format=format, group_size=BLOCK_K, dtype=dtype)
        return PackedWeight(packed.words, packed.scale, None, None, format, K, BLOCK_K, dtype)
    return pack(codes_NK, scale_NG, None, format=format, group_size=group_size, dtype=dtype, sums=sums)


def w8a16_reference(x: Tensor, weight: PackedWeight) -> Tensor:
    """The definition, in float64."""
    codes_NK = unpack_words(weight.words, weight.format, weight.in_features)
    w_NK = codes_NK.view(torch.int8 if weight.format == "int8" else torch.float8_e4m3fn).double()
    return x.double() @ rounded_weight(w_NK, weight).T


def w8a16(x: Tensor, weight: PackedWeight) -> Tensor:
    """x [..., K] -> [..., N] in x's dtype. ValueError where x does not fit the weight."""
    if weight.format not in ("int8", "fp8"):
        raise ValueError(f"w8a16 takes int8 and fp8 weights, this one is {weight.format}")
    return linear("w8a16", x, weight)
