"""Kernels run on the GPU where there is one, else in Triton's interpreter (tests/conftest.py chooses it)."""

import ctypes
import shutil

import pytest
import torch
from quantkit_kernels.cpu import build


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20261121)


@pytest.fixture(scope="session")
def lib() -> ctypes.CDLL:
    """The compiled CPU kernels; only where there is no compiler may they be absent."""
    found = build.library()
    if found is None and not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("no C++ compiler here")
    assert found is not None, "a compiler is here, but what it built was refused"
    return found
