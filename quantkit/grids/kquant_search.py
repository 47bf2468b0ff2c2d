"""Scales of blocks by search: the parameters whose codes have the least weighted squared error.

For fixed codes the error is quadratic in a sub-block's scale and offset, so

1. each sub-block on its own tries a few ranges; the codes of each give the best scale (and offset) in closed form;
2. the sums of the best make the error of any other scale and offset (with the same codes) a formula: for a few block
   scales d (and d of the offsets) the integers nearest to what the sub-blocks want, and d by least squares again;
3. with the integers found the codes are chosen again and 2 is repeated; what has the least error in the end stays.

Every operation is elementwise or a sum over a leading dimension, in blocks of ALIGNED columns: a block's result is the
same whatever rows are beside it, on every processor and with any number of threads.

The searches take w and the weights h of errors [g, S, B] (None: all alike), and a unit [B] that d is multiplied by
before it is stored; they return d and that of the offset [B] and their integers [S, B].

Shapes: g = columns of a sub-block, S = sub-blocks of a block, G = blocks of a row, B = blocks worked on, those of whole
rows one after the other; n = these rows.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from quantkit.grids.block_types import BlockParameters, BlockType
from quantkit.grids.offset_search import with_offset
from quantkit.grids.protocol import joined
from quantkit.grids.scale_search import scale_only

CHUNK = 1 << 19  # weights worked on at a time: the cache holds them, and threads seldom wait for the interpreter
ALIGNED = 128  # sums over leading dimensions go column by column, this many at a time
FLOOR = 1e-8  # of an importance, over the greatest: columns that were never active still get a sensible range

T = TypeVar("T")


def search(w_NK: Tensor, importance_K: Tensor | None, type_: BlockType) -> BlockParameters:
    """Parameters for a weight [N, K] of any float dtype; blocks with NaN or Inf get scales that are NaN.

    With an importance the weight of an error is e * sqrt(energy + w^2), as llama.cpp has it: what is large in a block
    is then kept a little better than E[x^2] alone would have it. Without one all errors weigh alike.
    """
    N, K = w_NK.shape
    rows = min(max(1, CHUNK // K), N)
    e_gSB = None if importance_K is None else _importance(importance_K.to(w_NK.device), type_, rows)
    parts = [w_NK[start : start + rows] for start in range(0, N, rows)]
    return joined(_side_by_side(partial(_search_rows, e_gSB=e_gSB, type_=type_), parts))


def _side_by_side(work: Callable[[Tensor], T], parts: Sequence[Tensor]) -> list[T]:
    """The work on each part, in as many threads as torch has, each of which works alone.

    Threads that share every small operation would wait for each other more than they work.
    """
    threads = min(torch.get_num_threads(), len(parts))
    if threads < 2 or parts[0].device.type != "cpu":
        return [work(part) for part in parts]
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        return list(pool.map(work, parts))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # for threads yet to come; this one's own number stayed


@torch.inference_mode()
def _search_rows(w_nK: Tensor, e_gSB: Tensor | None, type_: BlockType) -> BlockParameters:
    w_nK = w_nK.float()
    n, K = w_nK.shape
    G, S = K // type_.columns, type_.columns // type_.span
    B = n * G
    broken_nG = None
    if not torch.isfinite(w_nK.sum()):
        broken_nG = ~torch.isfinite(w_nK).reshape(n, G, -1).all(2)
        w_nK = torch.where(torch.isfinite(w_nK), w_nK, 0)
    unit_n1 = _power_of_two(w_nK.abs().amax(1, keepdim=True))  # of each row: squares neither vanish nor overflow
    w_gSB = _columns_first(w_nK / unit_n1, type_)
    unit_B = unit_n1.expand(n, G).reshape(-1)
    unit_B = torch.cat([unit_B, unit_B.new_ones(w_gSB.shape[2] - B)])
    h_gSB = None if e_gSB is None else _error_weights(w_gSB, e_gSB[..., : len(unit_B)], type_, n, G)
    find = with_offset if type_.sub_offset else scale_only
    d_B, offset_B, sub_scale_SB, sub_offset_SB = find(w_gSB, h_gSB, unit_B, type_)
    d_nG, offset_nG = ((t * unit_B)[:B].reshape(n, G) for t in (d_B, offset_B))
    if broken_nG is not None:
        d_nG = torch.where(broken_nG, torch.nan, d_nG)
    sub_nS = (t[:, :B].mT.reshape(n, G * S) for t in (sub_scale_SB, sub_offset_SB))
    return BlockParameters(d_nG, offset_nG, *sub_nS)


def _power_of_two(t: Tensor) -> Tensor:
    """The least power of two above each t, from 2^-100 to 2^100."""
    exponent = torch.frexp(t)[1].clamp(-100, 100)
    return (exponent.add_(127) << 23).to(torch.int32).view(torch.float32)


def _columns_first(w_nK: Tensor, type_: BlockType) -> Tensor:
    """[g, S, B], B filled up with zeros to a multiple of ALIGNED."""
    w_BSg = w_nK.reshape(-1, type_.columns // type_.span, type_.span)
    B, S, g = w_BSg.shape
    w_gSB = w_BSg.new_zeros(g, S, -(-B // ALIGNED) * ALIGNED)
    w_gSB[..., :B] = w_BSg.permute(2, 1, 0)
    return w_gSB


def _importance(importance_K: Tensor, type_: BlockType, n: int) -> Tensor:
    """[g, S, B], over a power of two near the greatest."""
    e_K = importance_K.float()
    most = e_K.amax()
    e_K = (e_K / _power_of_two(most)).clamp_(min=FLOOR) if most > 0 else torch.ones_like(e_K)
    return _columns_first(e_K.expand(n, -1), type_)


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
