import pytest
import torch

from quantkit.algorithms.rtn import rtn
from quantkit.errors import RunError
from quantkit.grids.dequantize import (
    dequantize,
)
from quantkit.grids.integer import IntegerGrid, RangeSearch
from quantkit.types import TensorSpec


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_matches_rounding_by_hand(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    w_NK = torch.randn(5, 24).to(dtype)
    q = rtn(w_NK, IntegerGrid(TensorSpec(4, 8, True), torch.float32))
    for n in range(5):
        for start in range(0, 24, 8):
            values = w_NK[n, start : start + 8].double()
            scale = values.abs().max().item() * 2 / 15
            for value, code in zip(values.tolist(), q.codes_NK[n, start : start + 8].tolist(), strict=True):
                assert 0 <= code <= 15
                assert abs(value / scale - (code - 8)) < 0.5001  # the extreme is half way between two codes


def test_importance_lowers_the_weighted_error() -> None:
    torch.manual_seed(0)
    w_NK, importance_K = torch.randn(64, 64) ** 3, torch.rand(64) ** 6
    grid = IntegerGrid(TensorSpec(3, 32, False), torch.bfloat16, RangeSearch())

    def error(importance: torch.Tensor | None) -> float:
        off_NK = dequantize(rtn(w_NK, grid, importance_K=importance)).float() - w_NK
        return (off_NK.square() * importance_K).sum().item()

    assert error(importance_K) < 0.9 * error(None)


def test_minmax_ignores_importance() -> None:
    torch.manual_seed(0)
    w_NK, grid = torch.randn(8, 32), IntegerGrid(TensorSpec(4, 16, False))
    assert torch.equal(rtn(w_NK, grid, importance_K=torch.rand(32)).codes_NK, rtn(w_NK, grid).codes_NK)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_refuses_what_is_not_finite(bad: float) -> None:
    w_NK = torch.randn(4, 16, dtype=torch.bfloat16)
    w_NK[2, 3] = bad
    with pytest.raises(RunError, match="NaN or Inf"):
        rtn(w_NK, IntegerGrid(TensorSpec(4, 16, True)))
