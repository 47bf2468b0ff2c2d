"""GGUF's blocks column by column, and GPTQ and coordinate descent on them."""

import pytest
import torch
from torch import Tensor

from quantkit.algorithms.coordinate_descent import sweep
from quantkit.algorithms.gptq import factor, gptq, refusal
from quantkit.formats.gguf.block_bytes import pack, unpack
from quantkit.ggml_types import QUANTIZED
from quantkit.grids.block_types import BLOCK_TYPES, BlockParameters
from quantkit.grids.dequantize import dequantize
from quantkit.grids.kquants import BlockGrid
from quantkit.types import TensorSpec, block_spec

N, K = 16, 512
DTYPES = [torch.float32, torch.float64]


def fitted(name: str, seed: int = 0) -> tuple[BlockGrid, Tensor, BlockParameters]:
    grid = BlockGrid(block_spec(name))
    w_NK = torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
    w_NK[:, 64:128].abs_()
    w_NK[0] = 0
    importance_K = torch.rand(K, generator=torch.Generator().manual_seed(1)) + 0.1
    return grid, w_NK, grid.fit(w_NK, importance_K)


def all_values(grid: BlockGrid, parameters: BlockParameters) -> Tensor:
    """Every number that each place can hold, [codes, N, K]."""
    codes = range(grid.spec.levels)
    return torch.stack([grid.decode(torch.full((N, K), c, dtype=torch.uint8), parameters) for c in codes])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", QUANTIZED)
def test_nearest(name: str, dtype: torch.dtype) -> None:
    """The number found is the nearest of all that `decode` knows, and decodes to the very bit."""
    grid, w_NK, parameters = fitted(name)
    columns = grid.by_column(parameters, K, dtype)
    wanted_KN = (w_NK.mT * 1.3).to(dtype)
    step_KN, value_KN = wanted_KN.clone(), torch.empty(K, N)
    for k in range(K):
        columns.nearest_(wanted_KN[k], k, step_KN[k], value_KN[k])
    codes_NK = columns.codes(step_KN, torch.arange(K)).mT.contiguous()
    assert torch.equal(grid.decode(codes_NK, parameters), value_KN.mT)
    error_KN = (value_KN - wanted_KN).abs()
    least_KN = (all_values(grid, parameters).mT - wanted_KN).abs().amin(0)
    assert (error_KN <= least_KN + 1e-5 * wanted_KN.abs().amax()).all()
    assert torch.equal(columns.steps(codes_NK.mT, torch.arange(K)), step_KN)
    for k in range(0, K, columns.span):
        span = slice(k, k + columns.span)
        assert torch.equal(columns.values(step_KN[span], k), value_KN[span].to(dtype))


@pytest.mark.parametrize("name", QUANTIZED)
def test_parameters_move(name: str) -> None:
    """Along their slope, to what can be stored, and back to the bit."""
    type_ = BLOCK_TYPES[name]
    grid, w_NK, before = fitted(name)
    columns = grid.by_column(before, K, torch.float64)
    k = 5 * columns.span
    codes_NK = grid.encode(w_NK, before)
    span_K = torch.arange(k, k + columns.span)
    step_gN = columns.steps(codes_NK.mT[span_K], span_K)
    slopes = columns.slopes(step_gN, k)
    assert len(slopes) == 1 + (type_.sub_offset > 0)
    assert [slope_gN.stride(0) == 0 for slope_gN in slopes] == [False, True][: len(slopes)]
    for i, slope_gN in enumerate(slopes):
        value_gN, old = columns.values(step_gN, k), columns.parameters()
        size = torch.full((N,), 2.2 if type_.nested else 0.01, dtype=torch.float64)
        old_N = columns.shift(k, i, size)
        now = columns.parameters()
        part = (2 + i) if type_.nested else i
        column = k // (type_.span if type_.nested else type_.columns)
        moved_N = now[part][:, column].double() - old[part][:, column].double()
        torch.testing.assert_close(columns.values(step_gN, k) - value_gN, slope_gN * moved_N, rtol=1e-5, atol=1e-5)
        assert torch.equal(grid.decode(codes_NK, now)[:, span_K].mT.double(), columns.values(step_gN, k))
        if type_.nested:
            top = type_.sub_offset if i else type_.sub_scale[1]
            assert torch.equal(moved_N, (old[part][:, column] + 2).clamp(max=top) - old[part][:, column])
        else:
            assert torch.equal(now[part], now[part].half().float())
            assert (moved_N - 0.01).abs().max() < 1e-3
        columns.put_back(k, i, old_N, torch.ones(N, dtype=torch.bool))
        assert torch.equal(columns.values(step_gN, k), value_gN)
        for one, other in zip(columns.parameters(), old, strict=True):
            assert torch.equal(one, other)


