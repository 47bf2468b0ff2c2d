"""Grids: which numbers can be written down. Nothing else knows how a number is represented."""

import torch

from quantkit.grids.floating import FloatGrid
from quantkit.grids.integer import IntegerGrid, RangeSearch
from quantkit.types import TensorSpec

Grid = IntegerGrid | FloatGrid


def make_grid(spec: TensorSpec, scale_dtype: torch.dtype, search: RangeSearch | None, *, signed: bool) -> Grid:
    """The grid of a spec; scale_dtype and signed are for integers, scales of floats are positive float32 numbers."""
    if spec.element == "float":
        return FloatGrid(spec, search=search)
    return IntegerGrid(spec, scale_dtype, search, signed)
