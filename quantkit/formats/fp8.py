"""`quant_method: fp8`, the two dialects of 8-bit floats that engines read under this name.

BLOCKS, DeepSeek's and transformers': weight float8_e4m3fn [N, K] and weight_scale_inv float32 [ceil(N / 128),
ceil(K / 128)], which multiplies, whatever its name says; inputs are quantized as they come, 128 features at a time.
The last blocks may be cut short, which engines read; transformers, where it dequantizes, knows whole blocks only.
TENSOR, vLLM's: weight and weight_scale float32 [], one for the tensor; inputs as they come, a scale per token, or with
input_scale float32 [] from calibration. (transformers calls the per-tensor scales differently and does not read it.)

Shapes: N = out features, K = in features.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from quantkit.checkpoint.header import tag_of
from quantkit.errors import UserError
from quantkit.formats import common
from quantkit.formats.config import fp8 as config
from quantkit.formats.config.fp8 import STATIC, Fp8Config
from quantkit.grids.dequantize import (
    collapse,
    expand,
)
from quantkit.grids.elements import (
    FP8,
)
from quantkit.types import ActivationRange, QuantizedWeight, Scheme


@dataclass(frozen=True, slots=True)
class Fp8(Fp8Config):
    """One dialect, used like a format module."""

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        """float32, whatever the weight was stored as."""
        return torch.float32

    def layout(self, shape: tuple[int, int], scheme: Scheme, scale_dtype: torch.dtype) -> common.Layout:
        """Suffix -> (dtype, shape) of what `pack` makes of a weight of shape (N, K); UserError if it cannot hold it."""
        return common.as_layout(self.stored(shape, scheme, tag_of(scale_dtype)))

    def pack(self, q: QuantizedWeight, scheme: Scheme | None = None) -> dict[str, Tensor]:
        """The module's tensors by suffix, as `layout` announces them; the weight alone tells which."""
        if q.scale_NG.dtype != torch.float32:
            raise UserError(f"{self.name} scales are float32, not {q.scale_NG.dtype}")
        common.check_scales(q, self.name)
        scale = collapse(q.scale_NG, q.spec)
        assert torch.equal(expand(scale, q.spec, len(q.scale_NG)), q.scale_NG), "rows of a block have one scale"
        tensors = {"weight": q.codes_NK.view(FP8), self.MARK: scale.reshape(()) if q.spec.scale_rows == -1 else scale}
        if q.input is not None:
            tensors["input_scale"] = q.input.scale.reshape(()).float()
        return tensors

    def check_tensors(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> tuple[int, int]:
        """(N, K) of a module's tensors; UserError where one of them does not fit the scheme."""
        return self.shape_of(common.headers_of(tensors), scheme)

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        """The inverse of `pack`; UserError where a tensor does not fit the scheme."""
        N, _ = self.check_tensors(tensors, scheme)
        scale = tensors[self.MARK].reshape(1, 1) if scheme.weights.scale_rows == -1 else tensors[self.MARK]
        given = ActivationRange(tensors["input_scale"].reshape(())) if scheme == STATIC else None
        codes_NK = tensors["weight"].view(torch.uint8)
        return QuantizedWeight(codes_NK, expand(scale, scheme.weights, N), None, scheme.weights, input=given)


def _with_tensors(described: Fp8Config) -> Fp8:
    return Fp8(**{field.name: getattr(described, field.name) for field in fields(described)})


BLOCKS, TENSOR = _with_tensors(config.BLOCKS), _with_tensors(config.TENSOR)
