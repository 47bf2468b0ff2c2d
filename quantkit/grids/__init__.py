"""Grids: which numbers can be written down. Nothing else knows how a number is represented.

integer.py      integers with a scale for each group, row or tensor, and their range search
floating.py     fp8, fp4, MX: elements and the scales they need
elements.py     the numbers an element format has
dequantize.py   codes and scales back to weights
activations.py  inputs and cached keys and values, rounded as engines round them
"""

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
