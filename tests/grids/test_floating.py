"""Float grids against the numbers themselves: e4m3 and e2m1 listed from their bits, rounding by search.

Everything here is computed in float64 from the definitions; GPTQ is the textbook one, column by column.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit import types
from quantkit.algorithms.gptq import factor, gptq
from quantkit.algorithms.rtn import rtn
from quantkit.errors import RunError, UserError
from quantkit.grids.dequantize import (
    collapse,
    dequantize,
    expand,
)
from quantkit.grids.elements import (
    encode_float,
    float_codes,
    float_steps,
    round_float_,
)
from quantkit.grids.floating import FloatGrid
from quantkit.grids.integer import RangeSearch
from quantkit.quantization import targets as plan
from quantkit.recipe.load import from_data
from quantkit.recipe.number_formats import PRESETS
from quantkit.types import TensorSpec

FP8_CHANNEL, FP8_TENSOR, FP8_BLOCK = (
    TensorSpec(8, -1, element="float"),
    TensorSpec(8, -1, element="float", scale_rows=-1),
    TensorSpec(8, 128, element="float", scale_rows=128),
)
NVFP4 = TensorSpec(4, 16, element="float", scale_format="e4m3")
MXFP4, MXFP8 = (TensorSpec(bits, 32, element="float", scale_format="e8m0") for bits in (4, 8))
SPECS = [FP8_CHANNEL, FP8_TENSOR, FP8_BLOCK, NVFP4, MXFP4, MXFP8]


def elements(bits: int) -> list[float]:
    """The non-negative numbers in the order of their codes, from the layouts: s eeee mmm (bias 7) and s ee m (bias 1).

    The last e4m3 pattern is NaN; there is no infinity in either.
    """
    mantissa, bias = (3, 7) if bits == 8 else (1, 1)
    found = []
    for code in range(127 if bits == 8 else 8):
        exponent, fraction = code >> mantissa, (code & (2**mantissa - 1)) / 2**mantissa
        found.append((1 + fraction) * 2.0 ** (exponent - bias) if exponent else fraction * 2.0 ** (1 - bias))
    return found


def nearest(x: Tensor, bits: int) -> Tensor:
    """float64 x to the nearest element, ties to the even code, beyond the largest to the largest."""
    values = torch.tensor(elements(bits), dtype=torch.float64)
    size = x.double().abs().clamp(max=values[-1])
    above = torch.searchsorted(values, size).clamp(max=len(values) - 1)
    below = (above - 1).clamp(min=0)
    up, down = values[above] - size, size - values[below]
    code = torch.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return torch.where(x < 0, -values[code], values[code])


def test_the_elements() -> None:
    assert elements(4) == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert len(elements(8)) == 127
    assert elements(8)[:2] + elements(8)[-2:] == [0, 2**-9, 416, 448]
    for bits in (4, 8):
        values = torch.tensor(elements(bits))
        codes = torch.arange(len(values), dtype=torch.uint8)
        sign = 2 ** (bits - 1)
        assert torch.equal(float_steps(codes, bits, torch.float32), values)
        assert torch.equal(float_steps(codes + sign, bits, torch.float64), -values.double())
        assert torch.equal(float_codes(values.clone(), bits), codes)
        assert torch.equal(float_codes(-values[1:], bits), codes[1:] + sign)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_rounds_to_the_nearest_and_ties_to_even(bits: int, dtype: torch.dtype) -> None:
    values = torch.tensor(elements(bits), dtype=torch.float64)
    middle = (values[1:] + values[:-1]) / 2  # exactly half way: decided by the even code
    around = [middle, middle * (1 - 1e-6), middle * (1 + 1e-6), values, values[-1:] * torch.tensor([1.01, 2.0, 1e30])]
    torch.manual_seed(0)
    x = torch.cat([*around, torch.randn(5000).double() * 3, torch.randn(5000).double() * 100]).to(dtype)
    x = torch.cat([x, -x])
    rounded = round_float_(x.clone(), bits)
    assert torch.equal(rounded.double(), nearest(x, bits))
    assert not (torch.signbit(rounded) & (rounded == 0)).any(), "zeros come out positive"
    assert torch.equal(float_steps(float_codes(rounded.clone(), bits), bits, dtype), rounded)
    if bits == 8:
        codes = torch.empty(x.shape, dtype=torch.uint8)
        encode_float(x.clone(), 8, codes)
        assert torch.equal(float_steps(codes, 8, torch.float32), rounded)


@settings(deadline=None, max_examples=200)
@given(st.floats(-500, 500, width=32), st.sampled_from([4, 8]))
def test_rounds_any_number(x: float, bits: int) -> None:
    assert round_float_(torch.tensor([x]), bits).item() == nearest(torch.tensor([x]), bits).item()


def grid_for(spec: TensorSpec, *weights: Tensor, search: bool = True, importance_K: Tensor | None = None) -> FloatGrid:
    return FloatGrid(spec, search=RangeSearch() if search else None).for_tensors(weights, importance_K)


def weight(N: int = 40, K: int = 96, seed: int = 0) -> Tensor:
    """Rows and columns of very different size, with a few large weights."""
    generator = torch.Generator().manual_seed(seed)
    w_NK = torch.randn(N, K, generator=generator) * torch.rand(N, 1, generator=generator).add(0.1) * 0.05
    w_NK[:, ::17] *= 6
    return w_NK


def cells(w_NK: Tensor, spec: TensorSpec) -> list[tuple[slice, slice]]:
    """Rows and columns that share a scale."""
    (N, K), rows, columns = w_NK.shape, spec.scale_rows, spec.columns(w_NK.shape[1])
    tall = N if rows == -1 else rows
    return [
        (slice(i, min(i + tall, N)), slice(j, min(j + columns, K)))
        for i in range(0, N, tall)
        for j in range(0, K, columns)
    ]


def shape_for(spec: TensorSpec) -> tuple[int, int]:
    return (200, 300) if spec.scale_rows == 128 else (40, 96)


def test_plain_scales_are_amax_over_the_top() -> None:
    for spec in (FP8_CHANNEL, FP8_TENSOR, FP8_BLOCK):
        w_NK = weight(*shape_for(spec))
        scale_NG, zero_NG = grid_for(spec, w_NK, search=False).fit(w_NK)
        assert (zero_NG == 0).all()
        for rows, columns in cells(w_NK, spec):
            amax = w_NK[rows, columns].abs().max().double()
            found = scale_NG[rows, columns.start // spec.columns(w_NK.shape[1])]
            assert (found == (amax / 448).float()).all(), spec


def test_blocks_are_cut_at_the_edges() -> None:
    w_NK = weight(200, 300)
    scale_NG, _ = grid_for(FP8_BLOCK, w_NK, search=False).fit(w_NK)
    assert scale_NG.shape == (200, 3)
    stored = collapse(scale_NG, FP8_BLOCK)
    assert stored.shape == (2, 3)
    assert stored.unique().numel() == 6
    assert torch.equal(expand(stored, FP8_BLOCK, 200), scale_NG)
    w_NK[128:, 256:] = 0.7  # the corner, 72 x 44, alone: one number, so that it is represented without error
    q = rtn(w_NK, grid_for(FP8_BLOCK, w_NK, search=False))
    assert collapse(q.scale_NG, FP8_BLOCK)[1, 2] == torch.tensor(0.7) / 448
    torch.testing.assert_close(dequantize(q)[128:, 256:], w_NK[128:, 256:], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("spec", "emax"), [(MXFP4, 2), (MXFP8, 8)], ids=str)
def test_mx_exponent_of_the_standard(spec: TensorSpec, emax: int) -> None:
    w_NK = weight()
    w_NK[0, :32] = torch.linspace(-1, 1, 32) * 2  # amax a power of two
    w_NK[1, :32] = torch.linspace(-1, 1, 32) * (2 - 2**-22)  # and just below
    scale_NG, _ = grid_for(spec, w_NK, search=False).fit(w_NK)
    amax_NG = w_NK.reshape(40, 3, 32).abs().amax(2).double()
    assert torch.equal(scale_NG.double(), 2.0 ** (torch.floor(torch.log2(amax_NG)) - emax))
    assert scale_NG[0, 0] == 2.0 ** (1 - emax)
    assert scale_NG[1, 0] == 2.0 ** (0 - emax)


@pytest.mark.parametrize("factor", [1.0, 1e-3, 3e4, 2.0**-10], ids=str)
def test_nvfp4_scales_are_e4m3_numbers_times_a_power_of_two(factor: float) -> None:
    w_NK = weight() * factor
    grid = grid_for(NVFP4, w_NK, search=False)
    amax = w_NK.abs().max().item()
    assert grid.global_scale is not None
    assert torch.frexp(torch.tensor(grid.global_scale)).mantissa == 0.5, "a power of two"
    assert amax <= 6 * 448 * grid.global_scale < 2 * amax, "the least one with which nothing is clipped"
    scale_NG, _ = grid.fit(w_NK)
    wanted_NG = w_NK.reshape(40, -1, 16).abs().amax(2).double() / 6 / grid.global_scale
    assert torch.equal(scale_NG.double(), nearest(wanted_NG, 8) * grid.global_scale)
    q = grid.quantize(w_NK, scale_NG, torch.zeros_like(scale_NG, dtype=torch.uint8))
    top = dequantize(q).abs().max().item()
    assert abs(top - amax) <= amax / 16, "only as far off as the rounding of one e4m3 scale"


def test_nvfp4_global_scale_at_exact_powers_of_two() -> None:
    for amax, expected in ((448 * 6 * 0.25, 0.25), (448 * 6 * 0.25 * (1 + 2**-23), 0.5), (448 * 6, 1.0)):
        assert grid_for(NVFP4, torch.tensor([[amax] * 16])).global_scale == expected


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("search", [True, False], ids=["search", "plain"])
def test_rounding_is_to_the_nearest_on_the_scales(spec: TensorSpec, search: bool) -> None:
    w_NK = weight(*shape_for(spec))
    grid = grid_for(spec, w_NK, search=search)
    q = rtn(w_NK, grid)
    K, size = w_NK.shape[1], spec.columns(w_NK.shape[1])
    scale_NK = q.scale_NG.double().repeat_interleave(size, 1)[:, :K]
    steps_NK = (w_NK / scale_NK.float()).double()  # the quotient in float32, as ties are decided on it
    assert torch.equal(dequantize(q).double(), (nearest(steps_NK, spec.bits) * scale_NK).float().double())


def squared(w_NK: Tensor, scale_NK: Tensor, bits: int, h_K: Tensor) -> Tensor:
    return (nearest(w_NK.double() / scale_NK, bits) * scale_NK - w_NK.double()).square() * h_K.double()


def cell_errors(w_NK: Tensor, grid: FloatGrid, fit_K: Tensor | None, h_K: Tensor) -> Tensor:
    """The weighted squared error of each cell on the scales `fit` finds with fit_K for importance."""
    scale_NG, _ = grid.fit(w_NK, fit_K)
    scale_NK = scale_NG.double().repeat_interleave(grid.spec.columns(w_NK.shape[1]), 1)[:, : w_NK.shape[1]]
    error_NK = squared(w_NK, scale_NK, grid.spec.bits, h_K)
    return torch.stack([error_NK[cell].sum() for cell in cells(w_NK, grid.spec)])


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_search_is_never_worse_and_heeds_importance(spec: TensorSpec) -> None:
    w_NK = weight(*shape_for(spec), seed=3)
    K = w_NK.shape[1]
    h_K = torch.rand(K, generator=torch.Generator().manual_seed(4)).pow(6) * 1000
    for importance_K in (None, h_K):
        plain = grid_for(spec, w_NK, search=False)
        searched = grid_for(spec, w_NK, importance_K=importance_K)
        weights_K = torch.ones(K) if importance_K is None else importance_K
        before, after = (cell_errors(w_NK, grid, importance_K, weights_K) for grid in (plain, searched))
        assert (after <= before * (1 + 1e-5)).all()
        assert after.sum() < before.sum(), "and somewhere better"
    blind = cell_errors(w_NK, grid_for(spec, w_NK), None, h_K)
    heeding = cell_errors(w_NK, grid_for(spec, w_NK, importance_K=h_K), h_K, h_K)
    assert (heeding <= blind * (1 + 1e-5)).float().mean() > 0.8
    if spec != MXFP8:  # where the exponent of the standard is nearly always the best one
        assert heeding.sum() < 0.99 * blind.sum()


@pytest.mark.parametrize("spec", [NVFP4, MXFP4, MXFP8], ids=str)
def test_search_finds_what_trying_every_scale_finds(spec: TensorSpec) -> None:
    w_NK = weight(12, 96, seed=5)
    grid = grid_for(spec, w_NK)
    if spec.scale_format == "e4m3":
        assert grid.global_scale is not None
        every = [value * grid.global_scale for value in elements(8)[1:]]
    else:
        every = [2.0**exponent for exponent in range(-30, 10)]
    ones_K = torch.ones(96)
    errors = torch.stack([squared(w_NK, torch.tensor(scale), spec.bits, ones_K) for scale in every])
    best = errors.reshape(len(every), 12, -1, spec.group_size).sum(3).amin(0).flatten()
    ours = cell_errors(w_NK, grid, None, ones_K)
    torch.testing.assert_close(ours, best, rtol=1e-5, atol=0)


def test_fp8_search_is_close_to_a_fine_one() -> None:
    w_NK = torch.randn(12, 768, generator=torch.Generator().manual_seed(6))
    grid = grid_for(FP8_CHANNEL, w_NK)
    least_N1 = w_NK.abs().amax(1, keepdim=True).double() / 448
    ones_K = torch.ones(768)
    fine = torch.stack([squared(w_NK, least_N1 * 2 ** (i / 500), 8, ones_K).sum(1) for i in range(500)]).amin(0)
    assert (cell_errors(w_NK, grid, None, ones_K) <= 1.1 * fine).all()


@pytest.mark.parametrize("spec", [FP8_TENSOR, NVFP4], ids=str)
def test_what_is_for_a_tensor_is_joint(spec: TensorSpec) -> None:
    small_NK, large_NK = weight(8, 96), weight(24, 96, seed=1) * 5
    for search in (False, True):
        joint = grid_for(spec, small_NK, large_NK, search=search)
        stacked = grid_for(spec, torch.cat([small_NK, large_NK]), search=search)
        alone = grid_for(spec, small_NK, search=search)
        assert (joint.fixed, joint.global_scale) == (stacked.fixed, stacked.global_scale)
        assert (joint.fixed, joint.global_scale) != (alone.fixed, alone.global_scale)
        q = [joint.quantize(w_NK, *joint.fit(w_NK)) for w_NK in (small_NK, large_NK)]
        assert q[0].global_scale == q[1].global_scale == joint.global_scale
        if spec.scale_rows == -1:
            assert torch.cat([part.scale_NG for part in q]).unique().numel() == 1
        else:  # rows of a stack are what each part alone gives with the common number
            whole_NG, _ = joint.fit(torch.cat([small_NK, large_NK]))
            assert torch.equal(whole_NG, torch.cat([part.scale_NG for part in q]))


def test_tensor_scale_searched_over_both_and_by_importance() -> None:
    weights = [weight(8, 96), weight(24, 96, seed=1) * 5]
    h_K = torch.ones(96).index_fill(0, torch.tensor([40]), 1e5)
    least = torch.cat(weights).abs().max().double().item() / 448

    def error(scale: float) -> float:
        return sum(squared(w_NK, torch.tensor(scale), 8, h_K).sum().item() for w_NK in weights)

    found = grid_for(FP8_TENSOR, *weights, importance_K=h_K).fixed
    assert found is not None
    assert error(found) <= min(error(least * 2 ** (i / 16)) for i in range(16)) * (1 + 1e-6)
    assert found != grid_for(FP8_TENSOR, *weights).fixed


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("search", [True, False], ids=["search", "plain"])
def test_zeros_stay_zeros(spec: TensorSpec, search: bool) -> None:
    shape = shape_for(spec)
    for w_NK in (torch.zeros(shape), weight(*shape)):
        w_NK[:3] = 0
        w_NK[:, :32] = 0
        w_NK[:128, :128] = 0 if spec.scale_rows == 128 else w_NK[:128, :128]
        q = rtn(w_NK, grid_for(spec, w_NK, search=search))
        assert torch.isfinite(q.scale_NG).all()
        assert (q.scale_NG > 0).all()
        assert (q.codes_NK[w_NK == 0] == 0).all()
        assert torch.equal(dequantize(q)[w_NK == 0], w_NK[w_NK == 0])
        assert torch.isfinite(dequantize(q)).all()


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_tiny_and_huge_weights(spec: TensorSpec, size: float) -> None:
    w_NK = weight(*shape_for(spec)) * size
    rounded_NK = dequantize(rtn(w_NK, grid_for(spec, w_NK)))
    assert ((rounded_NK - w_NK).double().norm() / w_NK.double().norm()).item() < (0.05 if spec.bits == 8 else 0.17)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_refuses_what_is_not_finite(bad: float) -> None:
    w_NK = weight()
    w_NK[1, 1] = bad
    with pytest.raises(RunError, match="NaN or Inf"):
        rtn(w_NK, FloatGrid(FP8_CHANNEL))


def test_importance_and_chunks_do_not_change_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are fitted a few at a time; blocks are never cut by that."""
    from quantkit.grids import floating

    for spec in SPECS:
        w_NK = weight(*shape_for(spec))
        h_K = torch.rand(w_NK.shape[1])
        whole = rtn(w_NK, grid_for(spec, w_NK, importance_K=h_K), importance_K=h_K)
        with monkeypatch.context() as patch:
            patch.setattr(floating, "CHUNK", 7 * w_NK.shape[1])
            parts = rtn(w_NK, grid_for(spec, w_NK, importance_K=h_K), importance_K=h_K)
        assert torch.equal(whole.codes_NK, parts.codes_NK), spec
        assert torch.equal(whole.scale_NG, parts.scale_NG), spec


