"""GPTQ and coordinate descent on a grid they have never seen, by the protocol alone.

The grid is that of GGUF's Q4_K, smaller: w = d * scale * q - dmin * min. A super-block of 32 columns has two float16
numbers, d and dmin, and each of its four groups of 8 columns a 6-bit scale and a 6-bit min: scales of scales, and an
offset that is no multiple of the step. In the product a QuantizedWeight would carry `scale_NG` and `min_NG` as
d * scale and dmin * min, with the four stored numbers beside them; here codes and parameters are returned as they are.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from quantkit.algorithms.gptq import factor, gptq
from quantkit.algorithms.rtn import rtn
from quantkit.grids import ColumnGrid

SUPER, GROUP = 32, 8
PER = SUPER // GROUP
LEVELS, STEPS = 15, 63  # largest code; largest 6-bit scale or min


class KParameters(NamedTuple):
    """d and dmin float16 [N, S] of every super-block; scale and min uint8 [N, G] of every group."""

    d_NS: Tensor
    dmin_NS: Tensor
    scale_NG: Tensor
    min_NG: Tensor


def step_and_offset(p: KParameters, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Effective scale and offset [N, G] of every group."""
    d_NG, dmin_NG = (t.to(dtype).repeat_interleave(PER, 1) for t in (p.d_NS, p.dmin_NS))
    return d_NG * p.scale_NG.to(dtype), dmin_NG * p.min_NG.to(dtype)


class KGrid:
    """A Grid. Min-max groups; d and dmin so that the largest scale and min of a super-block have 6 bits."""

    row_wise = True

    def for_tensors(self, weights: Sequence[Tensor], importance_K: Tensor | None = None) -> "KGrid":
        return self

    def fit(self, w_NK: Tensor, importance_K: Tensor | None = None) -> KParameters:
        w_NSGg = w_NK.double().unflatten(1, (-1, PER, GROUP))
        low_NSG, high_NSG = w_NSGg.amin(3).clamp(max=0), w_NSGg.amax(3).clamp(min=0)
        scale_NSG = (high_NSG - low_NSG).clamp(min=1e-6) / LEVELS
        stored = []
        for value_NSG in (scale_NSG, -low_NSG):
            d_NS = (value_NSG.amax(2) / STEPS).clamp(min=1e-7).half()
            code_NSG = (value_NSG / d_NS.double()[..., None]).round().clamp(0, STEPS)
            stored.append((d_NS, code_NSG.to(torch.uint8).flatten(1)))
        (d_NS, scale_NG), (dmin_NS, min_NG) = stored
        return KParameters(d_NS, dmin_NS, scale_NG, min_NG)

    def encode(self, w_NK: Tensor, parameters: KParameters) -> Tensor:
        step_NG, offset_NG = step_and_offset(parameters, torch.float64)
        w_NGg = w_NK.double().unflatten(1, (-1, GROUP))
        steps = (w_NGg + offset_NG[..., None]) / step_NG[..., None]
        return steps.nan_to_num().round().clamp(0, LEVELS).to(torch.uint8).flatten(1)

    def decode(self, codes_NK: Tensor, parameters: KParameters) -> Tensor:
        step_NG, offset_NG = step_and_offset(parameters, torch.float64)
        codes_NGg = codes_NK.double().unflatten(1, (-1, GROUP))
        return (codes_NGg * step_NG[..., None] - offset_NG[..., None]).flatten(1).float()

    def weight(self, codes_NK: Tensor, parameters: KParameters) -> Any:
        return KWeight(codes_NK, parameters)

    def by_column(self, parameters: KParameters, K: int, dtype: torch.dtype) -> "KColumns":
        return KColumns(parameters, dtype)


class KWeight(NamedTuple):
    codes_NK: Tensor
    parameters: KParameters


