"""Coordinate descent after GPTQ: the same error, one code or one scale at a time, each at its exact minimum.

GPTQ rounds a column knowing the errors made so far; afterwards all of them are known. With A the damped H,
J = tr(E A E^T) and the gradient g = E A of one row, moving a weight's rounded value by d changes J by
d^2 A_kk - 2 d g_k: the best code is the nearest to q_k + g_k / A_kk. Moving a group's scale by t moves its values by
t c (c = codes less zero): the best scale is s + (c . g) / (c A c). Both never raise J (but for the rounding of the
decoded value to its dtype), and rows are independent of each other. A sweep visits the groups in turn: first the
scale, then the codes. It costs one matrix product of 2 N K^2 operations, twice what GPTQ's walk takes.

Shapes: as in gptq.py; B = columns of a block (whole groups).
"""

import torch
from torch import Tensor

from quantkit.grids import Grid
from quantkit.grids.elements import steps_of

LEAF = 16


def sweep(
    error_KN: Tensor,
    codes_KN: Tensor,
    scale_GN: Tensor,
    zero_GN: Tensor,
    matrix_KK: Tensor,
    order_K: Tensor,
    grid: Grid,
    *,
    block_size: int = 128,
) -> Tensor:
    """One sweep, in place on error_KN (target - Q), codes_KN (uint8) and scale_GN; all in the order of `order_K`.

    matrix_KK is the damped H in that order too; scale_GN holds storable values in error_KN's dtype, zero_GN likewise.
    Returns by how much each row's J changed [N] (negative is better).
    """
    K, N = error_KN.shape
    G = len(scale_GN)
    size = grid.spec.columns(K)
    place_K = torch.argsort(order_K)
    group_K = order_K // size
    change_N = error_KN.new_zeros(N)
    step = max(1, block_size // size)
    for first in range(0, G, step):
        groups = range(first, min(first + step, G))
        places_B = place_K[first * size : min(groups.stop * size, K)]
        rows_BK = matrix_KK[places_B]
        matrix_BB = rows_BK[:, places_B]
        gradient_BN = rows_BK @ error_KN
        error_BN = error_KN[places_B]
        code_BN = steps_of(codes_KN[places_B], grid.spec, zero_GN[group_K[places_B]])
        for g in groups:
            inside = slice((g - first) * size, min((g - first + 1) * size, len(places_B)))
            code_gN = code_BN[inside]
            value_gN, moved_gN = _decoded(code_gN, scale_GN[g], grid), torch.zeros_like(code_gN)
            if grid.spec.scale_rows == 1:  # a scale that rows share is no row's own to move
                moved_gN = _move_scale(gradient_BN, code_gN, value_gN, scale_GN[g], matrix_BB, inside, grid, change_N)
                value_gN = value_gN + moved_gN
            matrix_gg = matrix_BB[inside, inside]
            moved_gN += _move_codes(
                gradient_BN[inside], code_gN, value_gN, scale_GN[g], zero_GN[g], matrix_gg, grid, change_N
            )
            gradient_BN[inside.stop :].addmm_(matrix_BB[inside.stop :, inside], moved_gN, alpha=-1)
            error_BN[inside] -= moved_gN
        error_KN[places_B] = error_BN
        codes_KN[places_B] = grid.codes(code_BN, zero_GN[group_K[places_B]])
    return change_N


def _decoded(code_gN: Tensor, scale_N: Tensor, grid: Grid) -> Tensor:
    return (code_gN * scale_N).to(grid.scale_dtype).to(code_gN.dtype)


def _move_scale(
    gradient_BN: Tensor,
    code_gN: Tensor,
    before_gN: Tensor,
    scale_N: Tensor,
    matrix_BB: Tensor,
    inside: slice,
    grid: Grid,
    change_N: Tensor,
) -> Tensor:
    """Put the scale where J is least, if that still helps once it is storable; returns how the values moved."""
    matrix_gg, gradient_gN = matrix_BB[inside, inside], gradient_BN[inside]
    curve_N = (matrix_gg @ code_gN).mul_(code_gN).sum(0).clamp_(min=torch.finfo(scale_N.dtype).tiny)
    better_N = grid.storable(scale_N + (code_gN * gradient_gN).sum(0) / curve_N)
    moved_gN = _decoded(code_gN, better_N, grid).sub_(before_gN)
    pull_gN = matrix_gg @ moved_gN
    gain_N = (pull_gN - 2 * gradient_gN).mul_(moved_gN).sum(0)
    keep_N = (gain_N < 0) & (better_N * scale_N > 0)  # never across zero: the format may forbid negative scales
    moved_gN *= keep_N
    change_N += gain_N * keep_N
    scale_N.copy_(torch.where(keep_N, better_N, scale_N))
    gradient_gN.sub_(pull_gN.mul_(keep_N))
    return moved_gN


def _move_codes(
    gradient_gN: Tensor,
    code_gN: Tensor,
    value_gN: Tensor,
    scale_N: Tensor,
    zero_N: Tensor,
    matrix_gg: Tensor,
    grid: Grid,
    change_N: Tensor,
) -> Tensor:
    """Each column's best code in turn, the later ones seeing the earlier ones' moves; returns how the values moved."""
    size = len(code_gN)
    inverse_N, (low_N, high_N) = 1 / scale_N, grid.limits(zero_N)
    rounded_N = torch.empty_like(scale_N, dtype=grid.scale_dtype)
    pull_K = (1 / matrix_gg.diagonal()).tolist()
    moved_gN = torch.empty_like(value_gN)
    for start in range(0, size, LEAF):
        stop = min(start + LEAF, size)
        if start:
            gradient_gN[start:stop].addmm_(matrix_gg[start:stop, :start], moved_gN[:start], alpha=-1)
        for k in range(start, stop):
            wanted_N, code_N, moved_N = gradient_gN[k], code_gN[k], moved_gN[k]
            if k > start:
                wanted_N.addmv_(moved_gN[start:k].mT, matrix_gg[k, start:k], alpha=-1)
            torch.add(value_gN[k], wanted_N, alpha=pull_K[k], out=code_N).mul_(inverse_N)
            grid.round_(torch.clamp(code_N, low_N, high_N, out=code_N))
            torch.mul(code_N, scale_N, out=rounded_N)
            torch.sub(rounded_N, value_gN[k], out=moved_N)
        gain_N = moved_gN[start:stop] * matrix_gg.diagonal()[start:stop, None]
        change_N += gain_N.sub_(gradient_gN[start:stop], alpha=2).mul_(moved_gN[start:stop]).sum(0)
    return moved_gN