# GPTQ


def layer(spec: TensorSpec) -> tuple[Tensor, Tensor]:
    """Weight and Hessian in float64: correlated channels of very different size."""
    N, K = (150, 200) if spec.scale_rows == 128 else (20, 96)
    torch.manual_seed(0)
    x_MK = torch.randn(2 * K, K) @ torch.randn(K, K) * torch.rand(K).pow(2)
    return torch.randn(N, K).double(), (x_MK.T @ x_MK).double()


def damped(h_KK: Tensor) -> Tensor:
    return h_KK + 0.01 * h_KK.diagonal().mean() * torch.eye(len(h_KK), dtype=h_KK.dtype)


def row_errors(w_NK: Tensor, rounded_NK: Tensor, h_KK: Tensor) -> Tensor:
    e_NK = w_NK - rounded_NK.double()
    return ((e_NK @ h_KK) * e_NK).sum(1)


def textbook(w_NK: Tensor, h_KK: Tensor, grid: FloatGrid, *, act_order: bool) -> Tensor:
    """Invert, round a column to the nearest element, update all columns left, drop it. The scales are the grid's."""
    w_NK, a_KK = w_NK.clone(), damped(h_KK)
    K = w_NK.shape[1]
    grid = grid.for_tensors([w_NK], a_KK.diagonal())
    scale_NG = grid.fit(w_NK, a_KK.diagonal())[0].double()
    scale_NK = scale_NG.repeat_interleave(grid.spec.columns(K), 1)[:, :K]
    left = torch.argsort(a_KK.diagonal(), descending=True).tolist() if act_order else list(range(K))
    result_NK = torch.empty_like(w_NK)
    while left:
        k = left[0]
        inverse = torch.linalg.inv(a_KK[left][:, left])
        steps_N = (w_NK[:, k] / scale_NK[:, k]).float()  # casts to e4m3 go by float32: ties are decided there
        rounded_N = nearest(steps_N, grid.spec.bits) * scale_NK[:, k]
        result_NK[:, k] = rounded_N.float().double()  # the product in float32, as it is decoded
        w_NK[:, left] -= torch.outer((w_NK[:, k] - result_NK[:, k]) / inverse[0, 0], inverse[0])
        left.pop(0)
    return result_NK


