"""Names of devices: those that are, what was meant by others, and what to do where a GPU cannot be used."""

import pytest
import torch

from quantkit import device_names
from quantkit.device_names import check_device_name, torch_device
from quantkit.errors import UserError


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:0", "cuda:12", "mps", "xpu", "xpu:1"])
def test_devices(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("quantkit.device_names._installed", lambda: "2.13.0+cu130")
    check_device_name(name)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        *[("gpu", "did you mean `cuda`?"), ("GPU", "did you mean `cuda`?"), ("nvidia", "did you mean `cuda`?")],
        *[("gpu:1", "did you mean `cuda:1`?"), ("cuda0", "did you mean `cuda:0`?"), ("0", "did you mean `cuda:0`?")],
        *[("CUDA", "did you mean `cuda`?"), ("cdua", "did you mean `cuda`?"), ("cuda:x", "did you mean `cuda`?")],
        *[("metal", "did you mean `mps`?"), ("abacus", "cuda:1 is the second GPU"), ("", "cuda:1 is the second GPU")],
    ],
)
def test_what_was_meant(name: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        check_device_name(name)
    first, second = str(caught.value).splitlines()
    assert repr(name) in first
    assert second.startswith("hint: ")
    assert hint in second


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """torch as built for CUDA, with one GPU that cannot really be used."""
    monkeypatch.setattr(device_names, "version", lambda _: "2.13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    return monkeypatch


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
