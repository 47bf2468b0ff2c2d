"""The Grid protocol is enough for GPTQ and its sweeps: a grid like llama.cpp's k-quants, unknown to both, runs on them.

Its numbers are d s c - e m: 4-bit codes c, 6-bit scales s and minimums m of 16 columns, floats d and e of 64 columns.
So an offset is no multiple of a scale, and scales are not free to move.

Shapes: N = out features, K = in features, S = super-blocks of a row, G = groups of a row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from quantkit.algorithms.gptq import factor, gptq
from quantkit.grids import ColumnGrid

GROUP, SUPER = 16, 64
EACH = SUPER // GROUP


class Parameters(NamedTuple):
    """d and e float32 [N, S], s and m uint8 [N, G]."""

    d_NS: Tensor
    e_NS: Tensor
    s_NG: Tensor
    m_NG: Tensor

    def wide(self) -> tuple[Tensor, Tensor]:
        """Scale and minimum of each group [N, G]."""
        d_NG, e_NG = (t.repeat_interleave(EACH, 1) for t in (self.d_NS, self.e_NS))
        return d_NG * self.s_NG, e_NG * self.m_NG


class Toy:
    """A Grid of such numbers."""

    row_wise = True

    def for_tensors(self, weights: Sequence[Tensor], importance_K: Tensor | None = None) -> "Toy":
        return self

    def fit(self, w_NK: Tensor, importance_K: Tensor | None = None) -> Parameters:
        w_NGg = w_NK.float().reshape(len(w_NK), -1, GROUP)
        low_NG = w_NGg.amin(2).clamp(max=0)
        scale_NG, low_NG = (w_NGg.amax(2) - low_NG) / 15, -low_NG
        d_NS, e_NS = (t.reshape(len(t), -1, EACH).amax(2) / 63 for t in (scale_NG, low_NG))
        d_NG, e_NG = (t.repeat_interleave(EACH, 1).clamp(min=1e-20) for t in (d_NS, e_NS))
        return Parameters(d_NS, e_NS, (scale_NG / d_NG).round().byte(), (low_NG / e_NG).round().byte())

    def encode(self, w_NK: Tensor, parameters: Parameters) -> Tensor:
        scale_NG, low_NG = parameters.wide()
        w_NGg = w_NK.reshape(len(w_NK), -1, GROUP)
        codes = ((w_NGg + low_NG[..., None]) / scale_NG[..., None].clamp(min=1e-20)).round().clamp(0, 15)
        return codes.byte().reshape(w_NK.shape)

    def decode(self, codes_NK: Tensor, parameters: Parameters) -> Tensor:
        scale_NG, low_NG = parameters.wide()
        codes_NGg = codes_NK.reshape(len(codes_NK), -1, GROUP).float()
        return (codes_NGg * scale_NG[..., None] - low_NG[..., None]).reshape(codes_NK.shape)

    def weight(self, codes_NK: Tensor, parameters: Parameters) -> tuple[Tensor, Parameters]:  # a format's own affair
        return codes_NK, parameters

    def by_column(self, parameters: Parameters, K: int, dtype: torch.dtype) -> "ToyColumns":
        return ToyColumns(parameters, dtype)


class ToyColumns:
    """Its ColumnGrid: a step is a code."""

    span, value_dtype = GROUP, torch.float32

    def __init__(self, parameters: Parameters, dtype: torch.dtype) -> None:
        self.kept, self.dtype = Parameters(*(t.clone() for t in parameters)), dtype

    def _group(self, k: int) -> tuple[Tensor, Tensor]:
        scale_NG, low_NG = self.kept.wide()
        return scale_NG[:, k // GROUP].to(self.dtype), low_NG[:, k // GROUP].to(self.dtype)

    def nearest_(self, wanted_N: Tensor, k: int, step_N: Tensor, value_N: Tensor) -> None:
        scale_N, low_N = self._group(k)
        step_N.copy_(((wanted_N + low_N) / scale_N.clamp(min=1e-20)).round().clamp(0, 15))
        value_N.copy_(step_N * scale_N - low_N)

    def values(self, step_gN: Tensor, k: int) -> Tensor:
        scale_N, low_N = self._group(k)
        return (step_gN * scale_N - low_N).to(self.value_dtype).to(step_gN.dtype)

    def codes(self, step_BN: Tensor, columns_B: Tensor) -> Tensor:
        return step_BN.byte()

    def steps(self, codes_BN: Tensor, columns_B: Tensor) -> Tensor:
        return codes_BN.to(self.dtype)

    def slopes(self, step_gN: Tensor, k: int) -> Sequence[Tensor]:
        return step_gN, -torch.ones_like(step_gN)

    def shift(self, k: int, i: int, by_N: Tensor) -> Tensor:
        unit_N = (self.kept.d_NS, self.kept.e_NS)[i][:, k // SUPER].clamp(min=1e-20)
        small_N = (self.kept.s_NG, self.kept.m_NG)[i][:, k // GROUP]
        old_N = small_N.clone()
        small_N.copy_((old_N + by_N / unit_N).round().clamp(0, 63).byte())
        return old_N

    def put_back(self, k: int, i: int, old_N: Tensor, where_N: Tensor) -> None:
        small_N = (self.kept.s_NG, self.kept.m_NG)[i][:, k // GROUP]
        small_N.copy_(torch.where(where_N, old_N, small_N))

    def put(self, k: int, parameters: Parameters) -> None:
        raise AssertionError("super-blocks are fitted whole")

    def parameters(self) -> Parameters:
        return self.kept


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    """w [12, 128] with ranges far from zero, and X^T X of correlated inputs, float64."""
    generator = torch.Generator().manual_seed(seed)
    w_NK = torch.randn(12, 128, generator=generator, dtype=torch.float64)
    w_NK += 1.7 * torch.randn(12, 8, generator=generator, dtype=torch.float64).repeat_interleave(16, 1)
    x_MK = torch.randn(600, 128, generator=generator, dtype=torch.float64)
    x_MK @= torch.eye(128) + 0.4 * torch.randn(128, 128, generator=generator, dtype=torch.float64) / 4
    return w_NK, x_MK.T @ x_MK


def textbook(w_NK: Tensor, h_KK: Tensor, grid: Toy, parameters: Parameters, order: list[int]) -> Tensor:
    """Round a column, move what is left by the inverse, drop it: no factor, no blocks, no protocol."""
    w_NK, left, codes_NK = w_NK.clone(), list(order), torch.empty(w_NK.shape, dtype=torch.uint8)
    scale_NG, low_NG = parameters.wide()
    while left:
        k = left[0]
        scale_N, low_N = scale_NG[:, k // GROUP].double(), low_NG[:, k // GROUP].double()
        code_N = ((w_NK[:, k] + low_N) / scale_N.clamp(min=1e-20)).round().clamp(0, 15)
        codes_NK[:, k] = code_N.byte()
        inverse = torch.linalg.inv(h_KK[left][:, left])
        w_NK[:, left] -= torch.outer((w_NK[:, k] - (code_N * scale_N - low_N)) / inverse[0, 0], inverse[0])
        left.pop(0)
    return codes_NK


def error(w_NK: Tensor, q_NK: Tensor, h_KK: Tensor) -> float:
    e_NK = w_NK - q_NK.double()
    return ((e_NK @ h_KK) * e_NK).sum().item()


def test_gptq_on_an_unknown_grid_is_the_textbook() -> None:
    w_NK, h_KK = data()
    (codes_NK, parameters), _ = gptq(w_NK, factor(h_KK, damping=0.01), Toy())  # type: ignore
    damped_KK = h_KK + 0.01 * h_KK.diagonal().mean() * torch.eye(128)
    order = torch.argsort(h_KK.diagonal(), descending=True).tolist()
    expected_NK = textbook(w_NK, damped_KK, Toy(), parameters, order)
    same = (codes_NK == expected_NK).double().mean().item()
    assert same > 0.995, f"{same:.4f} of the codes are equal"  # values are float32: a tie may fall the other way
    rounded_NK = Toy().decode(Toy().encode(w_NK, parameters), parameters)
    assert error(w_NK, Toy().decode(codes_NK, parameters), h_KK) < 0.7 * error(w_NK, rounded_NK, h_KK)


@pytest.mark.parametrize("seed", range(3))
def test_sweeps_move_what_the_grid_lets_them(seed: int) -> None:
    """Never worse by the error they minimise, and the parameters they move stay storable."""
    w_NK, h_KK = data(seed)
    found = {}
    for sweeps in (0, 2):
        (codes_NK, parameters), info = gptq(w_NK, factor(h_KK, keep_matrix=True), Toy(), sweeps=sweeps)  # type: ignore
        damped_KK = h_KK + torch.diag(torch.full((128,), info.damping * h_KK.diagonal().mean().item()).double())
        found[sweeps] = error(w_NK, Toy().decode(codes_NK, parameters), damped_KK)
        assert parameters.s_NG.dtype == torch.uint8
        assert int(parameters.s_NG.max()) <= 63
        torch.testing.assert_close(info.error_N.sum().item(), found[sweeps], rtol=1e-3, atol=0)
    assert found[2] < 0.98 * found[0]


def test_the_toy_is_a_column_grid() -> None:
    columns: ColumnGrid = Toy().by_column(Toy().fit(data()[0]), 128, torch.float64)
    step_gN = torch.arange(16.0, dtype=torch.float64)[:, None].repeat(1, 12)
    value_gN = columns.values(step_gN, 32)
    for i, slope_gN in enumerate(columns.slopes(step_gN, 32)):
        old_N = columns.shift(32, i, torch.full((12,), 0.2, dtype=torch.float64))
        moved_gN = columns.values(step_gN, 32) - value_gN
        by_N = moved_gN[5] / slope_gN[5]
        torch.testing.assert_close(moved_gN, by_N * slope_gN, rtol=1e-4, atol=1e-5)
        columns.put_back(32, i, old_N, torch.ones(12, dtype=torch.bool))
        assert torch.equal(columns.values(step_gN, 32), value_gN)
