"""Coordinate descent after GPTQ: the same error, one code or one scale at a time, each at its exact minimum.

GPTQ rounds a column knowing the errors made so far; afterwards all of them are known. With A the damped H,
J = tr(E A E^T) and the gradient g = E A of one row, moving a weight's rounded value by d changes J by
d^2 A_kk - 2 d g_k: the best code is the nearest to q_k + g_k / A_kk. Moving a parameter of a group (its scale, say) by
t moves the group's values by t c (for a scale, c = codes minus zero): the best t is (c . g) / (c A c). Both never raise
J (but for the rounding of the decoded value to its dtype), and rows are independent of each other. A sweep visits the
groups in turn: first the parameters, then the codes. It costs one matrix product of 2 N K^2 operations, twice what
GPTQ's walk takes.

Shapes: N = out features, K = in features, B = columns of a block (whole groups), g = columns of a group.
Tensors named _KN are transposed, so that one column of the weight is one run of memory.
"""

import torch
from torch import Tensor

from quantkit.grids import ColumnGrid

LEAF = 16


def sweep(
    error_KN: Tensor,
    codes_KN: Tensor,
    columns: ColumnGrid,
    matrix_KK: Tensor,
    order_K: Tensor,
    *,
    block_size: int = 128,
) -> Tensor:
    """By how much one sweep changed each row's J [N] (negative is better).

    In place on error_KN (target - Q), codes_KN (uint8) and the parameters of `columns`. The rows of error_KN and
    codes_KN, and both sides of matrix_KK (the damped H), are in the order of order_K.
    """
    K, N = error_KN.shape
    size = columns.span
    place_K = torch.argsort(order_K)
    change_N = error_KN.new_zeros(N)
    step = size * max(1, block_size // size)
    for start in range(0, K, step):
        places_B = place_K[start : start + step]
        rows_BK = matrix_KK[places_B]
        matrix_BB = rows_BK[:, places_B]
        gradient_BN = rows_BK @ error_KN
        error_BN = error_KN[places_B]
        step_BN = columns.steps(codes_KN[places_B], order_K[places_B])
        for first in range(0, len(places_B), size):
            inside = slice(first, min(first + size, len(places_B)))
            step_gN, gradient_gN, matrix_gg = step_BN[inside], gradient_BN[inside], matrix_BB[inside, inside]
            value_gN = columns.values(step_gN, start + first)
            moved_gN = _move_parameters(gradient_gN, step_gN, value_gN, matrix_gg, columns, start + first, change_N)
            moved_gN += _move_codes(gradient_gN, step_gN, value_gN, matrix_gg, columns, start + first, change_N)
            gradient_BN[inside.stop :].addmm_(matrix_BB[inside.stop :, inside], moved_gN, alpha=-1)
            error_BN[inside] -= moved_gN
        error_KN[places_B] = error_BN
        codes_KN[places_B] = columns.codes(step_BN, order_K[places_B])
    return change_N


def _move_parameters(
    gradient_gN: Tensor,
    step_gN: Tensor,
    value_gN: Tensor,
    matrix_gg: Tensor,
    columns: ColumnGrid,
    k: int,
    change_N: Tensor,
) -> Tensor:
    """Put each parameter where J is least, if that still helps once it is storable; returns how the values moved."""
    moved_gN, tiny = torch.zeros_like(step_gN), torch.finfo(step_gN.dtype).tiny
    for i, slope_gN in enumerate(columns.slopes(step_gN, k)):
        if slope_gN.stride(0) == 0:  # all values of a row move by the same: sums over the columns say all
            slope_N, pull_g, gradient_N = slope_gN[0], matrix_gg.sum(1), gradient_gN.sum(0)
            curve_N = slope_N.square().mul_(pull_g.sum()).clamp_(min=tiny)
            old_N = columns.shift(k, i, slope_N * gradient_N / curve_N)
            tried_N = columns.values(step_gN[:1], k)[0].sub_(value_gN[0])
            gain_N = (tried_N * pull_g.sum()).sub_(gradient_N, alpha=2).mul_(tried_N)
            keep_N = gain_N < 0
            columns.put_back(k, i, old_N, ~keep_N)
            gradient_gN.addr_(pull_g, tried_N.mul_(keep_N), alpha=-1)
            tried_gN = columns.values(step_gN, k).sub_(value_gN)
        else:
            curve_N = (matrix_gg @ slope_gN).mul_(slope_gN).sum(0).clamp_(min=tiny)
            old_N = columns.shift(k, i, (slope_gN * gradient_gN).sum(0) / curve_N)
            tried_gN = columns.values(step_gN, k).sub_(value_gN)
            pull_gN = matrix_gg @ tried_gN
            gain_N = pull_gN.sub(gradient_gN, alpha=2).mul_(tried_gN).sum(0)
            keep_N = gain_N < 0
            columns.put_back(k, i, old_N, ~keep_N)
            gradient_gN.sub_(pull_gN.mul_(keep_N))
            tried_gN *= keep_N
        change_N += gain_N * keep_N
        value_gN += tried_gN
        moved_gN += tried_gN
    return moved_gN


def _move_codes(
    gradient_gN: Tensor,
    step_gN: Tensor,
    value_gN: Tensor,
    matrix_gg: Tensor,
    columns: ColumnGrid,
    k: int,
    change_N: Tensor,
) -> Tensor:
    """Each column's best code in turn, the later ones seeing the earlier ones' moves; returns how the values moved."""
    size = len(step_gN)
    rounded_N = torch.empty_like(step_gN[0], dtype=columns.value_dtype)
    pull_g = (1 / matrix_gg.diagonal()).tolist()
    moved_gN = torch.empty_like(value_gN)
    for start in range(0, size, LEAF):
        stop = min(start + LEAF, size)
        if start:
            gradient_gN[start:stop].addmm_(matrix_gg[start:stop, :start], moved_gN[:start], alpha=-1)
        for j in range(start, stop):
            wanted_N, step_N = gradient_gN[j], step_gN[j]
            if j > start:
                wanted_N.addmv_(moved_gN[start:j].mT, matrix_gg[j, start:j], alpha=-1)
            torch.add(value_gN[j], wanted_N, alpha=pull_g[j], out=step_N)
            columns.nearest_(step_N, k + j, step_N, rounded_N)
            torch.sub(rounded_N, value_gN[j], out=moved_gN[j])
        gain_N = moved_gN[start:stop] * matrix_gg.diagonal()[start:stop, None]
        change_N += gain_N.sub_(gradient_gN[start:stop], alpha=2).mul_(moved_gN[start:stop]).sum(0)
    return moved_gN
