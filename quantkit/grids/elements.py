"""What one element stands for before its scale: integers minus their zero point, e4m3 and e2m1 floats.

Codes are uint8; an integer's is the number itself, a float's its bit pattern (sign, exponent, mantissa). "Steps" are
the numbers that codes stand for, in units of the scale: w = step * scale.

Sources: e4m3fn arXiv:2209.05433; e2m1 and the power-of-two scale e8m0: OCP Microscaling Formats (MX) v1.0.
"""

import torch
from torch import Tensor

from quantkit.types import FP4_MAX, FP8_MAX

FP8 = torch.float8_e4m3fn
EMAX = {4: 2, 8: 8}  # by bits: exponent of the largest e2m1 (6 = 1.5 * 2^2) and e4m3 (448 = 1.75 * 2^8) number
FP4_STEPS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # by code


def round_float_(steps: Tensor, bits: int) -> Tensor:
    """Round to the nearest e4m3 (bits 8) or e2m1 (bits 4) number, ties to the even mantissa, in place.

    Clamped first: a cast of what lies beyond 448 gives NaN. Zeros come out positive.
    """
    if bits == 8:
        return steps.copy_(_from_e4m3(steps.clamp_(-FP8_MAX, FP8_MAX).to(FP8).view(torch.uint8))).add_(0.0)
    steps.clamp_(-FP4_MAX, FP4_MAX)
    size = steps.abs()
    ulp = (size >= 2).to(steps.dtype).mul_(0.5).add_(0.5).add_((size >= 4).to(steps.dtype))  # 0.5, from 2 on 1, then 2
    return steps.div_(ulp).round_().mul_(ulp).add_(0.0)


def float_codes(steps: Tensor, bits: int) -> Tensor:
    """The bit patterns (uint8) of steps that are e4m3 or e2m1 numbers."""
    if bits == 8:
        return steps.to(FP8).view(torch.uint8)
    twice = steps.abs().mul_(2)  # 0 1 2 3 4 6 8 12
    index = torch.minimum(torch.minimum(twice, twice * 0.5 + 2), twice * 0.25 + 4)
    return index.to(torch.uint8).bitwise_or_(torch.signbit(steps).to(torch.uint8).mul_(8))


def float_steps(codes: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The numbers that bit patterns (uint8) stand for."""
    if bits == 8:
        return _from_e4m3(codes).to(dtype)
    table = torch.tensor(FP4_STEPS, dtype=dtype, device=codes.device)
    return table.index_select(0, codes.reshape(-1).int()).reshape(codes.shape)


def _from_e4m3(codes: Tensor) -> Tensor:
    """float32 numbers of e4m3 codes (not NaN), through float16: six times as fast as torch's own cast.

    Shifted, the exponent and mantissa are those of a float16 whose exponent counts from 15 where e4m3's counts from 7.
    """
    bits = (codes.view(torch.int8).to(torch.int16) << 7).bitwise_and_(-0x4001)
    return bits.view(torch.float16).float().mul_(256.0)


def encode_float(steps: Tensor, bits: int, codes: Tensor) -> None:
    """Write the codes of the nearest e4m3 or e2m1 numbers into `codes` (uint8); steps are overwritten.

    An e4m3 zero keeps its sign, as with any cast: removing it would cost as much as the cast.
    """
    if bits == 8:
        codes.view(FP8).copy_(steps.clamp_(-FP8_MAX, FP8_MAX))
    else:
        codes.copy_(float_codes(round_float_(steps, bits), bits))
