"""The uniform integer grid: w = (code - zero) * scale, code in 0 .. 2**bits - 1.

A symmetric grid has zero = 2**(bits - 1), so its codes stand for -2**(bits-1) .. 2**(bits-1) - 1: one step more on the
negative side. A negative scale moves that step to the positive side, which halves the clipping error of a group whose
extreme is positive; the range search tries both signs where the format can store it.

Shapes: N = out features (n of them at a time), K = in features, G = groups of a row, g = columns of a group.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.grids.columns import GroupColumns, GroupScales
from quantkit.grids.dequantize import dequantize
from quantkit.types import QuantizedWeight, TensorSpec

CHUNK = 1 << 18  # elements worked on at a time: the working set of one candidate stays in the cache
FINE = (1 / 2, 1 / 4)  # after the coarse steps, both neighbours at these fractions of a step are tried


@dataclass(frozen=True, slots=True)
class RangeSearch:
    """Shrink the min-max range in `steps` steps towards `1 - span` of it, refine around the best, keep the least error.

    The error is sum of importance * error**2, with importance E[x^2] of each input column: the expected squared error
    of the layer's output when inputs are uncorrelated. Without an importance it is sum of |error|**norm. Where errors
    are squared, every candidate gets the scale that is best for its codes, in closed form: 8 steps and the refinement
    (20 candidates) then reach the error of 100 shrunk ranges.
    """

    steps: int = 8
    span: float = 0.5
    norm: float = 2.0


@dataclass(frozen=True, slots=True)
class IntegerGrid:
    """Grid of one TensorSpec. Scales are rounded to `scale_dtype`, as they will be stored, before codes are chosen.

    search None is plain min-max; signed lets the search choose negative scales (symmetric grids only).
    fixed is the one scale of a tensor-wide grid, set by `for_tensors`.
    """

    spec: TensorSpec
    scale_dtype: torch.dtype = torch.float32
    search: RangeSearch | None = None
    signed: bool = True
    fixed: float | None = None

    @property
    def row_wise(self) -> bool:
        """Whether a row's scales come from that row alone."""
        return self.spec.scale_rows == 1

    def for_tensors(self, weights: Sequence[Tensor], importance_K: Tensor | None = None) -> "IntegerGrid":
        """This grid with what weights [N_i, K] that an engine fuses must share: the one scale of a tensor-wide grid.

        Found once, it stays.
        """
        if self.spec.scale_rows != -1 or self.fixed is not None:
            return self
        flat = replace(self, spec=replace(self.spec, scale_rows=1, group_size=-1))
        amax = max((w_NK.abs().amax().item() for w_NK in weights), default=0.0)
        scale = flat._storable(torch.tensor(2 * amax / (self.spec.levels - 1)))
        if self.search is not None and amax > 0:
            root_K = None if importance_K is None else importance_K.float().sqrt()
            step = self.search.span / self.search.steps
            scales = [flat._storable(scale.float() * (1 - step * i)) for i in range(self.search.steps)]
            errors = [sum(flat._rows_error(w_NK, s, root_K) for w_NK in weights) for s in scales]
            scale = scales[errors.index(min(errors))]
        return replace(self, fixed=scale.float().item())

    def _rows_error(self, w_NK: Tensor, scale: Tensor, root_K: Tensor | None) -> float:
        """The error of a whole weight on one scale."""
        total, zero = 0.0, torch.tensor(self.spec.levels // 2, dtype=torch.uint8)
        for rows in _row_chunks(*w_NK.shape):
            w_n1K = w_NK[rows].float()[:, None]
            scale_n1 = scale.to(w_n1K.device).expand(len(w_n1K), 1)
            total += self._error(w_n1K, scale_n1, zero.to(w_n1K.device).expand(len(w_n1K), 1), root_K).sum().item()
        return total

    def fit(self, w_NK: Tensor, importance_K: Tensor | None = None) -> GroupScales:
        """Scale [N, G] (scale_dtype) and zero point [N, G] (uint8) for a weight [N, K] of any float dtype.

        importance_K, [K] and non-negative, weights each column's squared error in the range search. A group's range
        depends on its own weights alone, whatever the batch it is fitted in, and is never worse than min-max.
        """
        N, K = w_NK.shape
        G = self.spec.groups(K)
        if self.spec.scale_rows == -1:
            assert self.fixed is not None, "a tensor-wide grid is made by for_tensors"
            scale_NG = torch.full((N, 1), self.fixed, dtype=self.scale_dtype, device=w_NK.device)
            return GroupScales(scale_NG, torch.full_like(scale_NG, self.spec.levels // 2, dtype=torch.uint8))
        root_Gg = None
        if importance_K is not None and self.search is not None:
            root_Gg = importance_K.to(w_NK.device, torch.float32).sqrt().reshape(G, K // G)
        scale_NG = torch.empty(N, G, dtype=self.scale_dtype, device=w_NK.device)
        zero_NG = torch.empty(N, G, dtype=torch.uint8, device=w_NK.device)
        for rows in _row_chunks(N, K):
            scale_NG[rows], zero_NG[rows] = self._fit_groups(w_NK[rows].float().reshape(-1, G, K // G), root_Gg)
        return GroupScales(scale_NG, zero_NG)

    def _fit_groups(self, w_nGg: Tensor, root_Gg: Tensor | None) -> tuple[Tensor, Tensor]:
        low_nG, high_nG = w_nGg.amin(2).clamp_(max=0), w_nGg.amax(2).clamp_(min=0)
        scale_nG, zero_nG = self._grid_for(low_nG, high_nG, 1.0)
        if self.search is None:
            return scale_nG, zero_nG
        least_nG = self._error(w_nGg, scale_nG, zero_nG, root_Gg)
        closed_form = root_Gg is not None or self.search.norm == 2
        found_nG, found_zero_nG = self._search_range(w_nGg, low_nG, high_nG, root_Gg, closed_form)
        # Closed form, once more, on the codes of the range found; min-max stays where nothing beats it.
        for _ in range(2 if closed_form else 1):
            found_nG = self._storable(found_nG)
            error_nG = self._error(w_nGg, found_nG, found_zero_nG, root_Gg)
            better_nG = error_nG < least_nG
            least_nG = torch.where(better_nG, error_nG, least_nG)
            scale_nG = torch.where(better_nG, found_nG, scale_nG)
            zero_nG = torch.where(better_nG, found_zero_nG, zero_nG)
            if closed_form:
                found_nG, _ = self._best_scale(w_nGg, found_nG.float(), found_zero_nG, root_Gg)
        return scale_nG, zero_nG

    def _search_range(
        self, w_nGg: Tensor, low_nG: Tensor, high_nG: Tensor, root_Gg: Tensor | None, closed_form: bool
    ) -> tuple[Tensor, Tensor]:
        """Scale (float32, not yet storable) and zero point of the best candidate."""
        assert self.search is not None
        least_nG = torch.full_like(low_nG, torch.inf)
        best_scale_nG, best_shrink_nG = torch.ones_like(low_nG), torch.ones_like(low_nG)
        best_zero_nG = torch.zeros_like(low_nG, dtype=torch.uint8)
        step = self.search.span / self.search.steps
        signs = (1.0, -1.0) if self.signed and self.spec.symmetric else (1.0,)
        coarse = [sign * (1 - step * i) for i in range(self.search.steps) for sign in signs]
        fine = [side * part * step for part in FINE for side in (1.0, -1.0)]
        center_nG = best_shrink_nG
        for i, amount in enumerate(coarse + fine):
            if i < len(coarse):
                shrink_nG = torch.full_like(low_nG, amount)
            else:
                if (i - len(coarse)) % 2 == 0:
                    center_nG = best_shrink_nG
                shrink_nG = center_nG + center_nG.sign() * amount
            scale_nG, zero_nG = self._grid_for(low_nG, high_nG, shrink_nG)
            if closed_form:
                scale_nG, error_nG = self._best_scale(w_nGg, scale_nG.float(), zero_nG, root_Gg)
            else:
                scale_nG, error_nG = scale_nG.float(), self._error(w_nGg, scale_nG, zero_nG, root_Gg)
            better_nG = error_nG < least_nG
            least_nG = torch.where(better_nG, error_nG, least_nG)
            best_scale_nG = torch.where(better_nG, scale_nG, best_scale_nG)
            best_zero_nG = torch.where(better_nG, zero_nG, best_zero_nG)
            best_shrink_nG = torch.where(better_nG, shrink_nG, best_shrink_nG)
        return best_scale_nG, best_zero_nG

    def _best_scale(
        self, w_nGg: Tensor, scale_nG: Tensor, zero_nG: Tensor, root_Gg: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """With c the codes (less zero) on this scale, min over s of sum h (w - s c)^2: s = sum h w c / sum h c^2.

        Returns s and the error less sum h w^2 (the same for every candidate): -(sum h w c)^2 / sum h c^2.
        """
        code_nGg = self._steps(w_nGg, 1 / scale_nG, zero_nG)
        if root_Gg is not None:
            code_nGg.mul_(root_Gg)
        norm_nG = torch.linalg.vector_norm(code_nGg, dim=2).square_().clamp_(min=torch.finfo(torch.float32).tiny)
        if root_Gg is not None:
            code_nGg.mul_(root_Gg)
        shared_nG = code_nGg.mul_(w_nGg).sum(2)
        best_nG = shared_nG / norm_nG
        return best_nG, -best_nG * shared_nG

    def _steps(self, w_nGg: Tensor, inverse_nG: Tensor, zero_nG: Tensor) -> Tensor:
        """Codes minus zero, as floats."""
        code_nGg = (w_nGg * inverse_nG[..., None]).round_()
        top = self.spec.levels - 1
        if self.spec.symmetric:
            return code_nGg.clamp_(-(self.spec.levels // 2), top - self.spec.levels // 2)
        zero_nG1 = zero_nG.float()[..., None]  # bounds that are tensors make clamp several times slower
        return code_nGg.add_(zero_nG1).clamp_(0, top).sub_(zero_nG1)

    def _grid_for(self, low_nG: Tensor, high_nG: Tensor, shrink: Tensor | float) -> tuple[Tensor, Tensor]:
        top = self.spec.levels - 1
        if self.spec.symmetric:
            scale_nG = self._storable(torch.maximum(-low_nG, high_nG) * (2 * shrink / top))
            return scale_nG, torch.full_like(scale_nG, self.spec.levels // 2, dtype=torch.uint8)
        scale_nG = self._storable((high_nG - low_nG) * (shrink / top))
        zero_nG = (-low_nG * shrink / scale_nG.float()).round_().clamp_(0, top)
        return scale_nG, zero_nG.to(torch.uint8)

    def _storable(self, scale: Tensor) -> Tensor:
        """Scales rounded to the stored dtype, away from zero where they would vanish: zeros get the smallest."""
        tiny = torch.finfo(self.scale_dtype).tiny
        magnitude = scale.abs().clamp_(min=tiny)
        return torch.where(scale < 0, -magnitude, magnitude).to(self.scale_dtype)

    def _error(self, w_nGg: Tensor, scale_nG: Tensor, zero_nG: Tensor, root_Gg: Tensor | None) -> Tensor:
        scale_nG = scale_nG.float()
        error_nGg = self._steps(w_nGg, 1 / scale_nG, zero_nG).mul_(scale_nG[..., None]).sub_(w_nGg)
        if root_Gg is not None:
            error_nGg.mul_(root_Gg)
        assert self.search is not None
        norm = 2 if root_Gg is not None else self.search.norm
        return error_nGg.square_().sum(2) if norm == 2 else error_nGg.abs_().pow_(norm).sum(2)

    def codes_of(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Codes (uint8) of w; scale and zero broadcast against it."""
        codes = (w / scale.to(w.dtype)).round_().add_(zero.to(w.dtype)).clamp_(0, self.spec.levels - 1)
        return codes.to(torch.uint8)

    def values_of(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """(codes - zero) * scale, rounded once in scale's dtype: what compressed-tensors and the engines compute."""
        return (codes.to(scale.dtype) - zero.to(scale.dtype)) * scale

    def storable(self, scale: Tensor) -> Tensor:
        """The nearest scale that can be stored, in scale's own dtype; of the same sign."""
        return self._storable(scale).to(scale.dtype)

    def limits(self, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Least and greatest step (code less zero) for these zero points, in zero's own dtype (a float)."""
        return -zero, self.spec.levels - 1 - zero

    def round_(self, steps: Tensor) -> Tensor:
        """Steps within their limits to the nearest ones that have a code, in place."""
        return steps.round_()

    def codes(self, steps: Tensor, zero: Tensor) -> Tensor:
        """Codes (uint8) of steps that have one."""
        return (steps + zero.to(steps.dtype)).to(torch.uint8)

    def steps(self, codes: Tensor, zero: Tensor) -> Tensor:
        """The inverse of `codes`, in zero's dtype."""
        return codes.to(zero.dtype) - zero

    def encode(self, w_NK: Tensor, parameters: GroupScales) -> Tensor:
        """Codes (uint8) [N, K] of the nearest numbers of each group's grid."""
        N, K = w_NK.shape
        scale_NG, zero_NG = parameters
        G = scale_NG.shape[1]
        codes_NK = torch.empty(N, K, dtype=torch.uint8, device=w_NK.device)
        for rows in _row_chunks(N, K):
            w_nGg = w_NK[rows].float().reshape(-1, G, K // G)
            codes_NK[rows] = self.codes_of(w_nGg, scale_NG[rows, :, None], zero_NG[rows, :, None]).reshape(-1, K)
        return codes_NK

    def decode(self, codes_NK: Tensor, parameters: GroupScales) -> Tensor:
        """The numbers [N, K] that codes stand for, in scale_dtype."""
        return dequantize(self.weight(codes_NK, parameters))

    def weight(self, codes_NK: Tensor, parameters: GroupScales) -> QuantizedWeight:
        """Codes, scales and zero points of this grid as a QuantizedWeight."""
        scale_NG, zero_NG = parameters
        return QuantizedWeight(codes_NK, scale_NG, None if self.spec.symmetric else zero_NG, self.spec)

    def quantize(self, w_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor) -> QuantizedWeight:
        """Every weight rounded to its group's grid."""
        parameters = GroupScales(scale_NG, zero_NG)
        return self.weight(self.encode(w_NK, parameters), parameters)

    def by_column(self, parameters: GroupScales, K: int, dtype: torch.dtype) -> GroupColumns:
        """The parameters laid out for work on columns in `dtype`."""
        return GroupColumns(self, parameters, K, dtype)


def _row_chunks(N: int, K: int) -> Iterator[slice]:
    rows = max(1, CHUNK // K)
    return (slice(start, start + rows) for start in range(0, N, rows))