class KColumns:
    """A ColumnGrid: the span is a super-block, the parameters that move alone are the 6-bit scales and mins in it."""

    span, value_dtype = SUPER, torch.float32

    def __init__(self, p: KParameters, dtype: torch.dtype) -> None:
        self.d_SN, self.dmin_SN = (t.mT.to(dtype).contiguous() for t in (p.d_NS, p.dmin_NS))
        self.scale_GN, self.min_GN = (t.mT.to(dtype).contiguous() for t in (p.scale_NG, p.min_NG))

    def _numbers(self, k: int) -> tuple[Tensor, Tensor]:
        s, g = k // SUPER, k // GROUP
        return self.d_SN[s] * self.scale_GN[g], self.dmin_SN[s] * self.min_GN[g]

    def nearest_(self, wanted_N: Tensor, k: int, step_N: Tensor, value_N: Tensor) -> None:
        scale_N, offset_N = self._numbers(k)
        step_N.copy_(((wanted_N + offset_N) / scale_N).nan_to_num_().round_().clamp_(0, LEVELS))
        value_N.copy_(step_N * scale_N - offset_N)

    def values(self, step_gN: Tensor, k: int) -> Tensor:
        numbers = [self._numbers(k + j) for j in range(len(step_gN))]
        return torch.stack([step_N * s_N - o_N for step_N, (s_N, o_N) in zip(step_gN, numbers, strict=True)])

    def codes(self, step_BN: Tensor, columns_B: Tensor) -> Tensor:
        return step_BN.to(torch.uint8)

    def steps(self, codes_BN: Tensor, columns_B: Tensor) -> Tensor:
        return codes_BN.to(self.d_SN.dtype)

    def _movable(self, k: int, i: int) -> tuple[Tensor, int]:
        """The i-th number of a span: its scales, then its mins."""
        return (self.scale_GN if i < PER else self.min_GN), k // GROUP + i % PER

    def slopes(self, step_gN: Tensor, k: int) -> list[Tensor]:
        s, found = k // SUPER, []
        for slope_gN in (step_gN * self.d_SN[s], -self.dmin_SN[s].expand_as(step_gN)):
            for g in range(PER):
                part_gN = torch.zeros_like(step_gN)
                part_gN[g * GROUP : (g + 1) * GROUP] = slope_gN[g * GROUP : (g + 1) * GROUP]
                found.append(part_gN)
        return found

    def shift(self, k: int, i: int, by_N: Tensor) -> Tensor:
        numbers_GN, g = self._movable(k, i)
        old_N = numbers_GN[g].clone()
        numbers_GN[g] = (old_N + by_N).round().clamp(0, STEPS)
        return old_N

    def put_back(self, k: int, i: int, old_N: Tensor, where_N: Tensor) -> None:
        numbers_GN, g = self._movable(k, i)
        numbers_GN[g] = torch.where(where_N, old_N, numbers_GN[g])

    def put(self, k: int, parameters: KParameters) -> None:
        s, g = k // SUPER, k // GROUP
        self.d_SN[s], self.dmin_SN[s] = parameters.d_NS[:, 0], parameters.dmin_NS[:, 0]
        self.scale_GN[g : g + PER], self.min_GN[g : g + PER] = parameters.scale_NG.mT, parameters.min_NG.mT

    def parameters(self) -> KParameters:
        halves = (t.mT.half() for t in (self.d_SN, self.dmin_SN))
        return KParameters(*halves, *(t.mT.to(torch.uint8) for t in (self.scale_GN, self.min_GN)))


@pytest.fixture
def layer() -> tuple[Tensor, Tensor]:
    """A weight [24, 96] with a mean far from 0 and its damped Hessian, float64."""
    draw = torch.Generator().manual_seed(0)
    w_NK = torch.randn(24, 96, generator=draw, dtype=torch.float64) + 0.7
    x_MK = torch.randn(400, 96, generator=draw, dtype=torch.float64)
    x_MK = x_MK @ (torch.eye(96) + 0.2 * torch.randn(96, 96, generator=draw, dtype=torch.float64))
    h_KK = x_MK.mT @ x_MK
    return w_NK, h_KK + 0.01 * h_KK.diagonal().mean() * torch.eye(96)


def run(layer: tuple[Tensor, Tensor], **options: Any) -> tuple[KWeight, Any]:
    w_NK, a_KK = layer
    act_order = options.pop("act_order", True)
    found, info = gptq(w_NK, factor(a_KK, damping=0.0, act_order=act_order, keep_matrix=True), KGrid(), **options)
    assert isinstance(found, KWeight)
    return found, info


def error(layer: tuple[Tensor, Tensor], found: KWeight) -> Tensor:
    """tr(E A E^T) of every row, float64."""
    w_NK, a_KK = layer
    e_NK = w_NK - value(found)
    return ((e_NK @ a_KK) * e_NK).sum(1)


def value(found: KWeight) -> Tensor:
    """d * scale * q - dmin * min, written out."""
    p, result = found.parameters, []
    for k in range(found.codes_NK.shape[1]):
        s, g = k // SUPER, k // GROUP
        scale_N = p.d_NS[:, s].double() * p.scale_NG[:, g]
        result.append(scale_N * found.codes_NK[:, k] - p.dmin_NS[:, s].double() * p.min_NG[:, g])
    return torch.stack(result, 1)


