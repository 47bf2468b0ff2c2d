"""Kernels run on the GPU where there is one, else in Triton's interpreter (tests/conftest.py chooses it)."""

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20261121)
