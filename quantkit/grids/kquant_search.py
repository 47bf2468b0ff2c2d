"""Scales of blocks by search: the parameters whose codes have the least weighted squared error.

For fixed codes the error is quadratic in a sub-block's scale and offset, so

1. each sub-block on its own tries a few ranges; the codes of each give the best scale (and offset) in closed form;
2. the sums of the best make the error of any other scale and offset (with the same codes) a formula: over a set of
   block scales d (and d of the offsets) the integers nearest to what the sub-blocks want, and d by least squares again;
3. with the integers found the codes are chosen anew and 2 is repeated; what has the least error in the end stays.

Every sum is a tree of elementwise additions over the leading dimensions, so that a block's result is the same whatever
rows are beside it, on every processor and with any number of threads.

Shapes: g = columns of a sub-block, S = sub-blocks of a block, B = blocks of the rows worked on, G = blocks of a row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.grids.block_types import HALF_MAX, BlockParameters, BlockType, half

CHUNK = 1 << 17  # weights worked on at a time: all tensors of one candidate stay in the cache
TINY = torch.finfo(torch.float32).tiny
ROUNDS = 2  # of the choice of integers with codes chosen anew
FLOOR = 1e-8  # of an importance, over their mean: columns that were never active still get a sensible range


class Sums(NamedTuple):
    """What the error of a sub-block with its codes depends on, [S, B] each: with levels q and weights h

    error(scale, offset) = sum h w^2 + scale^2 qq + offset^2 one - 2 scale offset q - 2 scale wq + 2 offset w
    """

    one: Tensor
    w: Tensor
    q: Tensor
    qq: Tensor
    wq: Tensor


def search(w_NK: Tensor, importance_K: Tensor | None, type_: BlockType) -> BlockParameters:
    """Parameters for a weight [N, K] of any float dtype; blocks with NaN or Inf get scales that are NaN."""
    N, K = w_NK.shape
    G, S = K // type_.columns, type_.columns // type_.span
    device = w_NK.device
    scale_NG, offset_NG = (torch.zeros(N, G, device=device) for _ in range(2))
    sub_scale_NS, sub_offset_NS = (torch.ones(N, G * S, device=device) for _ in range(2))
    rows = max(1, CHUNK // K)
    importance_gSB = None if importance_K is None else _importance(importance_K.to(device), type_, min(rows, N))
    for start in range(0, N, rows):
        w_nK = w_NK[start : start + rows].float()
        n = len(w_nK)
        unit_n1 = _unit(w_nK)
        w_gSB = _columns_first((w_nK / unit_n1).reshape(n * G, S, type_.span))
        unit_B = unit_n1.expand(n, G).reshape(-1)
        e_gSB = None if importance_gSB is None else importance_gSB[..., : n * G]
        h_gSB = _weights(w_gSB, e_gSB, type_, G)
        find = _with_offset if type_.sub_offset else _scale_only
        d_B, offset_B, sub_scale_SB, sub_offset_SB = find(w_gSB, h_gSB, unit_B, type_)
        d_B = torch.where(torch.isfinite(w_nK.reshape(n * G, -1).abs().amax(1)), d_B * unit_B, torch.nan)
        inside = slice(start, start + n)
        scale_NG[inside] = d_B.reshape(n, G)
        if type_.sub_offset:
            offset_NG[inside] = (offset_B * unit_B).reshape(n, G)
        if type_.nested:
            sub_scale_NS[inside] = sub_scale_SB.mT.reshape(n, G * S)
            if type_.sub_offset:
                sub_offset_NS[inside] = sub_offset_SB.mT.reshape(n, G * S)
    return BlockParameters(scale_NG, offset_NG, sub_scale_NS, sub_offset_NS)


def _unit(w_nK: Tensor) -> Tensor:
    """A power of two near each row's greatest magnitude [n, 1]: squares then neither vanish nor overflow."""
    _, exponent_n1 = torch.frexp(w_nK.abs().amax(1, keepdim=True).nan_to_num(1.0, 1.0).clamp(min=TINY))
    return torch.ldexp(torch.ones_like(exponent_n1, dtype=torch.float32), exponent_n1.clamp(-100, 100))


def _columns_first(w_BSg: Tensor) -> Tensor:
    return w_BSg.permute(2, 1, 0).contiguous()


