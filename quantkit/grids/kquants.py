"""Grids of GGUF's blocks: fit by search, or by the reference quantizer's own rule where that is the custom.

Without an importance Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 (which ignores one) get the scales and codes of the reference
quantizer, to the byte: it divides by a scale that is not yet rounded to float16, so such parameters are not either.

Shapes: N = out features, K = in features, G = blocks of a row, S = sub-blocks of a row, g = columns of a sub-block.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.grids.block_columns import BlockColumns
from quantkit.grids.block_types import (
    BLOCK_TYPES,
    HALF_MAX,
    BlockParameters,
    BlockType,
    decode_blocks,
    half,
    sub_blocks,
)
from quantkit.grids.kquant_search import CHUNK, search
from quantkit.types import BlockScales, QuantizedWeight, TensorSpec


@dataclass(frozen=True, slots=True)
class BlockGrid:
    """Grid of one GGUF type, spec.block_type."""

    spec: TensorSpec

    @property
    def type_(self) -> BlockType:
        """What its blocks hold."""
        return BLOCK_TYPES[self.spec.block_type]

    @property
    def row_wise(self) -> bool:
        """A row's blocks are its own."""
        return True

    def for_tensors(self, weights: Sequence[Tensor], importance_K: Tensor | None = None) -> "BlockGrid":
        """This grid: weights that an engine fuses have nothing in common."""
        return self

    def fit(self, w_NK: Tensor, importance_K: Tensor | None = None) -> BlockParameters:
        """Scales (and offsets) for a weight [N, K] of any float dtype; NaN and Inf in a block make its scale NaN.

        importance_K, [K] and non-negative, weights each column's squared error. Scales beyond the range of float16
        become its end. A row's result does not depend on the rows beside it. UserError where K is no multiple of the
        block.
        """
        self.spec.groups(w_NK.shape[1])
        reference = not self.type_.nested and not self.type_.codebook
        if reference and (importance_K is None or self.type_.name == "Q8_0"):
            return _reference(w_NK, self.type_)
        return search(w_NK, importance_K, self.type_)

    def encode(self, w_NK: Tensor, parameters: BlockParameters) -> Tensor:
        """Codes (uint8) [N, K] of the nearest numbers of each block."""
        N, K = w_NK.shape
        codes_NK = torch.empty(N, K, dtype=torch.uint8, device=w_NK.device)
        scale_NS, offset_NS = sub_blocks(parameters, self.type_)
        inverse_NS = (1 / scale_NS).nan_to_num_(0.0, 0.0, 0.0)
        rows = max(1, CHUNK // K)
        for start in range(0, N, rows):
            inside = slice(start, start + rows)
            x_nSg = w_NK[inside].float().reshape(-1, K // self.type_.span, self.type_.span)
            if self.type_.sub_offset:
                x_nSg = x_nSg + offset_NS[inside, :, None]
            codes_NK[inside] = _codes_(x_nSg * inverse_NS[inside, :, None], self.type_).reshape(-1, K)
        return codes_NK

    def decode(self, codes_NK: Tensor, parameters: BlockParameters) -> Tensor:
        """The numbers [N, K] (float32) that codes stand for."""
        stored = parameters._replace(scale_NG=half(parameters.scale_NG), offset_NG=half(parameters.offset_NG))
        return decode_blocks(codes_NK, stored, self.type_)

    def weight(self, codes_NK: Tensor, parameters: BlockParameters) -> QuantizedWeight:
        """Codes and parameters, d and offset rounded to float16."""
        scale_NG, offset_NG, sub_scale_NS, sub_offset_NS = parameters
        blocks = BlockScales(half(offset_NG), sub_scale_NS, sub_offset_NS)
        return QuantizedWeight(codes_NK, half(scale_NG), None, self.spec, blocks=blocks)

    def by_column(self, parameters: BlockParameters, K: int, dtype: torch.dtype) -> BlockColumns:
        """The parameters laid out for work on columns in `dtype`."""
        return BlockColumns(self.type_, parameters, dtype)


def _codes_(x: Tensor, type_: BlockType) -> Tensor:
    """Codes (uint8) of weights over their scale; ties as the reference quantizers have them. x is consumed."""
    if type_.codebook:
        return type_.half_steps[x.clamp_(type_.low, type_.high).sub_(type_.low).mul_(2).int()].to(torch.uint8)
    if type_.name == "Q8_0":  # halves away from zero; the number below one half, lest the sum round up to it
        x = x.add_(torch.copysign(torch.tensor(0.5 - 2**-25), x)).trunc_()
        return x.clamp_(type_.low, type_.high).add_(type_.zero).to(torch.uint8)
    return x.add_(type_.zero + 0.5).clamp_(0, type_.top).to(torch.uint8)  # halves up: `to` cuts the fraction off


def _reference(w_NK: Tensor, type_: BlockType) -> BlockParameters:
    """The scales (and offsets) of the reference quantizer, in float32: the extreme weights get the extreme codes."""
    N, K = w_NK.shape
    w_NGg = w_NK.float().reshape(N, K // type_.columns, type_.columns)
    high_NG, low_NG = w_NGg.amax(2), w_NGg.amin(2)
    offset_NG, ones_NG = torch.zeros_like(high_NG), torch.ones_like(high_NG)
    if type_.sub_offset:
        scale_NG, offset_NG = (high_NG - low_NG) / type_.top, -low_NG
    elif type_.name == "Q8_0":
        scale_NG = torch.maximum(high_NG, -low_NG) / 127
    else:  # the first weight of the greatest magnitude, with its sign, gets code 0
        scale_NG = w_NGg.gather(2, w_NGg.abs().argmax(2, keepdim=True)).squeeze(2) / -type_.zero
    finite_NG = torch.isfinite(high_NG) & torch.isfinite(low_NG)
    scale_NG = torch.where(finite_NG, scale_NG.clamp(-HALF_MAX, HALF_MAX), torch.nan)
    return BlockParameters(scale_NG, offset_NG.clamp(-HALF_MAX, HALF_MAX), ones_NG, ones_NG)
