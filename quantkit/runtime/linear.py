"""A linear layer whose weight stays packed in memory and is dequantized for each call."""

from collections.abc import Mapping
from types import ModuleType

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantkit.grids.integer import dequantize
from quantkit.types import QuantizedWeight, TensorSpec


class QuantLinear(nn.Module):
    """y = x @ W^T + bias with W kept as its format stores it, in buffers named as in the file (weight_packed, ...).

    W is dequantized in the dtype its scales have on file and then brought to x's, whatever the module was cast to.
    """

    def __init__(
        self, format_: ModuleType, tensors: Mapping[str, Tensor], spec: TensorSpec, bias: Tensor | None = None
    ) -> None:
        """UserError where the tensors do not fit the spec."""
        super().__init__()
        self.format, self.spec = format_, spec
        self.out_features, self.in_features = format_.check_tensors(tensors, spec)
        self.scale_dtype = tensors["weight_scale"].dtype
        for suffix, tensor in tensors.items():
            self.register_buffer(suffix, tensor)
        self.suffixes = tuple(tensors)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def quantized(self) -> QuantizedWeight:
        """Codes, scales and zero points, unpacked."""
        tensors = {suffix: getattr(self, suffix) for suffix in self.suffixes}
        tensors["weight_scale"] = tensors["weight_scale"].to(self.scale_dtype)
        return self.format.unpack(tensors, self.spec)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight [N, K], computed anew at each access."""
        return dequantize(self.quantized())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight.to(x.dtype), bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.spec}"


def is_linear(module: nn.Module) -> bool:
    """Whether the module is known to compute x @ W^T + bias, with its weight stored as W or (Conv1D) as W^T.

    A subclass with a forward of its own, as routers have, may return something else.
    """
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)
