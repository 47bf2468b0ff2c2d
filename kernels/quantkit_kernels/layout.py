"""The planes layout: weights repacked once at load so that a kernel decodes a word with a few bit operations.

K is cut into blocks of 128 (the last one padded with codes that decode to zero or meet a zero scale). In a block,
int32 word p of a row holds the codes of k = p, P + p, 2P + p, ...: P = 16 words of 8 codes (4 bits) or 32 words of
4 codes (8 bits). So "code i of word p" is an element-wise function of the words, whatever register layout a compiler
picks, and the words of neighbouring rows of one block are neighbours in memory: words_BNP[block, n, p].

Where the bits of a code lie in its word depends on the format, see PLACES. Integers lie plainly. Floats lie so that
one AND gives a bfloat16 with the code's sign, and its exponent and mantissa at the bottom of the exponent field and
the top of the mantissa: code value = that bfloat16 * 2**120 (e4m3) or 2**126 (e2m1).

Scales (and zero points, as 128 + zero or 1024 + zero, what the integer decoders leave) lie as [steps, N, groups of a
step], a step being two blocks, so that a row's scales of a step are one load.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quantkit_kernels.checks import check, check_same_device, check_tensor

Format = Literal["int4", "int8", "fp8", "fp4"]
BLOCK_K = 128
STEP_K = 256
BITS = {"int4": 4, "int8": 8, "fp8": 8, "fp4": 4}
GROUPS = (16, 32, 64, 128)

_HALF = {  # for each code of a 16-bit half word, where its bits lie, lowest bit first
    "int4": ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15)),
    "int8": ((0, 1, 2, 3, 4, 5, 6, 7), (8, 9, 10, 11, 12, 13, 14, 15)),
    "fp8": ((4, 5, 6, 7, 8, 9, 10, 15), (0, 1, 2, 3, 12, 13, 14, 11)),
    "fp4": ((6, 7, 8, 15), (3, 4, 5, 12), (0, 1, 2, 9), (10, 11, 13, 14)),
}
PLACES = {f: half + tuple(tuple(b + 16 for b in code) for code in half) for f, half in _HALF.items()}


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight [N, K] in the planes layout.

    words       int32 [blocks, N, P]
    scale       [steps, N, groups of a step], or [N] for one scale a row; None where row_scale is all there is. In the
                activations' dtype, which then holds it exactly, else as it came: W is rounded to that dtype first
    zero        like scale, see the module's text; None for symmetric integers and floats
    row_scale   float32 [N]: multiplies the finished sums; None for one
    group_size  columns that share a scale: 16, 32, 64, 128; 0 for one scale a row
    sums        W is the codes, never rounded; scale (float32, groups of 128) and row_scale multiply sums of them
    """

    words: Tensor
    scale: Tensor | None
    zero: Tensor | None
    row_scale: Tensor | None
    format: Format
    in_features: int
    group_size: int
    dtype: torch.dtype
    sums: bool = False

    @property
    def out_features(self) -> int:
        """N."""
        return self.words.shape[1]


