"""Round to nearest: fit each group's range, then round every weight to its grid."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quantkit.algorithms.interface import Evidence, Needs, Quantized
from quantkit.errors import RunError
from quantkit.grids import BlockGrid, Grid
from quantkit.grids.dequantize import (
    dequantize,
)
from quantkit.grids.integer import CHUNK
from quantkit.types import QuantizedWeight, TensorSpec, block_spec

MEASURED = 1 << 22  # elements whose error is measured, about
LARGEST_BLOCK = 256  # columns of a group whose range can look at its own part of the Hessian


def needs(options: Mapping[str, Any], spec: TensorSpec) -> Needs:
    """Diagonal blocks of the Hessian for integer ranges by output error."""
    grouped = spec.element == "int" and spec.scale_rows == 1 and 0 < spec.group_size <= LARGEST_BLOCK
    return Needs(block=spec.group_size if grouped and options["range"] == "output" else 0)


def quantize(weights: Sequence[Tensor], evidence: Evidence, grid: Grid, options: Mapping[str, Any]) -> list[Quantized]:
    """Every weight rounded on its own; only what the grid wants common to all of them is found for all."""
    grid = grid.for_tensors(weights, evidence.importance_K)
    results = []
    for weight_NK in weights:
        q = rtn(weight_NK, grid, importance_K=evidence.importance_K)
        results.append(Quantized(q, relative_error(weight_NK, q, evidence.importance_K)))
    return results


def rtn(weight_NK: Tensor, grid: Grid, *, importance_K: Tensor | None = None) -> QuantizedWeight:
    """Quantize weight_NK (any float dtype) on `grid`.

    importance_K, E[x^2] of each input column, weights the grid's range search; it changes nothing where the grid is
    plain min-max. What a grid has for the whole tensor comes from this weight, unless `for_tensors` found it before.
    RunError where the weight holds NaN or Inf.
    """
    grid = grid.for_tensors([weight_NK], importance_K)
    fitted = grid.fit(weight_NK, importance_K)
    if not all(torch.isfinite(t.sum(dtype=torch.float32)) for t in fitted):  # NaN and Inf in the weight reach them
        raise RunError("the weight holds NaN or Inf")
    return grid.weight(grid.encode(weight_NK, fitted), fitted)


def round_to_type(weight_NK: Tensor, name: str, importance_K: Tensor | None = None) -> QuantizedWeight:
    """A weight of any float dtype rounded to a quantized GGUF type, by its name; as `rtn` otherwise."""
    return rtn(weight_NK, BlockGrid(block_spec(name)), importance_K=importance_K)


def relative_error(weight_NK: Tensor, q: QuantizedWeight, importance_K: Tensor | None = None) -> float:
    """Expected squared output error over output energy when inputs are uncorrelated: sum h (w - q)^2 / sum h w^2.

    importance_K is h = E[x^2], [K]; None counts all columns alike. Large weights are measured on a sample of rows.
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
