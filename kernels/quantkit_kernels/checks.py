"""Checks of what a caller hands in: ValueErrors that name shapes, dtypes and what is supported."""

import torch
from torch import Tensor


def check(condition: bool, message: str) -> None:
    """ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_tensor(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...]) -> None:
    """ValueError unless the tensor is contiguous, of one of the dtypes and of this shape (None: any size)."""
    fits = tensor.dim() == len(shape) and all(s is None or s == t for s, t in zip(shape, tensor.shape, strict=True))
    if not fits or tensor.dtype not in dtypes:
        wanted = "x".join("any" if s is None else str(s) for s in shape)
        kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        got = f"{str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape))}"
        raise ValueError(f"{name}: wanted {kinds} of shape [{wanted}], got {got}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} of shape {tuple(tensor.shape)} is not contiguous (strides {tensor.stride()})")


def check_same_device(**tensors: Tensor | None) -> None:
    """ValueError unless all the tensors that are not None share a device."""
    places = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(places.values())) > 1:
        raise ValueError("tensors are on different devices: " + ", ".join(f"{n} on {d}" for n, d in places.items()))
