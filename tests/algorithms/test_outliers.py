"""Peaks of weights and inputs against their definitions."""

import math

import pytest
import torch

from quantkit.algorithms.outliers import input_peak, weight_peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_peak(dtype: torch.dtype) -> None:
    w_NK = torch.randn(32, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    w_NK[3, 5] = -40.0
    wide = w_NK.double()
    assert weight_peak(w_NK) == pytest.approx(float(wide.abs().max() / wide.square().mean().sqrt()), rel=1e-5)
    assert weight_peak(torch.zeros(4, 4)) == 0


def test_input_peak() -> None:
    square_K = torch.tensor([1.0, 4.0, 1.0, 900.0, 1.0])
    assert input_peak(square_K) == pytest.approx(30.0)
    assert input_peak(torch.tensor([0.0, 0.0, 9.0])) is None  # most channels are silent: there is no ratio
    assert not math.isnan(input_peak(torch.ones(3)) or math.nan)
