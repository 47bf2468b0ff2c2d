"""The search for blocks that have scales and offsets; `kquant_search` says how it goes.

Shapes: g = columns of a sub-block, S = sub-blocks of a block, B = blocks, C = candidates.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.grids.block_types import TINY, BlockType, inverse, least_of, stored

RANGES = 11  # tried for each sub-block
WIDEST, NARROWEST = {2: -1.0, 4: -2.5, 5: -3.0}, 1.0  # codes the greatest weight gets beyond the last one, by bits
BELOW = (0.0, 1.0, 2.0)  # the greatest scale of a block becomes so much less than the greatest integer
AGAIN, ROUNDS = 1, 1  # of codes chosen again: with free scales, then with integers
SINGULAR = 1e-6  # a determinant below this part of its product: all codes (nearly) alike


class Sums(NamedTuple):
    """What the error of a sub-block with its codes depends on, [..., S, B] each: with levels q and weights h

    error(scale, offset) = sum h w^2 + scale^2 qq + offset^2 one - 2 scale offset q - 2 scale wq + 2 offset w
    """

    one: Tensor
    w: Tensor
    q: Tensor
    qq: Tensor
    wq: Tensor

    def error(self, scale: Tensor, offset: Tensor) -> Tensor:
        """The error less sum h w^2."""
        by_scale = (scale * self.qq).sub_(self.wq, alpha=2).mul_(scale)
        by_offset = (offset * self.one).add_(self.w, alpha=2).sub_(scale * self.q, alpha=2).mul_(offset)
        return by_scale.add_(by_offset)

    def solved(self, free: bool) -> tuple[Tensor, Tensor]:
        """Scale and offset of least error, the scale not negative; unless `free`, neither is the offset."""
        one, w, q, qq, wq = self
        determinant, scale, offset = _solution(one, w, q, qq, wq)
        # with all codes alike: the offset alone if it may, else the scale alone
        constant = -w / one.clamp(min=TINY)
        alone = (wq / qq.clamp(min=TINY)).clamp_(min=0)
        if not free:
            constant = constant.clamp_(min=0)
            negative = torch.lt(offset, 0).float()
            scale, offset = scale.lerp_(alone, negative), offset.clamp_(min=0)
        regular = torch.gt(determinant, SINGULAR * one * qq).float()
        flat = torch.gt(constant.abs(), 0).float()
        alone = alone.mul_(1 - flat)
        return alone.lerp(scale.clamp_(min=0), regular), constant.expand_as(offset).lerp(offset, regular)


def _solution(one: Tensor, w: Tensor, q: Tensor, qq: Tensor, wq: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The determinant and the scale and offset where the error's gradient is nought (noughts where it is singular)."""
    determinant = one * qq - q.square()
    factor = torch.gt(determinant, SINGULAR * one * qq).float().div_(determinant.clamp(min=TINY))
    return determinant, (one * wq - w * q).mul_(factor), (q * wq - qq * w).mul_(factor)


class Weighted(NamedTuple):
    """The weights of a search: w, h (None: all alike), h w [g, S, B]; sum h and sum h w [S, B]."""

    w: Tensor
    h: Tensor | None
    hw: Tensor
    one: Tensor
    sum_w: Tensor

    def sums(self, q_gSB: Tensor) -> Sums:
        """The sums of these codes, which are consumed."""
        wq = (self.hw * q_gSB).sum(0)
        if self.h is None:
            return Sums(self.one, self.sum_w, q_gSB.sum(0), q_gSB.square_().sum(0), wq)
        hq_gSB = self.h * q_gSB
        return Sums(self.one, self.sum_w, hq_gSB.sum(0), hq_gSB.mul_(q_gSB).sum(0), wq)


