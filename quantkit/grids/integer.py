"""The uniform integer grid: w = (code - zero) * scale, code in 0 .. 2**bits - 1.

A symmetric grid has zero = 2**(bits - 1), so its codes stand for -2**(bits-1) .. 2**(bits-1) - 1: one step more on the
negative side. A negative scale turns that side around, which halves the clipping error of a group whose extreme is
positive; the range search tries both signs where the format can store it.

Shapes: N = out features, K = in features, G = groups of a row, g = columns of a group, C = candidates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.types import QuantizedWeight, TensorSpec

CHUNK = 1 << 18  # elements searched at a time: the working set of one candidate stays in the cache


@dataclass(frozen=True, slots=True)
class RangeSearch:
    """Shrink the min-max range in `steps` steps down to `1 - span` of it, keep the least sum of |error|**norm.

    With an importance (E[x^2] of each input column) the error is importance * error**2 whatever `norm` says: that is
    the expected squared error of the layer's output when inputs are uncorrelated.
    """

    steps: int = 50
    span: float = 0.5
    norm: float = 2.4


@dataclass(frozen=True, slots=True)
class IntegerGrid:
    """Grid of one TensorSpec. Scales are rounded to `scale_dtype` before any code is chosen, as the file will hold them.

    search None is plain min-max; signed lets the search choose negative scales (symmetric grids only).
    """

    spec: TensorSpec
    scale_dtype: torch.dtype = torch.float32
    search: RangeSearch | None = None
    signed: bool = True

    def fit(self, w_NK: Tensor, importance_K: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scale [N, G] (scale_dtype) and zero point [N, G] (uint8) for a weight [N, K] of any float dtype.

        importance_K, [K] and non-negative, weights each column's squared error in the range search.
        """
        N, K = w_NK.shape
        G = self.spec.groups(K)
        w_Mg = w_NK.reshape(N * G, K // G)
        importance_Mg = None
        if importance_K is not None and self.search is not None:
            importance_Mg = importance_K.to(w_NK.device).reshape(1, G, K // G).expand(N, -1, -1).reshape(N * G, K // G)
        step = max(1, CHUNK // (K // G))
        parts = [
            self._fit_groups(w_Mg[i : i + step].float(), None if importance_Mg is None else importance_Mg[i : i + step])
            for i in range(0, N * G, step)
        ]
        scale_M, zero_M = (torch.cat(column) for column in zip(*parts, strict=True))
        return scale_M.reshape(N, G), zero_M.reshape(N, G)

    def _fit_groups(self, w_Mg: Tensor, importance_Mg: Tensor | None) -> tuple[Tensor, Tensor]:
        low_M, high_M = w_Mg.amin(1).clamp(max=0), w_Mg.amax(1).clamp(min=0)
        best_scale_M, best_zero_M = self._grid_for(low_M, high_M, 1.0)
        if self.search is None:
            return best_scale_M, best_zero_M
        best_M = self._error(w_Mg, best_scale_M, best_zero_M, importance_Mg)
        for i in range(self.search.steps):
            shrink = 1.0 - self.search.span * i / self.search.steps
            for sign in (1.0, -1.0) if self.signed and self.spec.symmetric else (1.0,):
                if i == 0 and sign > 0:
                    continue  # the min-max candidate has been measured
                scale_M, zero_M = self._grid_for(low_M, high_M, sign * shrink)
                error_M = self._error(w_Mg, scale_M, zero_M, importance_Mg)
                better_M = error_M < best_M
                best_M = torch.where(better_M, error_M, best_M)
                best_scale_M = torch.where(better_M, scale_M, best_scale_M)
                best_zero_M = torch.where(better_M, zero_M, best_zero_M)
        return best_scale_M, best_zero_M

    def _grid_for(self, low_M: Tensor, high_M: Tensor, shrink: float) -> tuple[Tensor, Tensor]:
        top = self.spec.levels - 1
        if self.spec.symmetric:
            scale_M = torch.maximum(-low_M, high_M) * (2 * shrink / top)
            scale_M = self._storable(scale_M)
            return scale_M, torch.full_like(scale_M, self.spec.levels // 2, dtype=torch.uint8)
        scale_M = self._storable((high_M - low_M) * (shrink / top))
        zero_M = (-low_M * shrink / scale_M.float()).round().clamp(0, top)
        return scale_M, zero_M.to(torch.uint8)

    def _storable(self, scale_M: Tensor) -> Tensor:
        """Round to the dtype on file, away from zero where it would vanish: an all-zero group gets the least scale."""
        tiny = torch.finfo(self.scale_dtype).tiny
        magnitude_M = scale_M.abs().clamp(min=tiny)
        return torch.where(scale_M < 0, -magnitude_M, magnitude_M).to(self.scale_dtype)

    def _error(self, w_Mg: Tensor, scale_M: Tensor, zero_M: Tensor, importance_Mg: Tensor | None) -> Tensor:
        scale_M1, zero_M1 = scale_M.float()[:, None], zero_M.float()[:, None]
        error_Mg = (w_Mg / scale_M1).round_().add_(zero_M1).clamp_(0, self.spec.levels - 1).sub_(zero_M1).mul_(scale_M1)
        error_Mg.sub_(w_Mg)
        if importance_Mg is not None:
            return error_Mg.square_().mul_(importance_Mg).sum(1)
        assert self.search is not None
        return error_Mg.abs_().pow_(self.search.norm).sum(1)

    def encode(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Codes (uint8) of w; scale and zero broadcast against it."""
        codes = (w / scale.to(w.dtype)).round_().add_(zero.to(w.dtype)).clamp_(0, self.spec.levels - 1)
        return codes.to(torch.uint8)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """(codes - zero) * scale, rounded once in scale's dtype: what compressed-tensors and the engines compute."""
        return (codes.to(scale.dtype) - zero.to(scale.dtype)) * scale

    def quantize(self, w_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor) -> QuantizedWeight:
        """Round every weight to its group's grid."""
        N, K = w_NK.shape
        G = scale_NG.shape[1]
        codes_NGg = self.encode(w_NK.reshape(N, G, K // G).float(), scale_NG[..., None], zero_NG[..., None])
        zero = None if self.spec.symmetric else zero_NG
        return QuantizedWeight(codes_NGg.reshape(N, K), scale_NG, zero, self.spec)


def dequantize(q: QuantizedWeight) -> Tensor:
    """The weight [N, K] a quantized weight stands for, in its scale's dtype."""
    N, K = q.codes_NK.shape
    G = q.scale_NG.shape[1]
    zero = q.spec.levels // 2 if q.zero_NG is None else q.zero_NG[..., None].to(q.scale_NG.dtype)
    codes_NGg = q.codes_NK.reshape(N, G, K // G).to(q.scale_NG.dtype)
    return ((codes_NGg - zero) * q.scale_NG[..., None]).reshape(N, K)
