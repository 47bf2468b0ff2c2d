"""GGUF's blocks column by column: a step is a level, the parameters that move are those of a sub-block.

Shapes: N = out features, S = sub-blocks of a row, G = blocks of a row, B = some columns, g = columns of a sub-block.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit.grids.block_types import BlockParameters, BlockType, half, inverse


class BlockColumns:
    """The ColumnGrid of a GGUF type. span is a sub-block; decoded values are float32.

    The scale of a sub-block and its offset may move alone: their integers where the type has sub-blocks, else the
    block's own float16 numbers.
    """

    value_dtype = torch.float32

    def __init__(self, type_: BlockType, parameters: BlockParameters, dtype: torch.dtype) -> None:
        self.type_, self.span, self.dtype = type_, type_.span, dtype
        d_NG, offset_NG, sub_scale_NS, sub_offset_NS = parameters
        if type_.codebook:
            self.levels, self.half_levels = (t.to(d_NG.device, dtype) for t in (type_.levels, type_.half_levels))
            self.half_steps = type_.half_steps.to(d_NG.device, torch.uint8)
        self.per_block = type_.columns // type_.span
        self.d_GN, self.offset_GN = half(d_NG).mT.contiguous(), half(offset_NG).mT.contiguous()
        copy = torch.contiguous_format  # always a copy, even of parameters that already lie like this
        self.sub_scale_SN, self.sub_offset_SN = (t.mT.clone(memory_format=copy) for t in (sub_scale_NS, sub_offset_NS))
        repeated = [t.repeat_interleave(self.per_block, 0) for t in (self.d_GN, self.offset_GN)]
        self.min_SN = repeated[1] * self.sub_offset_SN  # what is subtracted, float32
        scale_SN = repeated[0] * self.sub_scale_SN
        self.scale_SN = scale_SN.to(dtype)  # a product of a float16 and a small integer: exact
        self.inverse_SN = inverse(self.scale_SN)  # for a codebook in half steps above the least level
        self.inverse_SN *= 2 if type_.codebook else 1
        self.shift_SN = self.inverse_SN * self.min_SN if type_.sub_offset else torch.empty_like(self.scale_SN)
        if type_.codebook:
            self.shift_SN.fill_(-2 * type_.low)

    def nearest_(self, wanted_N: Tensor, k: int, step_N: Tensor, value_N: Tensor) -> None:
        s, type_ = k // self.span, self.type_
        if type_.sub_offset or type_.codebook:
            torch.addcmul(self.shift_SN[s], wanted_N, self.inverse_SN[s], out=step_N)
        else:
            torch.mul(wanted_N, self.inverse_SN[s], out=step_N)
        if type_.codebook:
            index_N = step_N.clamp_(0, len(self.half_levels) - 1).int()
            torch.index_select(self.half_levels, 0, index_N, out=step_N)
        else:
            step_N.round_().clamp_(type_.low, type_.high)
        torch.mul(step_N, self.scale_SN[s], out=value_N)  # rounded to float32 once: as `decode` does
        if type_.sub_offset:
            value_N.sub_(self.min_SN[s])

    def values(self, step_gN: Tensor, k: int) -> Tensor:
        s = k // self.span
        value_gN = (step_gN * self.scale_SN[s]).float()
        return (value_gN.sub_(self.min_SN[s]) if self.type_.sub_offset else value_gN).to(step_gN.dtype)

    def codes(self, step_BN: Tensor, columns_B: Tensor) -> Tensor:
        if self.type_.codebook:
            index = ((step_BN - self.type_.low) * 2).int().flatten()
            return torch.index_select(self.half_steps, 0, index).view(step_BN.shape)
        return (step_BN + self.type_.zero).to(torch.uint8)

    def steps(self, codes_BN: Tensor, columns_B: Tensor) -> Tensor:
        if self.type_.codebook:
            return torch.index_select(self.levels, 0, codes_BN.flatten().int()).view(codes_BN.shape)
        return codes_BN.to(self.dtype).sub_(self.type_.zero)

    def slopes(self, step_gN: Tensor, k: int) -> Sequence[Tensor]:
        g, offset = k // self.type_.columns, self.type_.sub_offset
        if not self.type_.nested:
            return (step_gN, step_gN.new_full((), -1).expand_as(step_gN)) if offset else (step_gN,)
        slopes = (step_gN * self.d_GN[g].to(self.dtype),)
        return (*slopes, (-self.offset_GN[g].to(self.dtype)).expand_as(step_gN)) if offset else slopes

    def shift(self, k: int, i: int, by_N: Tensor) -> Tensor:
        part, at, (low, high) = self._parameter(k, i)
        old_N = part[at].clone()
        moved_N = old_N + by_N.float()
        if self.type_.nested:
            self._store(k, i, moved_N.round_().clamp_(low, high))
        else:
            self._store(k, i, half(moved_N))
        return old_N

    def put_back(self, k: int, i: int, old_N: Tensor, where_N: Tensor) -> None:
        part, at, _ = self._parameter(k, i)
        self._store(k, i, torch.where(where_N, old_N, part[at]))
        s, type_ = k // self.span, self.type_
        if i == 0:
            inverse_N = torch.reciprocal(self.scale_SN[s], out=self.inverse_SN[s]).nan_to_num_(0.0, 0.0, 0.0)
            if type_.codebook:
                inverse_N.mul_(2)
        if type_.sub_offset:
            torch.mul(self.inverse_SN[s], self.min_SN[s], out=self.shift_SN[s])

    def put(self, k: int, parameters: BlockParameters) -> None:
        raise AssertionError("the sub-blocks of a block share its scale: one of them cannot be fitted alone")

    def parameters(self) -> BlockParameters:
        parts = (self.d_GN, self.offset_GN, self.sub_scale_SN, self.sub_offset_SN)
        return BlockParameters(*(t.mT.contiguous() for t in parts))

    def _parameter(self, k: int, i: int) -> tuple[Tensor, int, tuple[int, int]]:
        """Where the i-th parameter of the span at k is kept, and its least and greatest integer."""
        if self.type_.nested:
            limits = (0, self.type_.sub_offset) if i else self.type_.sub_scale
            return (self.sub_offset_SN if i else self.sub_scale_SN), k // self.span, limits
        return (self.offset_GN if i else self.d_GN), k // self.span, (0, 0)

    def _store(self, k: int, i: int, new_N: Tensor) -> None:
        """Put the i-th parameter of the span at k, and what `values` needs of it."""
        s, g = k // self.span, k // self.type_.columns
        part, at, _ = self._parameter(k, i)
        part[at] = new_N
        if i:
            torch.mul(self.offset_GN[g], self.sub_offset_SN[s], out=self.min_SN[s])
        else:
            torch.mul(self.d_GN[g], self.sub_scale_SN[s], out=self.scale_SN[s])
