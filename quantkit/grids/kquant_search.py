"""Scales of blocks by search: the parameters whose codes have the least weighted squared error.

For fixed codes the error is quadratic in a sub-block's scale and offset, so

1. each sub-block on its own tries a few ranges; the codes of each give the best scale (and offset) in closed form;
2. the sums of the best make the error of any other scale and offset (with the same codes) a formula: for a few block
   scales d (and d of the offsets) the integers nearest to what the sub-blocks want, and d by least squares again;
3. with the integers found the codes are chosen anew and 2 is repeated; what has the least error in the end stays.

Every operation is elementwise or a sum over a leading dimension, in blocks of ALIGNED columns: a block's result is the
same whatever rows are beside it, on every processor and with any number of threads.

Shapes: g = columns of a sub-block, S = sub-blocks of a block, G = blocks of a row, B = blocks worked on, those of whole
rows one after the other; n = these rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from quantkit.grids.block_types import BlockParameters, BlockType
from quantkit.grids.offset_search import with_offset
from quantkit.grids.scale_search import scale_only

CHUNK = 1 << 17  # weights worked on at a time: all tensors of one candidate stay in the cache
ALIGNED = 128  # sums over leading dimensions go column by column, this many at a time
FLOOR = 1e-8  # of an importance, over their mean: columns that were never active still get a sensible range

# w and h [g, S, B] (h None: all alike), a unit [B] -> d, d of the offset [B], their integers [S, B]
Found = tuple[Tensor, Tensor, Tensor, Tensor]
Search = Callable[[Tensor, Tensor | None, Tensor, BlockType], Found]


def search(w_NK: Tensor, importance_K: Tensor | None, type_: BlockType) -> BlockParameters:
    """Parameters for a weight [N, K] of any float dtype; blocks with NaN or Inf get scales that are NaN.

    With an importance the weight of an error is e * sqrt(energy + w^2), as llama.cpp has it: what is large in a block
    is then kept a little better than E[x^2] alone would have it. Without one all errors weigh alike.
    """
    N, K = w_NK.shape
    G, S = K // type_.columns, type_.columns // type_.span
    d_NG, offset_NG = (torch.zeros(N, G, device=w_NK.device) for _ in range(2))
    sub_scale_NS, sub_offset_NS = (torch.ones(N, G * S, device=w_NK.device) for _ in range(2))
    rows = min(max(1, CHUNK // K), N)
    e_gSB = None if importance_K is None else _importance(importance_K.to(w_NK.device), type_, rows)
    find: Search = with_offset if type_.sub_offset else scale_only
    for start in range(0, N, rows):
        w_nK = w_NK[start : start + rows].float()
        inside, n, B = slice(start, start + len(w_nK)), len(w_nK), len(w_nK) * G
        broken_nG = None
        if not torch.isfinite(w_nK.sum()):
            broken_nG = ~torch.isfinite(w_nK).reshape(n, G, -1).all(2)
            w_nK = torch.where(torch.isfinite(w_nK), w_nK, 0)
        unit_n1 = _unit(w_nK)
        w_gSB = _columns_first(w_nK / unit_n1, type_)
        unit_B = unit_n1.expand(n, G).reshape(-1)
        unit_B = torch.cat([unit_B, unit_B.new_ones(w_gSB.shape[2] - B)])
        h_gSB = None if e_gSB is None else _error_weights(w_gSB, e_gSB[..., : len(unit_B)], type_, n, G)
        found = find(w_gSB, h_gSB, unit_B, type_)
        d_B, offset_B = (t[:B] * unit_B[:B] for t in found[:2])
        d_NG[inside] = d_B.reshape(n, G)
        if type_.sub_offset:
            offset_NG[inside] = offset_B.reshape(n, G)
        if type_.nested:
            sub_scale_NS[inside] = found[2][:, :B].mT.reshape(n, G * S)
            if type_.sub_offset:
                sub_offset_NS[inside] = found[3][:, :B].mT.reshape(n, G * S)
        if broken_nG is not None:
            d_NG[inside][broken_nG] = torch.nan
    return BlockParameters(d_NG, offset_NG, sub_scale_NS, sub_offset_NS)


def _unit(w_nK: Tensor) -> Tensor:
    """A power of two near each row's greatest magnitude [n, 1]: squares then neither vanish nor overflow."""
    _, exponent_n1 = torch.frexp(w_nK.abs().amax(1, keepdim=True))
    return torch.ldexp(torch.ones_like(exponent_n1, dtype=torch.float32), exponent_n1.clamp(-100, 100))


def _columns_first(w_nK: Tensor, type_: BlockType) -> Tensor:
    """[g, S, B], B filled up with zeros to a multiple of ALIGNED."""
    w_BSg = w_nK.reshape(-1, type_.columns // type_.span, type_.span)
    B, S, g = w_BSg.shape
    w_gSB = w_BSg.new_zeros(g, S, -(-B // ALIGNED) * ALIGNED)
    w_gSB[..., :B] = w_BSg.permute(2, 1, 0)
    return w_gSB


def _importance(importance_K: Tensor, type_: BlockType, n: int) -> Tensor:
    """[g, S, B], over its mean."""
    e_K = importance_K.double()
    mean = e_K.mean()
    e_K = (e_K / mean).clamp_(min=FLOOR) if mean > 0 else torch.ones_like(e_K)
    return _columns_first(e_K.float().expand(n, -1), type_)


def _error_weights(w_gSB: Tensor, e_gSB: Tensor, type_: BlockType, n: int, G: int) -> Tensor:
    """The weight of each squared error, [g, S, B]."""
    if type_.energy is None:
        return e_gSB
    square_gSB = w_gSB.square()
    times, of = type_.energy
    mean_B = square_gSB.sum(0).sum(0).div_(type_.columns)
    if of == "row":
        mean_nG = mean_B[: n * G].reshape(n, G)
        total_n = mean_nG[:, 0].clone()
        for g in range(1, G):  # in this order, whatever n is
            total_n += mean_nG[:, g]
        mean_B[: n * G] = (total_n / G).repeat_interleave(G)
    return square_gSB.add_(mean_B * times).sqrt_().mul_(e_gSB)