def layer(seed: int = 3) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    mix_KK = torch.randn(K, K, generator=random) * torch.rand(K, generator=random).pow(2)
    x_MK = torch.randn(700, K, generator=random) @ mix_KK
    return torch.randn(N, K, generator=random), x_MK.mT @ x_MK


@pytest.mark.parametrize("name", QUANTIZED)
def test_gptq_and_sweeps(name: str) -> None:
    """Less error than rounding, less again with sweeps, and what is written decodes to what was reckoned with."""
    w_NK, h_KK = layer()
    grid, errors = BlockGrid(block_spec(name)), []
    shared = factor(h_KK, keep_matrix=True)
    damped_KK = h_KK.double() + torch.diag(shared.added_K.double())
    for sweeps in (0, 2):
        q, info = gptq(w_NK, shared, grid, sweeps=sweeps)
        error_NK = w_NK.double() - dequantize(q).double()
        error_N = ((error_NK @ damped_KK) * error_NK).sum(1)
        torch.testing.assert_close(info.error_N.double(), error_N, rtol=2e-2, atol=1e-6 * float(error_N.max()))
        errors.append(float(error_N.sum()))
        again = unpack(pack(q), q.spec, K)
        assert torch.equal(dequantize(again), dequantize(q))
        rounding, found = info.relative_errors()
        if sweeps == 0:
            assert found < 0.9 * rounding
    assert errors[1] < 0.995 * errors[0]


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_sweep_says_by_how_much_the_error_changed(name: str) -> None:
    """From parameters that are far from the best, so that all of them move: each row's change is that of the error."""
    type_, (w_NK, h_KK) = BLOCK_TYPES[name], layer()
    grid, a_KK = BlockGrid(block_spec(name)), h_KK.double() + 0.01 * h_KK.double().diagonal().mean() * torch.eye(K)
    good = grid.fit(w_NK, h_KK.diagonal())
    sub_offset_NS = (good.sub_offset_NS + 3).clamp(max=type_.sub_offset) if type_.nested else good.sub_offset_NS
    bad = good._replace(scale_NG=good.scale_NG * 1.2, offset_NG=good.offset_NG * 1.3, sub_offset_NS=sub_offset_NS)
    columns = grid.by_column(bad, K, torch.float64)
    codes_KN = grid.encode(w_NK, columns.parameters()).mT.contiguous()
    start, order_K = w_NK.double() - grid.decode(codes_KN.mT, columns.parameters()).double(), torch.arange(K)
    error_KN = start.mT.clone()
    change_N = sweep(error_KN, codes_KN, columns, a_KK, order_K)
    after = w_NK.double() - grid.decode(codes_KN.mT, columns.parameters()).double()
    torch.testing.assert_close(error_KN.mT, after, rtol=0, atol=1e-6 * float(w_NK.abs().max()))
    before_N, after_N = (((error @ a_KK) * error).sum(1) for error in (start, after))
    assert (change_N <= 0).all()
    torch.testing.assert_close(change_N, after_N - before_N, rtol=1e-4, atol=1e-6 * float(before_N.max()))


def test_spans_are_not_fitted_alone() -> None:
    grid, w_NK, parameters = fitted("Q4_K")
    with pytest.raises(AssertionError, match="cannot be fitted alone"):
        grid.by_column(parameters, K, torch.float32).put(0, grid.fit(w_NK[:, :256]))
    options = {"ranges": "updated", "act_order": False}
    assert "Q4_K: the scales of a GGUF block belong together" in (refusal(options, block_spec("Q4_K")) or "")
    assert refusal({**options, "ranges": "fixed"}, block_spec("Q4_K")) is None
    assert refusal(options, TensorSpec(4, 32)) is None


@pytest.mark.parametrize("shape", [(128, 256), (1, 256), (1, 32)])
@pytest.mark.parametrize("name", QUANTIZED)
def test_columns_are_a_copy(name: str, shape: tuple[int, int]) -> None:
    """Whatever the shape: moving their parameters leaves the fitted ones as they were."""
    grid, rows, columns = BlockGrid(block_spec(name)), *shape
    if columns % grid.spec.group_size:
        return
    w_NK = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    parameters = grid.fit(w_NK, torch.rand(columns, generator=torch.Generator().manual_seed(1)))
    before = BlockParameters(*(t.clone() for t in parameters))
    by_column = grid.by_column(parameters, columns, torch.float32)
    by_column.shift(0, 0, torch.full((rows,), 1.2))
    assert all(torch.equal(now, then) for now, then in zip(parameters, before, strict=True))
