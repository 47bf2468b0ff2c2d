"""Names of devices: the one that was meant, and what to do where a GPU cannot be used."""

import pytest
import torch

from quantkit import device_names
from quantkit.device_names import check_device_name, torch_device
from quantkit.errors import UserError


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """torch as built for CUDA, with one GPU that cannot really be used."""
    monkeypatch.setattr(device_names, "version", lambda _: "2.13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    return monkeypatch


@pytest.mark.parametrize(
    ("given", "meant"),
    [("gpu", "cuda"), ("GPU:1", "cuda:1"), ("cuda0", "cuda:0"), ("1", "cuda:1"), ("CPU", "cpu"), ("cdua", "cuda")],
)
def test_the_device_that_was_meant(given: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"no device is called '{given}'\nhint: did you mean `{meant}`"):
        check_device_name(given)


def test_a_build_without_cuda_is_told_before_torch_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_names, "version", lambda _: "2.13.0+cpu")
    for name in ("cuda", "cuda:9"):
        with pytest.raises(UserError, match=rf"'{name}' cannot be used: torch 2.13.0\+cpu .*\nhint: .* --device cpu"):
            check_device_name(name)
    for name in ("auto", "cpu"):
        check_device_name(name)


def test_no_gpu_is_found(gpus: pytest.MonkeyPatch) -> None:
    gpus.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"'cuda' cannot be used: torch 2.13.0 finds no GPU\nhint: see `nvidia-smi`"):
        torch_device("cuda")
    assert torch_device("auto") == torch.device("cpu")


@pytest.mark.parametrize(("count", "there"), [(1, "one GPU, cuda:0"), (4, "4 GPUs, cuda:0 to cuda:3")])
def test_a_gpu_that_is_not_there(gpus: pytest.MonkeyPatch, count: int, there: str) -> None:
    gpus.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(UserError, match=f"'cuda:9' cannot be used: torch finds {there}\nhint: "):
        torch_device("cuda:9")


def test_the_cpu_is_itself() -> None:
    assert torch_device("cpu") == torch.device("cpu")
