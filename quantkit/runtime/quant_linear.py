"""A linear layer whose weight stays quantized in memory and is multiplied by a kernel made for its format."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantkit.errors import RunError
from quantkit.formats import FORMATS
from quantkit.grids.activations import fake_quantize
from quantkit.grids.dequantize import (
    dequantize,
)
from quantkit.runtime.kernel_choice import Kernel, choose
from quantkit.types import ActivationRange, QuantizedWeight, Scheme


class QuantLinear(nn.Module):
    """y = x @ W^T + bias with W kept as its format stores it, in buffers named as in the file (weight_packed, ...).

    The first call repacks W for the kernel that suits the scheme and the inputs' device (see `runtime.kernels`) and
    frees those buffers; from then on the layer runs on that device alone. Where no kernel takes it, W is dequantized at
    each call, in the dtype its scales have on file, and brought to x's. Where the scheme quantizes inputs, x is rounded
    just as an engine rounds it. Gradients flow to x, through the dequantized weight.
    """

    def __init__(self, format_: Any, tensors: Mapping[str, Tensor], scheme: Scheme, bias: Tensor | None = None) -> None:
        """UserError where the tensors do not fit the scheme."""
        super().__init__()
        self._format = next(name for name, known in FORMATS.items() if known is format_)  # modules cannot be copied
        self.scheme = scheme
        self.out_features, self.in_features = format_.check_tensors(tensors, scheme)
        self.dtypes = {suffix: tensor.dtype for suffix, tensor in tensors.items()}
        for suffix, tensor in tensors.items():
            self.register_buffer(_buffer(suffix), tensor)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.kernel: Kernel | None = None
        self._input: ActivationRange | None = None  # what the kernel's weight came with
        self._refused: tuple[torch.device, torch.dtype] | None = None  # inputs that no kernel was found for

    @property
    def format(self) -> Any:
        """What of FORMATS knows the tensors."""
        return FORMATS[self._format]

    def quantized(self) -> QuantizedWeight:
        """Codes, scales and zero points, unpacked. RunError once they were repacked for a kernel."""
        if self.kernel is not None:
            raise RunError(f"this layer runs on {self.kernel.name}: its codes are no longer held as in the file")
        tensors = {suffix: self.get_buffer(_buffer(suffix)).to(dtype) for suffix, dtype in self.dtypes.items()}
        return self.format.unpack(tensors, self.scheme)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight [N, K], computed anew at each access."""
        return dequantize(self.quantized()) if self.kernel is None else self.kernel.decode()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype. ValueError where x does not fit the layer, or lies elsewhere than it."""
        if x.dim() == 0 or x.shape[-1] != self.in_features or not x.is_floating_point():
            wanted = f"floating [..., {self.in_features}]"
            raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; {self.extra_repr()} takes {wanted}")
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if torch.is_grad_enabled() and x.requires_grad:
            return self._dequantized(x, bias)
        if self.kernel is None and self._refused != (x.device, x.dtype):
            self._repack(x)
        if self.kernel is None:
            return self._dequantized(x, bias)
        if x.device != self.kernel.device:
            raise ValueError(
                f"x is on {x.device}, this layer was repacked for {self.kernel.device}: load it there again"
            )
        y = self.kernel.run(x)
        return y if bias is None else y.add_(bias)

    def _dequantized(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """By definition: inputs rounded, the weight dequantized."""
        if self.scheme.activations is not None:
            static = self._input if self.kernel is not None else self.quantized().input
            x = fake_quantize(x, self.scheme.activations, static)
        return nn.functional.linear(x, self.weight.to(x.dtype), bias)

    def _repack(self, x: Tensor) -> None:
        """Find the kernel and hand the weight over to it."""
        q = self.quantized()
        self.kernel = choose(q, self.scheme, x.device, x.dtype)
        if self.kernel is None:
            self._refused = x.device, x.dtype
            return
        self._input = q.input
        for suffix in self.dtypes:
            delattr(self, _buffer(suffix))

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.kernel is not None:  # a state without its weight would load as one
            raise RunError(
                f"this layer runs on {self.kernel.name}: save the model before its first call, or copy its folder"
            )
        super()._save_to_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        kernel = f", {self.kernel.name}" if self.kernel is not None else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme}{kernel}"


def _buffer(suffix: str) -> str:
    """`weight` is what the layer stands for, also where its codes lie under that name in the file."""
    return "weight_codes" if suffix == "weight" else suffix


def is_linear(module: nn.Module) -> bool:
    """Whether the module is known to compute x @ W^T + bias, with its weight stored as W or (Conv1D) as W^T.

    A subclass with a forward of its own, as routers have, may return something else.
    """
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)
