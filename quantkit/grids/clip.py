"""Clipping (the second half of AWQ, arXiv:2306.00978): choose each group's range by the error of its output.

Cutting off a group's largest weights costs those and gains resolution for all others. With H_gg = X^T X of the group's
own columns, the search minimises E_g H_gg E_g^T, E_g = Q(W_g) - W_g: the part of the layer's output error
that a group's own range decides, correlations between the group's inputs included.

Shapes: N = out features, K = in features, S = candidates, G = groups of a row, g = columns of a group.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.errors import RunError, UserError
from quantkit.grids.columns import GroupScales
from quantkit.grids.integer import IntegerGrid

CHUNK = 1 << 22  # elements of candidate weights held at a time


@dataclass(frozen=True, slots=True)
class ClippedGrid(IntegerGrid):
    """An IntegerGrid of groups that fits ranges by each group's output error; blocks_Ggg as for `search_clip`."""

    blocks_Ggg: Tensor | None = None

    def fit(self, w_NK: Tensor, importance_K: Tensor | None = None) -> GroupScales:
        """Scale and zero point [N, G] of a weight [N, K]; importance_K is not used: the blocks hold it."""
        assert self.blocks_Ggg is not None
        return search_clip(w_NK, self.blocks_Ggg, self)


def search_clip(
    weight_NK: Tensor, blocks_Ggg: Tensor, grid: IntegerGrid, *, steps: int = 10, refits: int = 2
) -> GroupScales:
    """Scale and zero point [N, G] as from `IntegerGrid.fit`, with the least output error of each group.

    blocks_Ggg: X^T X of each group's own columns; any positive factor is fine.

    First both ends of the min-max range shrink together in `steps` steps to half of it (with either sign of the scale,
    where a symmetric grid may), then each end alone moves around the best, then the scale is solved for with the codes
    held, `refits` times. A candidate is taken only where it lowers E_g H_gg E_g^T: never worse than min-max.
    After an AWQ fold pass W s and the Hessian of x / s. For RTN only: GPTQ gives less error with `IntegerGrid.fit`.
    """
    K, G = weight_NK.shape[1], grid.spec.groups(weight_NK.shape[1])
    if blocks_Ggg.shape != (G, K // G, K // G):
        raise UserError(f"clip search: {K} columns in {G} groups do not fit Hessian blocks {tuple(blocks_Ggg.shape)}")
    if not torch.isfinite(blocks_Ggg.sum()) or not torch.isfinite(weight_NK.sum(dtype=torch.float32)):
        raise RunError("clip search: the weight or the inputs of this layer hold NaN or Inf")
    blocks_Ggg = blocks_Ggg.float()
    rows = max(1, CHUNK // (K * steps * 2))
    parts = [_clip(part_NK, blocks_Ggg, grid, steps, refits) for part_NK in weight_NK.split(rows)]
    scale_NG, zero_NG = (torch.cat(column) for column in zip(*parts, strict=True))
    return GroupScales(scale_NG, zero_NG)


def _clip(w_NK: Tensor, hessian_Ggg: Tensor, grid: IntegerGrid, steps: int, refits: int) -> tuple[Tensor, Tensor]:
    """search_clip for some rows, all their candidates at once."""
    N, G = len(w_NK), len(hessian_Ggg)
    w_GNg = w_NK.float().reshape(N, G, -1).transpose(0, 1).contiguous()
    low_GN, high_GN = w_GNg.amin(2).clamp(max=0), w_GNg.amax(2).clamp(min=0)
    ends = IntegerGrid(replace(grid.spec, group_size=2), grid.scale_dtype, None, grid.signed)
    signs = (1.0, -1.0) if grid.signed and grid.spec.symmetric else (1.0,)

    def grids(low_SGN: Tensor, high_SGN: Tensor, signs: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        """The min-max grids of ranges; symmetric ones in both signs, [S * signs, G, N]."""
        pairs_XE = torch.stack([low_SGN, high_SGN], -1).reshape(-1, 2)
        scale, zero = (t.reshape(low_SGN.shape) for t in ends.fit(pairs_XE))
        return torch.cat([sign * scale for sign in signs]), torch.cat([zero] * len(signs))

    def errors(scale_SGN: Tensor, zero_SGN: Tensor) -> Tensor:
        scale, zero = scale_SGN[..., None], zero_SGN[..., None]
        error_SGNg = grid.values_of(grid.codes_of(w_GNg, scale, zero), scale, zero).float().sub_(w_GNg)
        error_GXg = error_SGNg.transpose(0, 1).reshape(G, -1, error_SGNg.shape[-1])
        loss_GX = torch.bmm(error_GXg, hessian_Ggg).mul_(error_GXg).sum(2)
        return loss_GX.reshape(G, -1, N).transpose(0, 1)

    def pick(scale_SGN: Tensor, zero_SGN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss_SGN = errors(scale_SGN, zero_SGN)
        best_1GN = loss_SGN.argmin(0, keepdim=True)
        return scale_SGN.gather(0, best_1GN)[0], zero_SGN.gather(0, best_1GN)[0], best_1GN[0]

    shrink_S11 = torch.linspace(1, 0.5, steps, device=w_NK.device)[:, None, None]
    scale_GN, zero_GN, best_GN = pick(*grids(low_GN * shrink_S11, high_GN * shrink_S11, signs))
    shrink_GN = shrink_S11[best_GN % steps, 0, 0]
    around_S11 = torch.linspace(-0.25, 0.25, steps, device=w_NK.device)[:, None, None]
    still_S11 = torch.zeros_like(around_S11)
    ends_alone = [(around_S11, still_S11), (still_S11, around_S11)]
    moves = [(around_S11, around_S11)] if grid.spec.symmetric else ends_alone
    low_GN, high_GN = low_GN * shrink_GN, high_GN * shrink_GN
    for down_S11, up_S11 in moves:
        lows_SGN, highs_SGN = low_GN * (1 + down_S11), high_GN * (1 + up_S11)
        scale_SGN, zero_SGN = grids(lows_SGN, highs_SGN, (1.0,))
        if grid.spec.symmetric:
            scale_SGN = scale_SGN * scale_GN.sign()
        scale_GN, zero_GN, best_GN = pick(torch.cat([scale_GN[None], scale_SGN]), torch.cat([zero_GN[None], zero_SGN]))
        low_GN = torch.cat([low_GN[None], lows_SGN]).gather(0, best_GN[None])[0]
        high_GN = torch.cat([high_GN[None], highs_SGN]).gather(0, best_GN[None])[0]
    for _ in range(refits):
        code_GNg = grid.codes_of(w_GNg, scale_GN[..., None], zero_GN[..., None]).float() - zero_GN[..., None].float()
        seen_GNg = torch.bmm(code_GNg, hessian_Ggg)
        solved_GN = ((seen_GNg * w_GNg).sum(2) / (seen_GNg * code_GNg).sum(2)).to(grid.scale_dtype)
        usable_GN = torch.isfinite(solved_GN) & (solved_GN * scale_GN.sign() > torch.finfo(grid.scale_dtype).tiny)
        solved_GN = torch.where(usable_GN, solved_GN, scale_GN)
        scale_GN, zero_GN, _ = pick(torch.stack([scale_GN, solved_GN]), torch.stack([zero_GN, zero_GN]))
    return scale_GN.mT.contiguous(), zero_GN.mT.contiguous()