def blocks(in_features: int) -> int:
    """Blocks of a row, always an even number: a step is two."""
    return -(-in_features // STEP_K) * 2


def pack_words(codes_NK: Tensor, format: Format) -> Tensor:
    """uint8 codes [N, K] -> int32 words [blocks, N, P]. int8 codes are the bytes of two's complement."""
    N, K = codes_NK.shape
    places = PLACES[format]
    pad = blocks(K) * BLOCK_K - K
    neutral = 8 if format == "int4" else 0
    codes = torch.nn.functional.pad(codes_NK, (0, pad), value=neutral)
    codes = codes.reshape(N, -1, len(places), BLOCK_K // len(places)).permute(1, 0, 2, 3)
    words = torch.zeros_like(codes[:, :, 0], dtype=torch.int32, memory_format=torch.contiguous_format)
    for i, code_places in enumerate(places):
        code = codes[:, :, i].to(torch.int32)
        for bit, place, count in runs(code_places):
            words |= ((code >> bit) & ((1 << count) - 1)) << place
    return words


def runs(code_places: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """(first bit of the code, where it lies, how many bits follow each other in both)."""
    found: list[tuple[int, int, int]] = []
    for bit, place in enumerate(code_places):
        if found and sum(found[-1][1:]) == place:
            found[-1] = (*found[-1][:2], found[-1][2] + 1)
        else:
            found.append((bit, place, 1))
    return found


def unpack_words(words: Tensor, format: Format, in_features: int) -> Tensor:
    """The codes pack_words was given."""
    planes = []
    for code_places in PLACES[format]:
        code = torch.zeros_like(words)
        for bit, place, count in runs(code_places):
            code |= ((words >> place) & ((1 << count) - 1)) << bit
        planes.append(code)
    codes = torch.stack(planes, 2).to(torch.uint8)  # [blocks, N, planes, P]
    return codes.permute(1, 0, 2, 3).reshape(words.shape[1], -1)[:, :in_features].contiguous()


def pack_groups(values_NG: Tensor, group_size: int) -> Tensor:
    """Scales or zeros [N, G] -> [steps, N, groups of a step], padded with zeros."""
    N, G = values_NG.shape
    per_step = STEP_K // group_size
    padded = torch.nn.functional.pad(values_NG, (0, -G % per_step))
    return padded.reshape(N, -1, per_step).permute(1, 0, 2).contiguous()


def scale_columns(weight: PackedWeight) -> Tensor:
    """The scales of all columns, [N, K] or [N, 1] in float64, without row_scale."""
    if weight.scale is None:
        return torch.ones(weight.out_features, 1, dtype=torch.float64, device=weight.words.device)
    if weight.scale.dim() == 1:
        return weight.scale.double()[:, None]
    groups = unpack_groups(weight.scale, -(-weight.in_features // weight.group_size)).double()
    return groups.repeat_interleave(weight.group_size, 1)[:, : weight.in_features]


def rounded_weight(steps_NK: Tensor, weight: PackedWeight) -> Tensor:
    """The definition of W, in float64: steps (codes less their zero points, or what floats stand for) times scales,
    rounded to the scales' dtype and to the activations'; then, or where sums are scaled only, times row_scale."""
    w_NK = steps_NK * scale_columns(weight)
    if weight.scale is not None and not weight.sums:
        w_NK = w_NK.float().to(weight.scale.dtype).to(weight.dtype).double()
    return w_NK if weight.row_scale is None else w_NK * weight.row_scale.double()[:, None]


def unpack_groups(values: Tensor, groups: int) -> Tensor:
    """[N, G] of what pack_groups made."""
    return values.permute(1, 0, 2).reshape(values.shape[1], -1)[:, :groups]


def pack(
    codes_NK: Tensor,
    scale_NG: Tensor,
    zero_NG: Tensor | None,
    *,
    format: Format,
    group_size: int,
    dtype: torch.dtype,
    global_scale: float = 1.0,
    sums: bool = False,
) -> PackedWeight:
    """Repack plain codes. group_size -1 is one group a row ("channel"). sums: for activations that are codes, too.

    ValueError where shapes, dtypes or the group size are not supported.
    """
    name = f"{format} weight"
    check(dtype in (torch.bfloat16, torch.float16), f"{name}: activations are bfloat16 or float16, got {dtype}")
    check_tensor(f"{name} codes", codes_NK, (torch.uint8,), (None, None))
    N, K = codes_NK.shape
    check(N > 0 and K > 0, f"{name} of shape {N}x{K} is empty")
    channel = group_size in (-1, K) and scale_NG.shape[1:] == (1,)
    smallest = BLOCK_K // len(PLACES[format])
    allowed = [g for g in GROUPS if g >= smallest]
    check(channel or group_size in allowed, f"{name}: group size {group_size}; supported: {allowed} and -1 (channel)")
    check(channel or K % group_size == 0, f"{name} of shape {N}x{K}: {group_size=} does not divide {K}")
    G = 1 if channel else K // group_size
    check_tensor(f"{name} scale", scale_NG, (torch.bfloat16, torch.float16, torch.float32), (N, G))
    check(format.startswith("int") or zero_NG is None, f"{name}: floats have no zero points")
    if zero_NG is not None:
        check_tensor(f"{name} zero", zero_NG, (torch.uint8,), (N, G))
    check_same_device(codes=codes_NK, scale=scale_NG, zero=zero_NG)

    row_scale, scale, zero, short_NG = None, None, None, scale_NG.to(dtype)
    if sums:
        check(channel or group_size == BLOCK_K, f"{name}: sums of groups of {group_size}; supported: {BLOCK_K} and -1")
        scale_NG = scale_NG.float()
    elif scale_NG.dtype == torch.float32 and torch.equal(short_NG.float(), scale_NG):
        scale_NG = short_NG
    check(format != "fp4" or scale_NG.dtype == dtype, f"{name}: {dtype} does not hold its scales exactly")
    if channel:
        group_size, row = 0, scale_NG.reshape(N).contiguous()
        row_scale, scale = (row, None) if sums else (None, row)
    else:
        scale = pack_groups(scale_NG, group_size)
    if global_scale != 1.0:
        row_scale = torch.full((N,), global_scale, device=codes_NK.device)
    if zero_NG is not None:
        magic = 128 if dtype == torch.bfloat16 else 1024
        zeros = zero_NG.to(dtype) + magic  # exact: 8 bits above 128, 11 above 1024
        if channel:  # as groups of 128 that all have the row's zero point
            zero = pack_groups(zeros.expand(N, -(-K // BLOCK_K)).contiguous(), BLOCK_K)
        else:
            zero = pack_groups(zeros, group_size)
    return PackedWeight(pack_words(codes_NK, format), scale, zero, row_scale, format, K, group_size, dtype, sums)
