"""Grids of groups, value = step * scale, column by column; integers and floats alike.

Shapes: N = out features, K = in features, G = groups of a row, B = some columns, g = columns of a group.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from quantkit.types import TensorSpec


class GroupScales(NamedTuple):
    """Parameters of a grid of groups: scale_NG in the dtype it is stored with, zero_NG uint8 (0 for floats)."""

    scale_NG: Tensor
    zero_NG: Tensor


class GroupGrid(Protocol):
    """What GroupColumns needs of a grid of groups."""

    @property
    def spec(self) -> TensorSpec: ...

    @property
    def scale_dtype(self) -> torch.dtype: ...

    @property
    def row_wise(self) -> bool: ...

    def limits(self, zero: Tensor) -> tuple[Tensor, Tensor]: ...

    def round_(self, steps: Tensor) -> Tensor: ...

    def codes(self, steps: Tensor, zero: Tensor) -> Tensor: ...

    def steps(self, codes: Tensor, zero: Tensor) -> Tensor: ...

    def storable(self, scale: Tensor) -> Tensor: ...


class GroupColumns:
    """The ColumnGrid of a grid of groups: a step is a code less its zero point, the parameter that moves the scale."""

    def __init__(self, grid: GroupGrid, parameters: GroupScales, K: int, dtype: torch.dtype) -> None:
        self.grid, self.span, self.value_dtype = grid, grid.spec.columns(K), grid.scale_dtype
        self.scale_GN, self.zero_GN = (t.mT.to(dtype).contiguous() for t in parameters)
        self.inverse_GN, (self.low_GN, self.high_GN) = 1 / self.scale_GN, grid.limits(self.zero_GN)

    def nearest_(self, wanted_N: Tensor, k: int, step_N: Tensor, value_N: Tensor) -> None:
        g = k // self.span
        torch.mul(wanted_N, self.inverse_GN[g], out=step_N)
        self.grid.round_(torch.clamp(step_N, self.low_GN[g], self.high_GN[g], out=step_N))
        torch.mul(step_N, self.scale_GN[g], out=value_N)  # rounds as `decode` does: once, to the stored dtype

    def values(self, step_gN: Tensor, k: int) -> Tensor:
        return (step_gN * self.scale_GN[k // self.span]).to(self.value_dtype).to(step_gN.dtype)

    def codes(self, step_BN: Tensor, columns_B: Tensor) -> Tensor:
        return self.grid.codes(step_BN, self.zero_GN[columns_B // self.span])

    def steps(self, codes_BN: Tensor, columns_B: Tensor) -> Tensor:
        return self.grid.steps(codes_BN, self.zero_GN[columns_B // self.span])

    def slopes(self, step_gN: Tensor, k: int) -> Sequence[Tensor]:
        return (step_gN,) if self.grid.row_wise else ()

    def shift(self, k: int, i: int, by_N: Tensor) -> Tensor:
        g = k // self.span
        old_N = self.scale_GN[g].clone()
        moved_N = self.grid.storable(old_N + by_N)
        # never across zero: the format may not allow negative scales
        self._set_scale(g, torch.where(moved_N * old_N > 0, moved_N, old_N))
        return old_N

    def put_back(self, k: int, i: int, old_N: Tensor, where_N: Tensor) -> None:
        g = k // self.span
        self._set_scale(g, torch.where(where_N, old_N, self.scale_GN[g]))

    def put(self, k: int, parameters: GroupScales) -> None:
        g = k // self.span
        self.zero_GN[g] = parameters.zero_NG[:, 0]
        self.low_GN[g], self.high_GN[g] = self.grid.limits(self.zero_GN[g])
        self._set_scale(g, parameters.scale_NG[:, 0])

    def parameters(self) -> GroupScales:
        scale_NG = self.scale_GN.mT.to(self.value_dtype).contiguous()
        return GroupScales(scale_NG, self.zero_GN.mT.to(torch.uint8).contiguous())

    def _set_scale(self, g: int, scale_N: Tensor) -> None:
        self.scale_GN[g] = scale_N
        self.inverse_GN[g] = 1 / self.scale_GN[g]
