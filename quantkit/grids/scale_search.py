"""The search for blocks that have scales alone; `kquant_search` says how it goes.

Shapes: g = columns of a sub-block, S = sub-blocks of a block, B = blocks, C = candidates.
"""

import torch
from torch import Tensor

from quantkit.grids.block_types import TINY, BlockType, inverse, least_of, levels_, stored

# Where the extreme weight of a sub-block goes, in levels beyond the least (with the sign that there is one level more
# of) or the greatest: from, to, how many; by bits. Far inside, weights use fewer codes, but some such grid fits better.
NEAR = {3: (-0.6, 1.8, 7), 4: (-1.5, 1.5, 7), 5: (-3.0, 1.0, 7), 6: (-5.0, 1.0, 7)}
FAR = {3: (-1.0, 1.0, 4), 4: (-1.5, 1.0, 4), 5: (-2.0, 0.0, 4), 6: (-4.0, 0.0, 4)}
NEAR_BOOK, FAR_BOOK = (-18.0, 6.0, 7), (-18.0, 0.0, 4)
TOPS = (0.0, 1.0)  # the same for the integer of the extreme scale of a block, at both ends
AGAIN, ROUNDS = 1, 1  # of codes chosen again: with free scales, then with integers


def scale_only(
    w_gSB: Tensor, h_gSB: Tensor | None, unit_B: Tensor, type_: BlockType
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d [B], zeros, the integers [S, B] and ones; arguments as in `kquant_search`."""
    hw_gSB = w_gSB if h_gSB is None else h_gSB * w_gSB
    high_SB, low_SB = w_gSB.amax(0), w_gSB.amin(0)
    extreme_SB = high_SB.lerp(low_SB, torch.gt(-low_SB, high_SB).float())
    base_SB, steps = inverse(extreme_SB), _steps(type_)
    qq_CSB, wq_CSB = (w_gSB.new_empty(len(steps), *base_SB.shape) for _ in range(2))
    for i, step in enumerate(steps):
        _sums(w_gSB, h_gSB, hw_gSB, base_SB * step, type_, qq_CSB[i], wq_CSB[i])
    gain_CSB = wq_CSB.square().div_(qq_CSB.clamp(min=TINY))
    _, qq_SB, wq_SB = least_of(-gain_CSB, qq_CSB, wq_CSB)
    for _ in range(AGAIN):
        qq_CSB, wq_CSB = (torch.stack([t, torch.empty_like(t)]) for t in (qq_SB, wq_SB))
        _sums(w_gSB, h_gSB, hw_gSB, inverse(wq_SB / qq_SB.clamp(min=TINY)), type_, qq_CSB[1], wq_CSB[1])
        _, qq_SB, wq_SB = least_of(-wq_CSB.square().div_(qq_CSB.clamp(min=TINY)), qq_CSB, wq_CSB)
    wanted_SB, ones_SB = wq_SB / qq_SB.clamp(min=TINY), torch.ones_like(wq_SB)
    if not type_.nested:
        return stored(wanted_SB[0], unit_B), torch.zeros_like(unit_B), ones_SB, ones_SB
    d_B, sub_SB = _integers(wanted_SB, qq_SB, unit_B, type_)
    tried = []
    for i in range(ROUNDS + 1):
        scale_SB = d_B * sub_SB
        q_gSB = levels_(w_gSB * inverse(scale_SB), type_)
        error_gSB = (q_gSB * scale_SB).sub_(w_gSB).square_()
        tried.append(((error_gSB if h_gSB is None else error_gSB.mul_(h_gSB)).sum(0).sum(0), d_B, sub_SB))
        if i < ROUNDS:
            wq_SB = (hw_gSB * q_gSB).sum(0)
            qq_SB = (q_gSB.square_() if h_gSB is None else q_gSB.square_().mul_(h_gSB)).sum(0)
            some_SB = torch.gt(qq_SB, 0).float()  # a sub-block may have got codes of nought only
            wanted_SB = wanted_SB.lerp(wq_SB / qq_SB.clamp(min=TINY), some_SB)
            d_B, sub_SB = _integers(wanted_SB, qq_SB, unit_B, type_)
    _, d_B, sub_SB = least_of(*(torch.stack(column) for column in zip(*tried, strict=True)))
    return d_B, torch.zeros_like(unit_B), sub_SB, ones_SB


def _sums(
    w_gSB: Tensor,
    h_gSB: Tensor | None,
    hw_gSB: Tensor,
    inverse_SB: Tensor,
    type_: BlockType,
    qq_SB: Tensor,
    wq_SB: Tensor,
) -> None:
    """sum h q^2 and sum h w q of the levels q nearest to w * inverse."""
    q_gSB = levels_(w_gSB * inverse_SB, type_)
    torch.sum(hw_gSB * q_gSB, 0, out=wq_SB)
    q_gSB.square_()
    torch.sum(q_gSB if h_gSB is None else q_gSB.mul_(h_gSB), 0, out=qq_SB)


def _steps(type_: BlockType) -> list[float]:
    """What the extreme weight of a sub-block may become, in levels."""
    near, far = (NEAR_BOOK, FAR_BOOK) if type_.codebook else (NEAR[type_.bits], FAR[type_.bits])
    near_, far_ = ([low + (high - low) * i / (count - 1) for i in range(count)] for low, high, count in (near, far))
    return [type_.low - x for x in near_] + [-type_.low + x for x in far_]


def _integers(wanted_SB: Tensor, energy_SB: Tensor, unit_B: Tensor, type_: BlockType) -> tuple[Tensor, Tensor]:
    """d [B] and integers [S, B] for which sum energy (d * integer - wanted)^2 is least."""
    low, high = type_.sub_scale
    most_B, least_B = wanted_SB.amax(0), wanted_SB.amin(0)
    extreme_B = most_B.lerp(least_B, torch.gt(-least_B, most_B).float())
    tops = torch.tensor([low + i for i in TOPS] + [high - i for i in TOPS], device=unit_B.device)
    d_CB = stored(extreme_B / tops[:, None], unit_B)

    def integers(d_CB: Tensor) -> Tensor:
        return (wanted_SB * inverse(d_CB)[..., None, :]).round_().clamp_(low, high)

    sub_CSB = integers(d_CB)
    weighted_CSB = energy_SB * sub_CSB
    shared_CB, norm_CB = (weighted_CSB * wanted_SB).sum(1), weighted_CSB.mul_(sub_CSB).sum(1)
    again_CB = stored(shared_CB / norm_CB.clamp(min=TINY), unit_B)
    # the error less what is the same for all
    _, d_B, again_B = least_of((again_CB * norm_CB).sub_(shared_CB, alpha=2).mul_(again_CB), d_CB, again_CB)
    return again_B, integers(d_B)
