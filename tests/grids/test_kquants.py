"""Grids of GGUF's blocks: what readers decode, what the reference quantizer writes, and a search by brute force."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.algorithms.rtn import rtn
from quantkit.errors import RunError, UserError
from quantkit.formats.gguf.block_bytes import pack
from quantkit.ggml_types import QUANTIZED
from quantkit.grids import make_grid
from quantkit.grids.dequantize import dequantize
from quantkit.grids.kquants import BlockGrid
from quantkit.types import block_spec

REFERENCE = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
SEARCHED = [name for name in QUANTIZED if name != "Q8_0"]


def weight(seed: int = 0, N: int = 12, K: int = 512) -> Tensor:
    """Heavy-tailed rows of very different sizes; one-sided ones and blocks of zeros among them."""
    random = torch.Generator().manual_seed(seed)
    w_NK = torch.randn(N, K, generator=random) * torch.rand(N, K, generator=random).pow(2)
    w_NK *= torch.logspace(-3, 1, N)[:, None]
    w_NK[1].abs_()
    w_NK[2].abs_().neg_()
    w_NK[3, :256] = 0
    w_NK[4, 16:32] = 0
    w_NK[5] = 0
    return w_NK


def importance(K: int = 512) -> Tensor:
    return torch.randn(K, generator=torch.Generator().manual_seed(9)).mul(1.5).exp()


def decoded(name: str, data: Tensor) -> Any:
    return gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[name])


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_readers_decode_what_we_do(name: str, weighted: bool) -> None:
    grid, w_NK = BlockGrid(block_spec(name)), weight()
    fitted = grid.fit(w_NK, importance() if weighted else None)
    codes_NK = grid.encode(w_NK, fitted)
    q = grid.weight(codes_NK, fitted)
    values_NK = grid.decode(codes_NK, fitted)
    assert torch.equal(values_NK, dequantize(q))
    assert np.array_equal(values_NK.numpy(), decoded(name, pack(q)))
    assert (values_NK[5] == 0).all()
    error = (values_NK - w_NK).square().sum(1) / w_NK.square().sum(1).clamp(min=1e-30)
    assert error.max() < {2: 0.2, 3: 0.05, 4: 0.02, 5: 0.005, 6: 0.001, 8: 0.0001}[grid.spec.bits]


@pytest.mark.parametrize("name", REFERENCE)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), coarse=st.sampled_from([0, 4, 64]))
def test_without_importance_the_reference_bytes(name: str, seed: int, coarse: int) -> None:
    """Coarse weights are full of ties: of halves between two codes, and of the extreme weights of both signs."""
    random = torch.Generator().manual_seed(seed)
    w_NK = torch.randn(5, 128, generator=random) * 10.0 ** torch.randint(-9, 5, (5, 1), generator=random)
    if coarse:
        w_NK = torch.randint(-coarse, coarse + 1, (5, 128), generator=random) / 64
    ours = pack(rtn(w_NK, BlockGrid(block_spec(name))))
    theirs = gguf.quants.quantize(w_NK.numpy(), gguf.GGMLQuantizationType[name])
    assert np.array_equal(ours.numpy(), theirs)


def test_q8_0_rounds_just_below_a_half_down() -> None:
    w_NK = torch.zeros(1, 32)
    w_NK[0, :5] = torch.tensor([127.0, 0.5 - 2**-25, 0.5, -0.5, 1.5])
    codes_NK = rtn(w_NK, BlockGrid(block_spec("Q8_0"))).codes_NK
    assert (codes_NK[0, :5].int() - 128).tolist() == [127, 0, 1, -1, 2]


def test_q8_0_ignores_an_importance() -> None:
    grid, w_NK = BlockGrid(block_spec("Q8_0")), weight()
    for one, other in zip(grid.fit(w_NK), grid.fit(w_NK, importance()), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_rows_are_independent(name: str, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit: whatever rows are beside a row, and wherever work is cut."""
    grid, w_NK, e_K = BlockGrid(block_spec(name)), weight(), importance() if weighted else None
    whole = grid.fit(w_NK, e_K)
    for rows in ([7], [1, 8, 9], [11, 0]):
        for part, all_ in zip(grid.fit(w_NK[rows], e_K), whole, strict=True):
            assert torch.equal(part, all_[rows])
    monkeypatch.setattr("quantkit.grids.kquant_search.CHUNK", 5 * 512)
    for cut, all_ in zip(grid.fit(w_NK, e_K), whole, strict=True):
        assert torch.equal(cut, all_)


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.grids.kquant_search.CHUNK", 512)
    grid, w_NK, before = BlockGrid(block_spec("Q4_K")), weight(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = grid.fit(w_NK, importance())
        torch.set_num_threads(3)
        several = grid.fit(w_NK, importance())
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)
    for one, other in zip(alone, several, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_show(name: str, value: float) -> None:
    w_NK = weight()
    w_NK[7, 300] = value
    fitted = BlockGrid(block_spec(name)).fit(w_NK, importance())
    columns = 256 if "K" in name or name == "IQ4_XS" else 32
    assert fitted.scale_NG[7].isnan().nonzero().flatten().tolist() == [300 // columns]
    assert fitted.scale_NG[:7].isfinite().all()
    with pytest.raises(RunError, match="NaN or Inf"):
        rtn(w_NK, BlockGrid(block_spec(name)))


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("size", [1e-38, 1e-12, 1e-7, 1e5, 1e30])
def test_weights_of_all_sizes(name: str, weighted: bool, size: float) -> None:
    """Never NaN; what float16 scales cannot reach is cut off, what they cannot resolve becomes zeros."""
    w_NK = weight() * size
    q = rtn(w_NK, BlockGrid(block_spec(name)), importance_K=importance() if weighted else None)
    values_NK = torch.from_numpy(decoded(name, pack(q)))
    assert values_NK.isfinite().all()
    assert ((values_NK - w_NK).abs() <= w_NK.abs().amax(1, keepdim=True) + 1e-6).all()


@pytest.mark.parametrize("name", QUANTIZED)
def test_columns_that_were_never_active(name: str) -> None:
    """An importance of zeros in some blocks or everywhere still leaves sensible scales."""
    grid, w_NK = BlockGrid(block_spec(name)), weight()
    for e_K in (torch.zeros(512), torch.cat([torch.ones(256), torch.zeros(256)])):
        fitted = grid.fit(w_NK, e_K)
        values_NK = grid.decode(grid.encode(w_NK, fitted), fitted)
        error = (values_NK - w_NK).square().sum(1) / w_NK.square().sum(1).clamp(min=1e-30)
        assert error.max() < {2: 0.2, 3: 0.05, 4: 0.02, 5: 0.005, 6: 0.001, 8: 0.0001}[grid.spec.bits]


def test_rows_of_part_of_a_block_are_refused() -> None:
    with pytest.raises(UserError, match="256 does not divide 320"):
        make_grid(block_spec("Q4_K"), torch.float32, None, signed=True).fit(torch.ones(2, 320))
