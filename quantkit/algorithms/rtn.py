"""Round to nearest: fit each group's range, then round every weight to its grid."""

import torch
from torch import Tensor

from quantkit.errors import RunError
from quantkit.grids.integer import IntegerGrid
from quantkit.types import QuantizedWeight


def rtn(weight_NK: Tensor, grid: IntegerGrid, *, importance_K: Tensor | None = None) -> QuantizedWeight:
    """Quantize weight_NK (any float dtype) on `grid`.

    importance_K, E[x^2] of each input column, weights the grid's range search; it changes nothing where the grid is
    plain min-max. RunError where the weight holds NaN or Inf.
    """
    if not torch.isfinite(weight_NK.sum(dtype=torch.float32)):  # one pass, no [N, K] mask: NaN and Inf survive a sum
        raise RunError("the weight holds NaN or Inf")
    return grid.quantize(weight_NK, *grid.fit(weight_NK, importance_K))