def with_offset(
    w_gSB: Tensor, h_gSB: Tensor | None, unit_B: Tensor, type_: BlockType
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d and the offset's d [B], their integers [S, B]; arguments as in `kquant_search`."""
    hw_gSB = w_gSB if h_gSB is None else h_gSB * w_gSB
    one_SB = w_gSB.new_full(w_gSB.shape[1:], len(w_gSB)) if h_gSB is None else h_gSB.sum(0)
    weighted = Weighted(w_gSB, h_gSB, hw_gSB, one_SB, hw_gSB.sum(0))
    sums = _ranges(weighted, type_)
    scale_SB, offset_SB = sums.solved(not type_.nested)
    for _ in range(AGAIN):
        more = weighted.sums(_codes(w_gSB, scale_SB, offset_SB, type_))
        sums, scale_SB, offset_SB = _better([sums, more], type_)
    if not type_.nested:
        ones_SB = torch.ones_like(scale_SB)
        return stored(scale_SB[0], unit_B), stored(offset_SB[0], unit_B), ones_SB, ones_SB
    tried = []
    for i in range(ROUNDS + 1):
        d_B, dm_B, sub_SB, sub_offset_SB = _integer_pairs(sums, scale_SB, offset_SB, unit_B, type_)
        scale_SB, offset_SB = d_B * sub_SB, dm_B * sub_offset_SB
        q_gSB = _codes(w_gSB, scale_SB, offset_SB, type_)
        error_gSB = (q_gSB * scale_SB).sub_(offset_SB).sub_(w_gSB).square_()
        error_B = (error_gSB if h_gSB is None else error_gSB.mul_(h_gSB)).sum(0).sum(0)
        tried.append((error_B, d_B, dm_B, sub_SB, sub_offset_SB))
        if i < ROUNDS:
            sums = weighted.sums(q_gSB)
            scale_SB, offset_SB = sums.solved(False)
    _, *best = least_of(*(torch.stack(column) for column in zip(*tried, strict=True)))
    d_B, dm_B, sub_SB, sub_offset_SB = best
    return d_B, dm_B, sub_SB, sub_offset_SB


def _codes(w_gSB: Tensor, scale_SB: Tensor, offset_SB: Tensor, type_: BlockType) -> Tensor:
    return (w_gSB + offset_SB).mul_(inverse(scale_SB)).round_().clamp_(0, type_.top)


def _ranges(weighted: Weighted, type_: BlockType) -> Sums:
    """The sums of the best of a few ranges of every sub-block."""
    low_SB, high_SB = weighted.w.amin(0).clamp_(max=0), weighted.w.amax(0)
    above_gSB = weighted.w - low_SB
    base_SB = inverse((high_SB - low_SB).clamp_(min=0))
    widest = WIDEST[type_.bits]
    steps = [type_.top + widest + (NARROWEST - widest) * i / (RANGES - 1) for i in range(RANGES)]
    found = [weighted.sums((above_gSB * (base_SB * step)).round_().clamp_(0, type_.top)) for step in steps]
    return _better(found, type_)[0]


def _better(found: list[Sums], type_: BlockType) -> tuple[Sums, Tensor, Tensor]:
    """Of each sub-block the sums with the least error, and their scale and offset."""
    one, w = found[0].one, found[0].w
    q, qq, wq = (torch.stack([sums[i] for sums in found]) for i in (2, 3, 4))
    all_ = Sums(one, w, q, qq, wq)
    scale, offset = all_.solved(not type_.nested)
    _, q, qq, wq, scale, offset = least_of(all_.error(scale, offset), q, qq, wq, scale, offset)
    return Sums(one, w, q, qq, wq), scale, offset


def _integer_pairs(
    sums: Sums, scale_SB: Tensor, offset_SB: Tensor, unit_B: Tensor, type_: BlockType
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d and the offset's d [B], integers of both [S, B], for which the error with these codes is least."""
    below_C1 = torch.tensor(BELOW, device=unit_B.device)[:, None]
    d_C1B = stored(scale_SB.amax(0) / (type_.sub_scale[1] - below_C1), unit_B)[:, None]
    dm_CB = stored(offset_SB.amax(0) / (type_.sub_offset - below_C1), unit_B)
    inverse_one_SB = sums.one.clamp(min=TINY).reciprocal()

    def integers(d_CB: Tensor, dm_CB: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest of each sub-block's scale, and of the offset that is best with it."""
        sub_CSB = (scale_SB * inverse(d_CB)[..., None, :]).round_().clamp_(0, type_.sub_scale[1])
        given_CSB = (sub_CSB * d_CB[..., None, :]).mul_(sums.q).sub_(sums.w).mul_(inverse_one_SB)
        return sub_CSB, (given_CSB * inverse(dm_CB)[..., None, :]).round_().clamp_(0, type_.sub_offset)

    sub_C1SB, sub_offset_CCSB = integers(d_C1B, dm_CB)
    # d and dm again by least squares, with these codes and integers
    whole = Sums(
        (sub_offset_CCSB.square() * sums.one).sum(2),
        (sub_offset_CCSB * sums.w).sum(2),
        sub_offset_CCSB.mul_(sub_C1SB * sums.q).sum(2),
        (sub_C1SB.square() * sums.qq).sum(2),
        (sub_C1SB * sums.wq).sum(2),
    )
    determinant_CCB, found_CCB, found_offset_CCB = _solution(*whole)
    regular_CCB = torch.gt(determinant_CCB, SINGULAR * whole.one * whole.qq).float()
    again_CCB = stored(d_C1B.lerp(found_CCB.clamp_(min=0), regular_CCB), unit_B)
    again_offset_CCB = stored(dm_CB.lerp(found_offset_CCB.clamp_(min=0), regular_CCB), unit_B)
    error_CCB = whole.error(again_CCB, again_offset_CCB)
    tried = (d_C1B.expand_as(error_CCB), dm_CB.expand_as(error_CCB), again_CCB, again_offset_CCB)
    _, d_B, dm_B, again_B, again_offset_B = least_of(*(t.flatten(0, 1) for t in (error_CCB, *tried)))
    return again_B, again_offset_B, *integers(d_B, dm_B)
