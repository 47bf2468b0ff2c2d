"""The interface between algorithms and grids.

A grid says which numbers a weight can hold. Algorithms ask it for parameters that fit a weight (ranges, scales,
offsets), for the codes of weights and the values of codes, and know nothing else: parameters are tensors they may cut
and join by rows, never numbers they calculate with.

    fit(w, importance) -> parameters     encode(w, parameters) -> codes     decode(codes, parameters) -> w

An algorithm that chooses codes column by column works on `by_column(parameters)`, which holds the same parameters with
the numbers of a column side by side.

Shapes: N = out features, K = in features, B = some columns, g = columns of one span.
"""

from collections.abc import Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from quantkit.types import QuantizedWeight

P = TypeVar("P", bound=tuple[Tensor, ...])  # parameters: a NamedTuple of tensors with a row for each row of the weight


class ColumnGrid(Protocol[P]):
    """The numbers every column of one weight can hold.

    span         columns whose parameters belong together; spans start at the multiples of it, the last may be cut short
    value_dtype  what decoded values are rounded to

    A column k is an index into the weight's own order of columns. Between two calls a code is a "step": a float in the
    dtype of the work, of which only the grid knows what it stands for.
    """

    @property
    def span(self) -> int: ...

    @property
    def value_dtype(self) -> torch.dtype: ...

    def nearest_(self, wanted_N: Tensor, k: int, step_N: Tensor, value_N: Tensor) -> None:
        """Write the numbers of column k nearest to wanted_N into value_N (value_dtype), their steps into step_N.

        step_N may be wanted_N itself.
        """
        ...

    def values(self, step_gN: Tensor, k: int) -> Tensor:
        """Decoded values [g, N] of steps of the span that starts at column k, in step_gN's dtype."""
        ...

    def codes(self, step_BN: Tensor, columns_B: Tensor) -> Tensor:
        """Codes (uint8) [B, N] of steps in these columns (int64)."""
        ...

    def steps(self, codes_BN: Tensor, columns_B: Tensor) -> Tensor:
        """The inverse of `codes`, in the dtype of the work."""
        ...

    def slopes(self, step_gN: Tensor, k: int) -> Sequence[Tensor]:
        """For each parameter of the span at k that may move alone: how its decoded values change with it, [g, N].

        Values are linear in each of them. One that moves all values of a row alike is expanded over the columns (its
        stride is 0). Empty where rows share their parameters.
        """
        ...

    def shift(self, k: int, i: int, by_N: Tensor) -> Tensor:
        """Move the i-th parameter of the span at k by about by_N, to the nearest that can be stored.

        It stays where such a move is not allowed. Returns what it was, for `put_back`, which must follow: `values` goes
        by the new parameter at once, `nearest_` from then on.
        """
        ...

    def put_back(self, k: int, i: int, old_N: Tensor, where_N: Tensor) -> None:
        """Undo a shift in the rows where where_N (bool) is true."""
        ...

    def put(self, k: int, parameters: P) -> None:
        """Replace the parameters of the span that starts at column k by those of a fit of its columns alone."""
        ...

    def parameters(self) -> P:
        """All parameters as they are now."""
        ...


class Grid(Protocol[P]):
    """Which numbers a weight can hold. Grids are immutable and know no weight."""

    @property
    def row_wise(self) -> bool:
        """Whether a row's parameters come from that row alone (given what `for_tensors` found)."""
        ...

    def for_tensors(self, weights: Sequence[Tensor], importance_K: Tensor | None = None) -> "Grid[P]":
        """This grid with what weights [N_i, K] that an engine fuses must have in common; once found, it stays."""
        ...

    def fit(self, w_NK: Tensor, importance_K: Tensor | None = None) -> P:
        """Parameters for a weight [N, K] of any float dtype; NaN and Inf in it show in them.

        importance_K, [K] and non-negative, weights each column's squared error.
        """
        ...

    def encode(self, w_NK: Tensor, parameters: P) -> Tensor:
        """Codes (uint8) [N, K] of the nearest numbers."""
        ...

    def decode(self, codes_NK: Tensor, parameters: P) -> Tensor:
        """The numbers [N, K] that codes stand for, in the dtype engines compute them in."""
        ...

    def weight(self, codes_NK: Tensor, parameters: P) -> QuantizedWeight:
        """Codes and parameters as formats take them."""
        ...

    def by_column(self, parameters: P, K: int, dtype: torch.dtype) -> ColumnGrid[P]:
        """A copy of the parameters of a weight with K columns for work on columns in `dtype` (float32 or float64)."""
        ...


def rows_of(parameters: P, rows: Tensor) -> P:
    """The parameters of some rows (int64)."""
    return type(parameters)(*(t[rows] for t in parameters))


def joined(parts: Sequence[P]) -> P:
    """The parameters of weights stacked upon each other."""
    return parts[0] if len(parts) == 1 else type(parts[0])(*(torch.cat(column) for column in zip(*parts, strict=True)))
