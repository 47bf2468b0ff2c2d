"""A quantized folder of any format, opened: the scheme of each module, its tensors, and the plain checkpoint it means.

load and convert read quantized folders through this one class; one module is in memory at a time.

Shapes: N = out features, K = in features of a linear.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import UserError
from quantkit.formats.described_folder import DescribedFolder
from quantkit.formats.interface import Format
from quantkit.formats.registry import FORMATS
from quantkit.types import QuantizedWeight

SCALES = ("weight_scale", "scales", "weight_scale_inv")  # what formats call the plain scales of a module


@dataclass(frozen=True, slots=True)
class QuantizedFolder(DescribedFolder):
    """A quantized checkpoint with its weights; what is known without them is the base's."""

    @property
    def form(self) -> Format:
        """The format: a value of FORMATS."""
        return FORMATS[self.name]

    def scale_dtype(self, module: str) -> torch.dtype:
        """The dtype of the scales of `weight(module)`."""
        names = [f"{module}.{suffix}" for suffix in SCALES]
        dtypes = {self.checkpoint.info(name).dtype for name in names if name in self.checkpoint.tensors}
        return next(iter(dtypes & {torch.float16, torch.bfloat16}), torch.float32)

    def tensors(self, module: str) -> dict[str, Tensor]:
        """The packed tensors of a module by suffix; UserError naming the module for NaN or infinite numbers."""
        found = {suffix: self.checkpoint.read(name) for suffix, name in self.own(module).items()}
        for suffix, tensor in found.items():
            if _has_nan(tensor, exponents=suffix in SCALES):
                what = "a weight is NaN" if suffix == "weight" else "a scale is NaN or infinite"
                with self.naming(module):
                    raise UserError(f"{what} ({suffix}); the folder is damaged, or was quantized wrongly")
        return found

    def weight(self, module: str) -> QuantizedWeight:
        """A module's weight, unpacked; UserError naming the module for tensors that do not fit, or are not finite."""
        tensors = self.tensors(module)
        with self.naming(module):
            return self.form.unpack(tensors, self.schemes[module])


def _has_nan(tensor: Tensor, *, exponents: bool) -> bool:
    """Whether a stored tensor holds NaN or infinity; exponents: bytes in it are e8m0 scales, whose NaN is 255."""
    if not tensor.numel():
        return False
    if tensor.dtype == torch.float8_e4m3fn:
        return bool((tensor.view(torch.uint8) & 127 == 127).any())
    if tensor.dtype == torch.uint8:
        return exponents and bool((tensor == 255).any())
    if not tensor.is_floating_point():
        return False
    wide = tensor.float() if tensor.itemsize == 1 else tensor  # other float8 have no reductions
    return not all(torch.isfinite(end) for end in wide.aminmax())