def _importance(importance_K: Tensor, type_: BlockType, n: int) -> Tensor:
    """[g, S, n * G], over its mean."""
    e_K = importance_K.double()
    mean = e_K.mean()
    e_K = (e_K / mean).clamp_(min=FLOOR) if mean > 0 else torch.ones_like(e_K)
    return _columns_first(e_K.float().reshape(-1, type_.columns // type_.span, type_.span)).repeat(1, 1, n)


def _weights(w_gSB: Tensor, e_gSB: Tensor | None, type_: BlockType, G: int) -> Tensor:
    """The weight of each squared error, [g, S, B]."""
    if e_gSB is None:
        return torch.ones_like(w_gSB)
    if type_.energy is None:
        return e_gSB
    square_gSB = w_gSB.square()
    times, of = type_.energy
    mean_B = folded(folded(square_gSB)) / type_.columns
    if of == "row":
        mean_Gn = mean_B.reshape(-1, G).mT
        mean_B = (folded(mean_Gn) / G).repeat_interleave(G)
    return square_gSB.add_(mean_B * times).sqrt_().mul_(e_gSB)


def folded(t: Tensor) -> Tensor:
    """The sum over the first dimension, as a tree of additions; t is consumed."""
    while (size := len(t)) > 1:
        part = size // 2
        t[:part] += t[part : 2 * part]
        if size % 2:
            t[0] += t[-1]
        t = t[:part]
    return t[0]


def levels_(x: Tensor, type_: BlockType) -> Tensor:
    """Each x to the nearest level, in place."""
    if type_.codebook:
        index = x.clamp_(type_.low, type_.high).sub_(type_.low).mul_(2).int()
        return torch.index_select(type_.half_levels, 0, index.reshape(-1), out=x.reshape(-1)).reshape(x.shape)
    return x.round_().clamp_(type_.low, type_.high)


def _sums(w: Tensor, h: Tensor, hw: Tensor, q: Tensor, one: Tensor, w_sum: Tensor, *, offset: bool) -> Sums:
    hq = h * q
    qq, wq = folded(hq * q), folded(hw * q)
    return Sums(one, w_sum, folded(hq) if offset else one, qq, wq)


def _inverse(t: Tensor) -> Tensor:
    """1 / t, 0 where that is not finite."""
    return (1 / t).nan_to_num_(0.0, 0.0, 0.0)


# ---- types with a scale alone


def _scale_only(
    w_gSB: Tensor, h_gSB: Tensor, unit_B: Tensor, type_: BlockType
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d [B], zeros, the integers [S, B] and ones."""
    hw_gSB = h_gSB * w_gSB
    high_SB, low_SB = w_gSB.amax(0), w_gSB.amin(0)
    extreme_SB = torch.where(high_SB >= -low_SB, high_SB, low_SB)
    best_SB, gain_SB, energy_SB = (
        torch.zeros_like(extreme_SB),
        torch.zeros_like(extreme_SB),
        torch.zeros_like(extreme_SB),
    )

    def try_(inverse_SB: Tensor) -> None:
        nonlocal best_SB, gain_SB, energy_SB
        q_gSB = levels_(w_gSB * inverse_SB, type_)
        wq_SB = folded(hw_gSB * q_gSB)
        qq_SB = folded(q_gSB.square_().mul_(h_gSB))
        scale_SB = wq_SB / qq_SB.clamp(min=TINY)
        found_SB = scale_SB * wq_SB
        better_SB = found_SB > gain_SB
        best_SB = torch.where(better_SB, scale_SB, best_SB)
        gain_SB = torch.where(better_SB, found_SB, gain_SB)
        energy_SB = torch.where(better_SB, qq_SB, energy_SB)

    for step in _steps(type_):
        try_(_inverse(extreme_SB) * step)
    for _ in range(ROUNDS):
        try_(_inverse(best_SB))
    if not type_.nested:
        d_B = stored(best_SB[0], unit_B)
        return d_B, torch.zeros_like(d_B), torch.ones_like(best_SB), torch.ones_like(best_SB)
    d_B, sub_SB = _integers(best_SB, energy_SB, unit_B, type_)
    least_B = None
    for i in range(ROUNDS + 1):
        scale_SB = d_B * sub_SB
        q_gSB = levels_(w_gSB * _inverse(scale_SB), type_)
        wq_SB, qq_SB = folded(hw_gSB * q_gSB), folded(q_gSB.square().mul_(h_gSB))
        error_B = folded(folded((q_gSB * scale_SB).sub_(w_gSB).square_().mul_(h_gSB)))
        if least_B is None:
            least_B, best_B, best_sub_SB = error_B, d_B, sub_SB
        else:
            better_B = error_B < least_B
            least_B = torch.where(better_B, error_B, least_B)
            best_B = torch.where(better_B, d_B, best_B)
            best_sub_SB = torch.where(better_B, sub_SB, best_sub_SB)
        if i < ROUNDS:
            wanted_SB = torch.where(qq_SB > 0, wq_SB / qq_SB.clamp(min=TINY), best_SB)
            d_B, sub_SB = _integers(wanted_SB, qq_SB, unit_B, type_)
    return best_B, torch.zeros_like(best_B), best_sub_SB, torch.ones_like(best_sub_SB)


def _steps(type_: BlockType) -> list[float]:
    """What the extreme weight of a sub-block may become, in levels."""
    far = type_.low
    steps = [far - 0.1 * i * (6.0 if type_.codebook else 1.0) for i in range(-9, 10)]
    return steps + [-far + 0.1 * i * (6.0 if type_.codebook else 1.0) for i in range(-9, 10, 2)]


def stored(d_B: Tensor, unit_B: Tensor) -> Tensor:
    """The nearest that float16 can hold once multiplied by unit_B."""
    return half((d_B * unit_B).clamp(-HALF_MAX, HALF_MAX)) / unit_B


def _integers(wanted_SB: Tensor, energy_SB: Tensor, unit_B: Tensor, type_: BlockType) -> tuple[Tensor, Tensor]:
    """d [B] and integers [S, B] for which sum energy (d * integer - wanted)^2 is least."""
    low, high = type_.sub_scale
    most_B, least_B = wanted_SB.amax(0), wanted_SB.amin(0)
    extreme_B = torch.where(most_B >= -least_B, most_B, least_B)
    error_B = torch.full_like(extreme_B, torch.inf)
    best_B, best_SB = torch.zeros_like(extreme_B), torch.zeros_like(wanted_SB)
    for top in [low + 0.5 * i for i in range(-1, 8)] + [high - 0.5 * i for i in range(-1, 6)]:
        d_B = stored(extreme_B / top, unit_B)
        sub_SB = (wanted_SB * _inverse(d_B)).round_().clamp_(low, high)
        weighted_SB = energy_SB * sub_SB
        d_B = folded(weighted_SB * wanted_SB) / folded(weighted_SB.mul_(sub_SB)).clamp_(min=TINY)
        d_B = stored(d_B, unit_B)
        found_B = folded((sub_SB * d_B).sub_(wanted_SB).square_().mul_(energy_SB))
        better_B = found_B < error_B
        error_B = torch.where(better_B, found_B, error_B)
        best_B = torch.where(better_B, d_B, best_B)
        best_SB = torch.where(better_B, sub_SB, best_SB)
    return best_B, best_SB


# ---- types with an offset


def _with_offset(
    w_gSB: Tensor, h_gSB: Tensor, unit_B: Tensor, type_: BlockType
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d and the offset's d [B], their integers [S, B]."""
    hw_gSB = h_gSB * w_gSB
    one_SB, w_SB = folded(h_gSB.clone()), folded(hw_gSB.clone())
    low_SB, high_SB = w_gSB.amin(0).clamp_(max=0), w_gSB.amax(0)
    range_SB = (high_SB - low_SB).clamp_(min=0)
    above_gSB = w_gSB - low_SB
    scale_SB, offset_SB = range_SB / type_.top, -low_SB
    least_SB = torch.full_like(range_SB, torch.inf)
    kept = Sums(one_SB, w_SB, w_SB, w_SB, w_SB)

    def try_(q_gSB: Tensor) -> None:
        nonlocal scale_SB, offset_SB, least_SB, kept
        sums = _sums(w_gSB, h_gSB, hw_gSB, q_gSB, one_SB, w_SB, offset=True)
        found_scale_SB, found_offset_SB = _solved(sums, type_)
        error_SB = _error(sums, found_scale_SB, found_offset_SB)
        better_SB = error_SB < least_SB
        least_SB = torch.where(better_SB, error_SB, least_SB)
        scale_SB = torch.where(better_SB, found_scale_SB, scale_SB)
        offset_SB = torch.where(better_SB, found_offset_SB, offset_SB)
        kept = Sums(*(torch.where(better_SB, new, old) for new, old in zip(sums, kept, strict=True)))

    for i in range(-10, 11):
        try_((above_gSB * (_inverse(range_SB) * (type_.top + 0.1 * i))).round_().clamp_(0, type_.top))
    for _ in range(ROUNDS):
        try_((w_gSB + offset_SB).mul_(_inverse(scale_SB)).round_().clamp_(0, type_.top))
    if not type_.nested:
        d_B, offset_B = stored(scale_SB[0], unit_B), stored(offset_SB[0], unit_B)
        return d_B, offset_B, torch.ones_like(scale_SB), torch.ones_like(scale_SB)
    best = found = _integer_pairs(kept, scale_SB, offset_SB, unit_B, type_)
    least_B = None
    for i in range(ROUNDS + 1):
        d_B, dm_B, sub_SB, sub_offset_SB = found
        scale_SB, offset_SB = d_B * sub_SB, dm_B * sub_offset_SB
        q_gSB = (w_gSB + offset_SB).mul_(_inverse(scale_SB)).round_().clamp_(0, type_.top)
        error_B = folded(folded((q_gSB * scale_SB).sub_(offset_SB).sub_(w_gSB).square_().mul_(h_gSB)))
        if least_B is None:
            least_B = error_B
        else:
            better_B = error_B < least_B
            least_B = torch.where(better_B, error_B, least_B)
            best = tuple(torch.where(better_B, new, old) for new, old in zip(found, best, strict=True))
        if i < ROUNDS:
            sums = _sums(w_gSB, h_gSB, hw_gSB, q_gSB, one_SB, w_SB, offset=True)
            found = _integer_pairs(sums, *_solved(sums, type_), unit_B, type_)
    return best  # type: ignore[return-value]


def _solved(sums: Sums, type_: BlockType) -> tuple[Tensor, Tensor]:
    """Scale and offset [S, B] of least error; the offset of a nested type is not negative."""
    one, w, q, qq, wq = sums
    determinant = one * qq - q.square()
    ok = determinant > 1e-7 * one * qq
    inverse = torch.where(ok, 1 / determinant.clamp(min=TINY), 0)
    scale, offset = (one * wq - w * q) * inverse, (q * wq - qq * w) * inverse
    alone = wq / qq.clamp(min=TINY)
    constant = -w / one.clamp(min=TINY)
    if type_.nested:
        constant = constant.clamp(min=0)
        negative = ok & (offset < 0)
        scale, offset = torch.where(negative, alone, scale), torch.where(negative, 0, offset)
    # all codes alike: the offset alone serves where it may, else codes of the top
    return torch.where(ok, scale.clamp(min=0), torch.where(constant > 0, 0, alone)), torch.where(ok, offset, constant)


def _error(sums: Sums, scale: Tensor, offset: Tensor) -> Tensor:
    """The error less sum h w^2."""
    one, w, q, qq, wq = sums
    return scale * (scale * qq - 2 * wq) + offset * (offset * one + 2 * (w - scale * q))


def _integer_pairs(
    sums: Sums, scale_SB: Tensor, offset_SB: Tensor, unit_B: Tensor, type_: BlockType
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d and the offset's d [B], integers of both [S, B], for which the error with these codes is least."""
    top, top_offset = type_.sub_scale[1], type_.sub_offset
    most_B, most_offset_B = scale_SB.amax(0), offset_SB.amax(0)
    least_B = torch.full_like(most_B, torch.inf)
    best = (most_B, most_offset_B, torch.zeros_like(scale_SB), torch.zeros_like(scale_SB))
    inverse_one_SB = 1 / sums.one.clamp(min=TINY)
    for below in (0, 0.5, 1, 2):
        d_B = stored(most_B / (top - below), unit_B)
        sub_SB = (scale_SB * _inverse(d_B)).round_().clamp_(0, top)
        given_SB = ((d_B * sub_SB).mul_(sums.q).sub_(sums.w)).mul_(inverse_one_SB)
        for below_offset in (0, 0.5, 1, 2):
            dm_B = stored(most_offset_B / (top_offset - below_offset), unit_B)
            sub_offset_SB = (given_SB * _inverse(dm_B)).round_().clamp_(0, top_offset)
            pair = _refitted(sums, sub_SB, sub_offset_SB, d_B, dm_B, unit_B)
            error_B = folded(_error(sums, pair[0] * sub_SB, pair[1] * sub_offset_SB))
            better_B = error_B < least_B
            least_B = torch.where(better_B, error_B, least_B)
            best = tuple(
                torch.where(better_B, new, old) for new, old in zip((*pair, sub_SB, sub_offset_SB), best, strict=True)
            )
    return best  # type: ignore[return-value]


def _refitted(
    sums: Sums, sub_SB: Tensor, sub_offset_SB: Tensor, d_B: Tensor, dm_B: Tensor, unit_B: Tensor
) -> tuple[Tensor, Tensor]:
    """d and the offset's d by least squares for these codes and integers, where that is possible."""
    qq_B = folded(sums.qq * sub_SB.square())
    one_B = folded(sums.one * sub_offset_SB.square())
    q_B = folded(sums.q * sub_SB * sub_offset_SB)
    wq_B, w_B = folded(sums.wq * sub_SB), folded(sums.w * sub_offset_SB)
    determinant_B = one_B * qq_B - q_B.square()
    ok_B = determinant_B > 1e-7 * one_B * qq_B
    inverse_B = torch.where(ok_B, 1 / determinant_B.clamp(min=TINY), 0)
    d_B = torch.where(ok_B, (one_B * wq_B - w_B * q_B) * inverse_B, d_B)
    dm_B = torch.where(ok_B, (q_B * wq_B - qq_B * w_B) * inverse_B, dm_B)
    return stored(d_B.clamp(min=0), unit_B), stored(dm_B.clamp(min=0), unit_B)
