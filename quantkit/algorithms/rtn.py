"""Round to nearest: fit each group's range, then round every weight to its grid."""

import torch
from torch import Tensor

from quantkit.errors import RunError
from quantkit.grids import Grid
from quantkit.grids.dequantize import (
    dequantize,
)
from quantkit.grids.integer import CHUNK
from quantkit.types import QuantizedWeight

MEASURED = 1 << 22  # elements whose error is looked at, about


def rtn(weight_NK: Tensor, grid: Grid, *, importance_K: Tensor | None = None) -> QuantizedWeight:
    """Quantize weight_NK (any float dtype) on `grid`.

    importance_K, E[x^2] of each input column, weights the grid's range search; it changes nothing where the grid is
    plain min-max. A grid with something for the whole tensor takes it from this weight unless `for_tensors` gave it.
    RunError where the weight holds NaN or Inf.
    """
    grid = grid.for_tensors([weight_NK], importance_K)
    scale_NG, zero_NG = grid.fit(weight_NK, importance_K)
    if not torch.isfinite(scale_NG.sum(dtype=torch.float32)):  # no pass of its own: NaN and Inf survive fitting a range
        raise RunError("the weight holds NaN or Inf")
    return grid.quantize(weight_NK, scale_NG, zero_NG)


def relative_error(weight_NK: Tensor, q: QuantizedWeight, importance_K: Tensor | None = None) -> float:
    """Expected squared output error over output energy when inputs are uncorrelated: sum h (w - q)^2 / sum h w^2.

    importance_K is h = E[x^2], [K]; None counts all columns alike. Of large weights some rows stand for all.
    """
    lost = energy = torch.zeros((), dtype=torch.float64, device=weight_NK.device)
    rows = max(1, CHUNK // weight_NK.shape[1])
    for start in range(0, len(weight_NK), rows * -(-weight_NK.numel() // MEASURED)):
        w_nK = weight_NK[start : start + rows].float()
        error_nK = dequantize(q.rows(start, start + rows)).float().sub_(w_nK)
        if importance_K is not None:
            root_K = importance_K.to(w_nK).sqrt()
            w_nK, error_nK = w_nK * root_K, error_nK.mul_(root_K)
        lost = lost + torch.linalg.vector_norm(error_nK).double().square()
        energy = energy + torch.linalg.vector_norm(w_nK).double().square()
    return (lost / energy).item() if energy else 0.0
