"""Grids: which numbers a weight can hold. No other package knows how a number is represented.

protocol.py     the interface of grids: Grid, and ColumnGrid for work on single columns
integer.py      integers with a scale for each group, row or tensor, and their range search
clip.py         integer ranges by each group's output error
floating.py     fp8, fp4, MX: elements and the scales they need
kquants.py      blocks of GGUF types
kquant_search.py  the scales and offsets of blocks, by search: rows in pieces, the weights of errors
scale_search.py   that of blocks with scales alone
offset_search.py  that of blocks with scales and offsets
block_types.py  what the blocks of each GGUF type hold
block_columns.py  blocks, column by column
columns.py      integers and floats of groups, column by column
elements.py     the numbers an element format has
dequantize.py   codes and scales back to weights
activations.py  inputs and cached keys and values, rounded as engines round them
packed_scales.py  integers whose scale and zero point share a word
"""

import torch
from torch import Tensor

from quantkit.grids.clip import ClippedGrid
from quantkit.grids.floating import FloatGrid
from quantkit.grids.integer import IntegerGrid, RangeSearch
from quantkit.grids.kquants import BlockGrid
from quantkit.grids.protocol import ColumnGrid as ColumnGrid
from quantkit.grids.protocol import Grid as Grid
from quantkit.grids.protocol import joined as joined
from quantkit.grids.protocol import rows_of as rows_of
from quantkit.types import TensorSpec


def make_grid(
    spec: TensorSpec,
    scale_dtype: torch.dtype,
    search: RangeSearch | None,
    *,
    signed: bool,
    blocks_Ggg: Tensor | None = None,
) -> Grid:
    """The grid of a spec; scale_dtype, search and signed are for integers, search for floats too. Scales of floats are
    positive float32 numbers, blocks of GGUF types have a search of their own.

    blocks_Ggg  X^T X of each group's own columns: integer ranges are then chosen by each group's output error
    """
    if spec.element == "block":
        return BlockGrid(spec)
    if spec.element == "float":
        return FloatGrid(spec, search=search)
    if blocks_Ggg is not None:
        return ClippedGrid(spec, scale_dtype, search, signed, blocks_Ggg=blocks_Ggg)
    return IntegerGrid(spec, scale_dtype, search, signed)
