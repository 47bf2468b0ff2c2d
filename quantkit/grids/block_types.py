"""What the blocks of each GGUF type hold, as numbers; how they become bytes is the format's concern.

    w = (d * sub_scale) * level(code) - offset * sub_offset          in float32, in this order, as every reader does

d (and offset) are float16 numbers of a block of G columns, sub_scale and sub_offset integers of a sub-block of `span`
columns. Types without sub-blocks (a span is a block) have ones there, types without an offset zeros.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

HALF_MAX = 65504.0  # the greatest float16
TINY = torch.finfo(torch.float32).tiny
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class BlockParameters(NamedTuple):
    """Parameters of a grid of blocks, all float32; see BlockScales.

    scale_NG and offset_NG may be finer than the float16 they are stored as: codes are then chosen by what they are
    here, as the reference quantizer of the types without sub-blocks does, and decoded by what is stored.
    """

    scale_NG: Tensor
    offset_NG: Tensor
    sub_scale_NS: Tensor
    sub_offset_NS: Tensor


@dataclass(frozen=True)
class BlockType:
    """columns of a block and `span` of a sub-block; level(code) = code - zero, or IQ4_LEVELS[code].

    sub_scale   least and greatest integer of a sub-block's scale; (1, 1) where there are none
    sub_offset  greatest integer of its offset, 0 where there is no offset; 1 where the block's own offset is all
    energy      what is added to w^2 in the weights of a search with importance, e * sqrt(energy + w^2): so many times
                the mean of w^2 over a block or a row; None: e alone
    """

    name: str
    columns: int
    span: int
    bits: int
    zero: int = 0
    codebook: bool = False
    sub_scale: tuple[int, int] = (1, 1)
    sub_offset: int = 0
    energy: tuple[float, Literal["block", "row"]] | None = None

    @property
    def top(self) -> int:
        """The greatest code."""
        return (1 << self.bits) - 1

    @property
    def low(self) -> float:
        """The least level."""
        return IQ4_LEVELS[0] if self.codebook else -self.zero

    @property
    def high(self) -> float:
        """The greatest level."""
        return IQ4_LEVELS[-1] if self.codebook else self.top - self.zero

    @property
    def nested(self) -> bool:
        """Whether a block has sub-blocks."""
        return self.span < self.columns

    @property
    def signed(self) -> bool:
        """Whether scales may be negative. With an offset that would only turn the codes round."""
        return self.sub_offset == 0

    @cached_property
    def levels(self) -> Tensor:
        """The levels of a codebook."""
        return torch.tensor(IQ4_LEVELS, dtype=torch.float32)

    @cached_property
    def half_steps(self) -> Tensor:
        """The code nearest to each half step from the least level to the greatest: all limits lie on half steps."""
        halves = torch.arange(2 * (IQ4_LEVELS[-1] - IQ4_LEVELS[0]) + 1) / 2 + IQ4_LEVELS[0]
        return torch.bucketize(halves, (self.levels[1:] + self.levels[:-1]) / 2, right=True)

    @cached_property
    def half_levels(self) -> Tensor:
        """`half_steps`, each code's level instead of the code."""
        return self.levels[self.half_steps]