def textbook(w_NK: Tensor, a_KK: Tensor, *, act_order: bool, updated: bool) -> Tensor:
    """GPTQ as in its paper, in float64: round a column, spread its error over the columns left by the inverse of A."""
    grid, w_NK = KGrid(), w_NK.clone()
    order = torch.argsort(a_KK.diagonal(), descending=True, stable=True) if act_order else torch.arange(len(a_KK))
    left, p, result_NK = order.tolist(), grid.fit(w_NK), torch.zeros_like(w_NK)
    while left:
        k = left[0]
        s, g = k // SUPER, k // GROUP
        if updated and k % SUPER == 0:
            fresh = grid.fit(w_NK[:, k : k + SUPER])
            p.d_NS[:, s : s + 1], p.dmin_NS[:, s : s + 1] = fresh.d_NS, fresh.dmin_NS
            p.scale_NG[:, g : g + PER], p.min_NG[:, g : g + PER] = fresh.scale_NG, fresh.min_NG
        scale_N = p.d_NS[:, s].double() * p.scale_NG[:, g]
        offset_N = p.dmin_NS[:, s].double() * p.min_NG[:, g]
        code_N = ((w_NK[:, k] + offset_N) / scale_N).nan_to_num().round().clamp(0, LEVELS)
        result_NK[:, k] = code_N * scale_N - offset_N
        inverse = torch.linalg.inv(a_KK[left][:, left])
        w_NK[:, left] -= (w_NK[:, k] - result_NK[:, k])[:, None] * inverse[0] / inverse[0, 0]
        left = left[1:]
    return result_NK


@pytest.mark.parametrize(("act_order", "ranges"), [(True, "fixed"), (False, "fixed"), (False, "updated")])
def test_gptq_is_the_textbook_on_this_grid(layer: tuple[Tensor, Tensor], act_order: bool, ranges: str) -> None:
    found, info = run(layer, act_order=act_order, ranges=ranges, block_size=20)
    expected_NK = textbook(*layer, act_order=act_order, updated=ranges == "updated")
    same_NK = (value(found) - expected_NK).abs() < 1e-5
    assert same_NK.double().mean() > 0.99, "but for a tie that falls the other way"
    torch.testing.assert_close(info.error_N, error(layer, found), rtol=1e-4, atol=1e-6)


def test_gptq_beats_rounding_and_sweeps_beat_gptq(layer: tuple[Tensor, Tensor]) -> None:
    rounded = rtn(layer[0], KGrid())  # type: ignore[arg-type]
    assert isinstance(rounded, KWeight)
    errors = [error(layer, found).sum().item() for found in (rounded, run(layer)[0], run(layer, sweeps=3)[0])]
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < 0.9 * errors[1]


def test_sweeps_never_raise_the_error_of_a_row(layer: tuple[Tensor, Tensor]) -> None:
    found = [run(layer, sweeps=sweeps) for sweeps in range(4)]
    errors = [error(layer, weight) for weight, _ in found]
    for before_N, after_N in pairwise(errors):
        assert (after_N <= before_N * (1 + 1e-6)).all()
    torch.testing.assert_close(found[-1][1].error_N, errors[-1], rtol=1e-4, atol=1e-6)
    fixed, moved = found[0][0].parameters, found[-1][0].parameters
    assert not torch.equal(fixed.min_NG, moved.min_NG), "offsets move"
    assert not torch.equal(fixed.scale_NG, moved.scale_NG), "so do scales"
    assert torch.equal(fixed.d_NS, moved.d_NS), "what is shared by a super-block stays"


def test_a_parameter_that_cannot_go_where_it_should_is_put_back(
    layer: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = KColumns.shift
    monkeypatch.setattr(KColumns, "shift", lambda self, k, i, by_N: plain(self, k, i, 3 * by_N))
    walked, swept = run(layer)[0], run(layer, sweeps=1)
    assert (error(layer, swept[0]) <= error(layer, walked) * (1 + 1e-6)).all()
    torch.testing.assert_close(swept[1].error_N, error(layer, swept[0]), rtol=1e-4, atol=1e-6)


def test_values_are_linear_in_each_parameter_that_moves(layer: tuple[Tensor, Tensor]) -> None:
    columns: ColumnGrid = KGrid().by_column(KGrid().fit(layer[0]), 96, torch.float64)
    step_gN = torch.arange(SUPER).double()[:, None].remainder(LEVELS + 1).repeat(1, len(layer[0]))
    value_gN, moved = columns.values(step_gN, SUPER), 0
    for i, slope_gN in enumerate(columns.slopes(step_gN, SUPER)):
        old_N = columns.shift(SUPER, i, torch.full((len(layer[0]),), -2.0, dtype=torch.float64))
        by_N = columns._movable(SUPER, i)[0][columns._movable(SUPER, i)[1]] - old_N  # type: ignore[attr-defined]
        torch.testing.assert_close(columns.values(step_gN, SUPER) - value_gN, by_N * slope_gN)
        moved += int(by_N.count_nonzero())
        columns.put_back(SUPER, i, old_N, torch.ones_like(old_N, dtype=torch.bool))
        assert torch.equal(columns.values(step_gN, SUPER), value_gN)
    assert moved > len(layer[0])
