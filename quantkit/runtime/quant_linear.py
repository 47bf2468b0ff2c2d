"""A linear layer whose weight stays quantized in memory and is multiplied by a kernel made for its format."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantkit.errors import RunError
from quantkit.formats import FORMATS, Format
from quantkit.grids.activations import fake_quantize
from quantkit.grids.dequantize import dequantize
from quantkit.runtime.definition import is_rounded, multiplied_weight
from quantkit.runtime.kernel_choice import Kernel, choose
from quantkit.types import ActivationRange, QuantizedWeight, Scheme

CODES = ("weight_packed", "qweight", "weight")  # what formats call the codes


class QuantLinear(nn.Module):
    """y = x @ W^T + bias with W kept as its format stores it, in buffers named as in the file (weight_packed, ...).

    The first call repacks W for the kernel that suits the scheme and the inputs' device and frees those buffers; the
    kernel's form gives them back exactly where the layer is moved, saved or copied. Casting leaves W as it is. Where no
    kernel takes it, W is dequantized at each call. All ways compute what `runtime.definition` says. Gradients flow to
    x, through the dequantized weight.
    """

    def __init__(
        self, format_: Format, tensors: Mapping[str, Tensor], scheme: Scheme, bias: Tensor | None = None
    ) -> None:
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
        self._scale_dtype = torch.float32  # likewise
        self._refused: tuple[torch.device, torch.dtype] | None = None  # inputs that no kernel was found for
        self._small: dict[str, Tensor] = {}  # all tensors but the codes, while a kernel holds those

    @property
    def format(self) -> Format:
        """What of FORMATS knows the tensors."""
        return FORMATS[self._format]

    def quantized(self) -> QuantizedWeight:
        """Codes, scales and zero points, unpacked."""
        return self.format.unpack(self.tensors(), self.scheme)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the file by suffix, bit for bit: as they are held, or rebuilt from the kernel's form.

        RunError where the layer is on the meta device, where nothing is left of them.
        """
        if self.kernel is None:
            held = {suffix: self.get_buffer(_buffer(suffix)) for suffix in self.dtypes}
            if any(tensor.is_meta for tensor in held.values()):
                raise RunError("this layer is on the meta device, which keeps no values: load the model again")
            return held
        absent = next(suffix for suffix in self.dtypes if suffix not in self._small)
        layout = self.format.layout((self.out_features, self.in_features), self.scheme, self._scale_dtype)
        empty = torch.zeros(layout[absent][1], dtype=self.dtypes[absent], device=self.kernel.device)
        rest = self.format.unpack({**self._small, absent: empty}, self.scheme)
        packed = self.format.pack(replace(rest, codes_NK=self.kernel.codes()), self.scheme)[absent]
        return {suffix: packed if suffix == absent else self._small[suffix] for suffix in self.dtypes}

    @property
    def weight(self) -> Tensor:
        """The dequantized weight [N, K] in its scales' dtype, computed at each access."""
        return dequantize(self.quantized()) if self.kernel is None else self.kernel.decode().to(self._scale_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype. ValueError where x does not fit the layer, or lies elsewhere than it."""
        if x.dim() == 0 or x.shape[-1] != self.in_features or not x.is_floating_point():
            wanted = f"floating [..., {self.in_features}]"
            raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; {self.extra_repr()} takes {wanted}")
        y = self._product(x)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def _product(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return self._dequantized(x)
        if self.kernel is None and self._refused != (x.device, x.dtype):
            self._repack(x)
        if self.kernel is None:
            return self._dequantized(x)
        if x.device != self.kernel.device:
            raise ValueError(
                f"x is on {x.device}, this layer was repacked for {self.kernel.device}: move one of them with .to()"
            )
        return self.kernel.run(x)

    def _dequantized(self, x: Tensor) -> Tensor:
        """By definition, with the weight dequantized."""
        dtype, inputs = x.dtype, self.scheme.activations
        w_NK = multiplied_weight(self.quantized(), self.scheme) if self.kernel is None else self.kernel.decode()
        if not is_rounded(self.scheme):
            x = x.to(torch.promote_types(dtype, torch.float32))
        if inputs is not None:
            x = fake_quantize(x, inputs, self._input if self.kernel is not None else self.quantized().input)
        return nn.functional.linear(x, w_NK.to(x.dtype)).to(dtype)

    def _repack(self, x: Tensor) -> None:
        """Find the kernel and hand the weight over to it."""
        q = self.quantized()
        self.kernel = choose(q, self.scheme, x.device, x.dtype)
        if self.kernel is None:
            self._refused = x.device, x.dtype
            return
        self._input, self._scale_dtype = q.input, q.scale_NG.dtype
        for suffix in self.dtypes:
            if suffix not in CODES:
                self._small[suffix] = self.get_buffer(_buffer(suffix))
            delattr(self, _buffer(suffix))

    def _restore(self) -> None:
        """Take the weight back from the kernel; the next call finds one again."""
        if self.kernel is None:
            return
        tensors = self.tensors()
        self.kernel, self._small, self._refused = None, {}, None
        for suffix, tensor in tensors.items():
            self.register_buffer(_buffer(suffix), tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantLinear":
        """Move the weight as bits, so that it is never rounded; the bias is moved and cast."""
        self._restore()
        self._refused = None
        held = {suffix: self._buffers.pop(_buffer(suffix)) for suffix in self.dtypes}
        super()._apply(fn, recurse)
        for suffix, tensor in held.items():
            assert tensor is not None
            bits = fn(tensor.contiguous().reshape(-1).view(torch.uint8))
            self._buffers[_buffer(suffix)] = bits.view(tensor.dtype).reshape(tensor.shape)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for suffix, tensor in self.tensors().items() if self.kernel is not None else ():
            destination[prefix + _buffer(suffix)] = tensor

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