_Energy = tuple[float, Literal["block", "row"]]
_ROW: _Energy = (2.0, "row")
_ONE: _Energy = (2.0, "block")
_TWO: _Energy = (4.0, "block")
BLOCK_TYPES = {
    type_.name: type_
    for type_ in (
        BlockType("Q4_0", 32, 32, 4, zero=8, energy=_ROW),
        BlockType("Q4_1", 32, 32, 4, sub_offset=1, energy=_ROW),
        BlockType("Q5_0", 32, 32, 5, zero=16, energy=_ROW),
        BlockType("Q5_1", 32, 32, 5, sub_offset=1, energy=_ROW),
        BlockType("Q8_0", 32, 32, 8, zero=128),
        BlockType("Q2_K", 256, 16, 2, sub_scale=(0, 15), sub_offset=15, energy=_ONE),
        BlockType("Q3_K", 256, 16, 3, zero=4, sub_scale=(-32, 31), energy=_TWO),
        BlockType("Q4_K", 256, 32, 4, sub_scale=(0, 63), sub_offset=63, energy=_TWO),
        BlockType("Q5_K", 256, 32, 5, sub_scale=(0, 63), sub_offset=63, energy=_TWO),
        BlockType("Q6_K", 256, 16, 6, zero=32, sub_scale=(-128, 127)),
        BlockType("IQ4_NL", 32, 32, 4, codebook=True, energy=_TWO),
        BlockType("IQ4_XS", 256, 32, 4, codebook=True, sub_scale=(-32, 31), energy=_TWO),
    )
}


def half(t: Tensor) -> Tensor:
    """Rounded to float16 and back to float32; what lies beyond its range becomes its end (NaN stays)."""
    return t.clamp(-HALF_MAX, HALF_MAX).half().float()


def stored(d_B: Tensor, unit_B: Tensor) -> Tensor:
    """The nearest numbers that are float16 once multiplied by a unit, a power of two."""
    return half(d_B * unit_B).div_(unit_B)


def inverse(t: Tensor) -> Tensor:
    """1 / t, 0 where that is not finite."""
    return t.reciprocal().nan_to_num_(0.0, 0.0, 0.0)


def levels_(x: Tensor, type_: BlockType) -> Tensor:
    """Each x to the nearest level, in place."""
    if type_.codebook:
        index = x.clamp_(type_.low, type_.high).sub_(type_.low).mul_(2).int()
        table = type_.half_levels.to(x.device, x.dtype)
        return torch.index_select(table, 0, index.reshape(-1), out=x.reshape(-1)).reshape(x.shape)
    return x.round_().clamp_(type_.low, type_.high)


def least_of(error_C: Tensor, *others_C: Tensor) -> list[Tensor]:
    """The least over the first dimension, and what stands at its place in the others (finite all of them).

    The others may have more dimensions before the last. Not `where`: it takes ten times as long as this.
    """
    best = [error_C[0], *(t[0] for t in others_C)]
    for i in range(1, len(error_C)):
        better = torch.lt(error_C[i], best[0]).to(error_C.dtype)
        best = [a.lerp(t[i], better) for a, t in zip(best, (error_C, *others_C), strict=True)]
    return best


def spread(t_NS: Tensor, span: int) -> Tensor:
    """[N, S * span]: each column of t_NS repeated."""
    return t_NS.repeat_interleave(span, 1)


def decode_blocks(codes_NK: Tensor, parameters: BlockParameters, type_: BlockType) -> Tensor:
    """The weights [N, K] (float32) of codes (uint8) [N, K]: equal to the last bit to what readers compute.

    d and offset are float16 numbers already, or what a damaged file has in their place: its Inf stays one.
    """
    N, K = codes_NK.shape
    scale_NS, offset_NS = sub_blocks(parameters, type_)
    shape = (N, K // type_.span, type_.span)
    if type_.codebook:
        level_NSg = torch.index_select(type_.levels.to(codes_NK.device), 0, codes_NK.flatten().int()).reshape(shape)
    else:
        level_NSg = codes_NK.reshape(shape).float().sub_(type_.zero)
    value_NSg = level_NSg.mul_(scale_NS[..., None])
    return (value_NSg.sub_(offset_NS[..., None]) if type_.sub_offset else value_NSg).reshape(N, K)


def sub_blocks(parameters: BlockParameters, type_: BlockType) -> tuple[Tensor, Tensor]:
    """Scale and offset [N, S] (float32) of every sub-block."""
    scale_NG, offset_NG, sub_scale_NS, sub_offset_NS = parameters
    repeat = type_.columns // type_.span
    return spread(scale_NG, repeat) * sub_scale_NS, spread(offset_NG, repeat) * sub_offset_NS
