"""Devices by name: checked without torch as far as that goes, and then found by torch."""

import difflib
import re
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from quantkit.errors import UserError

if TYPE_CHECKING:
    import torch

NAMES = ("auto", "cpu", "cuda", "mps", "xpu")
_PATTERN = re.compile(r"auto|cpu|mps|(?:cuda|xpu)(?::\d+)?")
_MEANT = {"gpu": "cuda", "nvidia": "cuda", "rocm": "cuda", "amd": "cuda", "hip": "cuda", "metal": "mps", "apple": "mps"}


def check_device_name(name: str) -> None:
    """UserError for what is no device's name, naming the one that was meant, and for a GPU where torch has no CUDA."""
    if _PATTERN.fullmatch(name):
        if name.startswith("cuda") and (installed := _installed()).endswith("+cpu"):
            raise UserError(
                f"device {name!r} cannot be used: torch {installed} is a build for CPUs alone\n"
                "hint: install torch's CUDA build (https://pytorch.org/get-started/locally), or pass --device cpu"
            )
        return
    word, _, number = name.lower().strip().replace("_", ":").partition(":")
    if short := re.fullmatch(r"([a-z]*?)(\d+)", word):  # cuda0, or 0
        word, number = short[1] or "cuda", short[2]
    near = _MEANT.get(word) or next(iter(difflib.get_close_matches(word, NAMES, n=1, cutoff=0.6)), None)
    meant = f"{near}:{number}" if near in ("cuda", "xpu") and number.isdigit() else near
    hint = f"did you mean `{meant}`?" if meant else f"use {', '.join(NAMES)}; cuda:1 is the second GPU"
    raise UserError(f"no device is called {name!r}\nhint: {hint}")


def torch_device(name: str) -> "torch.device":
    """The device of that name, auto: a GPU where there is one; UserError where it cannot be used here."""
    import torch

    check_device_name(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        _check_gpu(name, torch.cuda.device_count() if torch.cuda.is_available() else 0)
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} cannot be used: {reason}\nhint: {_USABLE}") from error
    return device


_USABLE = "`--device auto` takes a GPU where there is one"


def _check_gpu(name: str, count: int) -> None:
    if count == 0:
        raise UserError(
            f"device {name!r} cannot be used: torch {_installed()} finds no GPU\n"
            "hint: see `nvidia-smi` and CUDA_VISIBLE_DEVICES, or pass --device cpu"
        )
    if int(name.partition(":")[2] or 0) >= count:
        there = "one GPU, cuda:0" if count == 1 else f"{count} GPUs, cuda:0 to cuda:{count - 1}"
        raise UserError(f"device {name!r} cannot be used: torch finds {there}\nhint: {_USABLE}")


def _installed() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        return ""
