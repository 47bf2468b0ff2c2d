"""A linear layer whose weight stays packed in memory and is dequantized for each call."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantkit.grids.activations import fake_quantize
from quantkit.grids.elements import dequantize
from quantkit.types import QuantizedWeight, Scheme


class QuantLinear(nn.Module):
    """y = x @ W^T + bias with W kept as its format stores it, in buffers named as in the file (weight_packed, ...).

    W is dequantized in the dtype its scales have on file and then brought to x's, whatever the module was cast to.
    Where the scheme quantizes inputs, x is rounded just as an engine rounds it.
    """

    def __init__(self, format_: Any, tensors: Mapping[str, Tensor], scheme: Scheme, bias: Tensor | None = None) -> None:
        """UserError where the tensors do not fit the scheme."""
        super().__init__()
        self.format, self.scheme = format_, scheme
        self.out_features, self.in_features = format_.check_tensors(tensors, scheme)
        self.dtypes = {suffix: tensor.dtype for suffix, tensor in tensors.items()}
        for suffix, tensor in tensors.items():
            self.register_buffer(_buffer(suffix), tensor)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def quantized(self) -> QuantizedWeight:
        """Codes, scales and zero points, unpacked."""
        tensors = {suffix: self.get_buffer(_buffer(suffix)).to(dtype) for suffix, dtype in self.dtypes.items()}
        return self.format.unpack(tensors, self.scheme)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight [N, K], computed anew at each access."""
        return dequantize(self.quantized())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype."""
        bias, q = None if self.bias is None else self.bias.to(x.dtype), self.quantized()
        if self.scheme.activations is not None:
            x = fake_quantize(x, self.scheme.activations, q.input)
        return nn.functional.linear(x, dequantize(q).to(x.dtype), bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme}"


def _buffer(suffix: str) -> str:
    """`weight` is what the layer stands for, also where its codes lie under that name in the file."""
    return "weight_codes" if suffix == "weight" else suffix


def is_linear(module: nn.Module) -> bool:
    """Whether the module is known to compute x @ W^T + bias, with its weight stored as W or (Conv1D) as W^T.

    A subclass with a forward of its own, as routers have, may return something else.
    """
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)