def options(spec: TensorSpec, search: bool) -> FloatGrid:
    return FloatGrid(spec, search=RangeSearch() if search else None)


@pytest.mark.parametrize("act_order", [True, False], ids=["act", "plain"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gptq_matches_textbook(spec: TensorSpec, act_order: bool) -> None:
    w_NK, h_KK = layer(spec)
    q, info = gptq(w_NK, h_KK, options(spec, act_order), act_order=act_order)
    expected_NK = textbook(w_NK, h_KK, options(spec, act_order), act_order=act_order)
    torch.testing.assert_close(dequantize(q).double(), expected_NK)
    torch.testing.assert_close(info.error_N, row_errors(w_NK, expected_NK, damped(h_KK)))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gptq_beats_rounding_and_sweeps_only_help(spec: TensorSpec) -> None:
    w_NK, h_KK = layer(spec)
    a_KK, grid = damped(h_KK), options(spec, True)
    rounded = rtn(w_NK, grid, importance_K=a_KK.diagonal())
    assert (rounded.scale_NG == grid.for_tensors([w_NK], a_KK.diagonal()).fit(w_NK, a_KK.diagonal())[0]).all()
    before_N = row_errors(w_NK, dequantize(rounded), a_KK)
    results = [gptq(w_NK, h_KK, grid, sweeps=sweeps) for sweeps in (0, 1, 3)]
    errors = [row_errors(w_NK, dequantize(q), a_KK) for q, _ in results]
    assert errors[0].sum() < 0.85 * before_N.sum()
    assert (errors[1] <= errors[0] * (1 + 1e-6)).all()
    assert (errors[2] <= errors[1] * (1 + 1e-6)).all()
    assert errors[2].sum() < 0.995 * errors[0].sum()
    for (q, info), error_N in zip(results, errors, strict=True):
        torch.testing.assert_close(info.error_N, error_N, rtol=1e-6, atol=1e-6)
        assert torch.equal(expand(collapse(q.scale_NG, spec), spec, len(w_NK)), q.scale_NG), "shared where it must be"
        assert torch.equal(grid_like(grid, q.global_scale).storable(q.scale_NG), q.scale_NG), "storable"


def grid_like(grid: FloatGrid, global_scale: float | None) -> FloatGrid:
    return FloatGrid(grid.spec, global_scale=global_scale)


def test_gptq_updated_ranges() -> None:
    w_NK, h_KK = layer(MXFP4)
    fixed, updated = (
        gptq(w_NK, h_KK, options(MXFP4, True), act_order=False, ranges=ranges)[0] for ranges in ("fixed", "updated")
    )
    assert not torch.equal(fixed.scale_NG, updated.scale_NG)
    before_N = row_errors(w_NK, dequantize(rtn(w_NK, options(MXFP4, True))), damped(h_KK))
    assert row_errors(w_NK, dequantize(updated), damped(h_KK)).sum() < before_N.sum()
    for spec in (FP8_BLOCK, FP8_TENSOR):
        with pytest.raises(UserError, match=r"updated.*scale for each row"):
            gptq(*layer(spec), options(spec, True), act_order=False, ranges="updated")


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gptq_of_stacked_linears(spec: TensorSpec) -> None:
    """What is for the whole tensor is common to all, blocks of rows end where a linear ends."""
    w_NK, h_KK = layer(spec)
    rows = [70, 80] if spec.scale_rows == 128 else [8, 12]
    shared = factor(h_KK)
    q, _ = gptq(w_NK, shared, options(spec, True), stacked=rows)
    parts = w_NK.split(rows)
    common = options(spec, True).for_tensors(parts, shared.importance_K)
    for part_NK, found in zip(parts, (q.rows(0, rows[0]), q.rows(rows[0], sum(rows))), strict=True):
        alone, _ = gptq(part_NK, shared, options(spec, True))
        expected_NG = common.fit(part_NK, shared.importance_K)[0]
        assert torch.equal(found.scale_NG, expected_NG)
        if spec.scale_rows != -1 and spec.scale_format != "e4m3":
            assert torch.equal(found.codes_NK, alone.codes_NK)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_of_types_are_those_of_recipes(name: str) -> None:
    recipe = from_data({"scheme": name, "calibration": {"data": "x"}, "weights": {"algorithm": "gptq"}})
    scheme: Any = types.PRESETS[name]
    assert plan.weight_spec(recipe.weights) == scheme.weights
    assert plan.activation_spec(recipe.activations) == scheme.activations
    assert types.PRESETS.keys() == PRESETS.keys()
