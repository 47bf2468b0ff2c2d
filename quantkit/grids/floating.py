"""Grids of small floats: w = e4m3 or e2m1 number * scale. fp8 per tensor, row or block; NVFP4; MXFP4 and MXFP8.

A float's step grows with its size, so shrinking the range, as for integers, gains little here: what counts is where
the scale puts the weights between two powers of two. The search therefore tries scales over a whole octave, from the
smallest that clips nothing (a little below it for four bits, where the gaps at the top are wide) to twice that.

NVFP4 scales are e4m3 numbers times one global scale of the tensor. Ours is a power of two, at most twice as coarse as
448 * 6 / amax would be: e4m3 is as precise everywhere, and formats that store the reciprocal hold the same number.

Sources: arXiv:2209.05433 (e4m3), OCP Microscaling Formats v1.0 (MX: exponent floor(log2 amax) - emax), NVIDIA's NVFP4.
Shapes: N = out features, K = in features, G = groups of a row, g = elements of a group (of a whole block, with blocks).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.grids.columns import GroupColumns, GroupScales
from quantkit.grids.dequantize import dequantize, expand
from quantkit.grids.elements import (
    EMAX,
    FP8,
    encode_float,
    float_codes,
    float_steps,
    round_float_,
)
from quantkit.grids.integer import CHUNK, RangeSearch
from quantkit.types import FP8_MAX, QuantizedWeight, TensorSpec

OCTAVE = 16  # plain scales tried in an octave
E4M3_DOWN, E4M3_UP = 3, 7  # e4m3 numbers tried below and above the one next to amax / 6: eight make an octave
LEAST_SCALE = 2.0**-120  # of a group of zeros


@dataclass(frozen=True, slots=True)
class FloatGrid:
    """Grid of one TensorSpec with float elements; the interface of IntegerGrid. Scales are float32.

    search None takes the smallest scale that clips nothing (for MX the exponent of the standard, which may clip).
    fixed         the one scale of a tensor-wide grid, global_scale that of e4m3 scales: set by `for_tensors`
    """

    spec: TensorSpec
    scale_dtype: torch.dtype = torch.float32
    search: RangeSearch | None = None
    signed: bool = False
    fixed: float | None = None
    global_scale: float | None = None

    @property
    def row_wise(self) -> bool:
        """Whether a row's scales come from that row alone, given the global one."""
        return self.spec.scale_rows == 1

    def for_tensors(self, weights: Sequence[Tensor], importance_K: Tensor | None = None) -> "FloatGrid":
        """This grid with what weights [N_i, K] that an engine fuses must share: the scale or the global scale.

        Found once, it stays.
        """
        if (
            (self.spec.scale_rows != -1 and self.spec.scale_format != "e4m3")
            or self.fixed is not None
            or self.global_scale is not None
        ):
            return self
        amax = max((w_NK.abs().amax().item() for w_NK in weights), default=0.0)
        if self.spec.scale_format == "e4m3":
            exponent = math.ceil(math.log2(max(amax, LEAST_SCALE) / (self.spec.top * FP8_MAX)))
            return replace(self, global_scale=2.0 ** max(exponent, -126))
        scale = _float32(max(amax / self.spec.top, LEAST_SCALE))
        if self.search is None or amax == 0:
            return replace(self, fixed=scale)
        candidates = [_float32(scale * 2 ** (i / OCTAVE)) for i in range(OCTAVE)]
        root_K = None if importance_K is None else importance_K.sqrt()
        errors = [sum(self._tensor_error(w_NK, root_K, s) for w_NK in weights) for s in candidates]
        return replace(self, fixed=candidates[errors.index(min(errors))])

    def _tensor_error(self, w_NK: Tensor, root_K: Tensor | None, scale: float) -> float:
        total, rows = 0.0, max(1, CHUNK // w_NK.shape[1])
        for start in range(0, len(w_NK), rows):
            w_nK = w_NK[start : start + rows].float()
            error_nK = round_float_(w_nK / scale, self.spec.bits).mul_(scale).sub_(w_nK)
            if root_K is not None:
                error_nK *= root_K.to(error_nK)
            total += torch.linalg.vector_norm(error_nK).double().square().item()
        return total

    def fit(self, w_NK: Tensor, importance_K: Tensor | None = None) -> GroupScales:
        """Scale [N, G] (float32) and zero point [N, G] (uint8, all 0) for a weight [N, K] of any float dtype.

        importance_K, [K] and non-negative, weights each column's squared error in the search. Tensor-wide grids and
        those of e4m3 scales must have been through `for_tensors`.
        """
        N, K = w_NK.shape
        G, size = self.spec.groups(K), self.spec.columns(K)
        scale_NG = torch.empty(N, G, dtype=torch.float32, device=w_NK.device)
        if self.spec.scale_rows == -1:
            assert self.fixed is not None, "a tensor-wide grid is made by for_tensors"
            scale_NG.fill_(self.fixed)
        else:
            tall = self.spec.scale_rows
            root_Gg = None
            if importance_K is not None and self.search is not None:
                root_K = torch.nn.functional.pad(importance_K.to(w_NK.device, torch.float32).sqrt(), (0, G * size - K))
                root_Gg = root_K.reshape(G, size).repeat(1, tall)
            step = max(tall, CHUNK // K // tall * tall)
            for start in range(0, N, step):
                w_nK = w_NK[start : start + step].float()
                n = len(w_nK)
                if G * size != K or n % tall:
                    w_nK = torch.nn.functional.pad(w_nK, (0, G * size - K, 0, -n % tall))
                cells_nGg = w_nK.reshape(-1, tall, G, size).transpose(1, 2).reshape(-1, G, tall * size)
                scale_NG[start : start + n] = expand(self._fit_groups(cells_nGg, root_Gg), self.spec, n)
        return GroupScales(scale_NG, torch.zeros(N, G, dtype=torch.uint8, device=w_NK.device))

    def _fit_groups(self, w_nGg: Tensor, root_Gg: Tensor | None) -> Tensor:
        amax_nG = w_nGg.abs().amax(2)
        if self.search is None:
            return self._candidate(amax_nG, None)
        count = {"float": OCTAVE, "e4m3": E4M3_DOWN + E4M3_UP + 1, "e8m0": 3}[self.spec.scale_format]
        usual = {"float": 0, "e4m3": E4M3_DOWN, "e8m0": 1}[self.spec.scale_format]  # first: kept where errors overflow
        tried = [self._candidate(amax_nG, i) for i in (usual, *(i for i in range(count) if i != usual))]
        best_nG, least_nG = tried[0], torch.full_like(amax_nG, torch.inf)
        for i in range(count + (self.spec.scale_format == "float")):
            # last, for plain scales: the best one in closed form for the codes of the best found
            scale_nG = tried[i] if i < count else self.storable(self._solved(w_nGg, best_nG, root_Gg))
            error_nGg = self._steps(w_nGg, scale_nG).mul_(scale_nG[..., None]).sub_(w_nGg)
            if root_Gg is not None:
                error_nGg.mul_(root_Gg)
            error_nG = torch.linalg.vector_norm(error_nGg, dim=2)
            better_nG = error_nG < least_nG
            least_nG = torch.where(better_nG, error_nG, least_nG)
            best_nG = torch.where(better_nG, scale_nG, best_nG)
        return best_nG

    def _candidate(self, amax_nG: Tensor, index: int | None) -> Tensor:
        """The index-th scale tried for groups with these largest magnitudes; None: the one without a search."""
        if self.spec.scale_format == "e8m0":
            # frexp gives amax = m 2^e with 1/2 <= m < 1, so floor(log2 amax) = e - 1
            exponent_nG = torch.frexp(amax_nG.clamp(min=LEAST_SCALE)).exponent - 1 - EMAX[self.spec.bits]
            exponent_nG += 0 if index is None else index - 1
            return torch.ldexp(torch.ones_like(amax_nG), exponent_nG.clamp(-126, 127))
        least_nG = amax_nG / self.spec.top
        if self.spec.scale_format == "float":
            return self.storable(least_nG * 2 ** ((index or 0) / OCTAVE))
        nearest_nG = self.storable(least_nG)
        if index is None:
            return nearest_nG
        assert self.global_scale is not None
        # positive e4m3 numbers are in the order of their bit patterns
        code_nG = (nearest_nG / self.global_scale).to(FP8).view(torch.uint8).int() + index - E4M3_DOWN
        return code_nG.clamp_(1, 0x7E).to(torch.uint8).view(FP8).float() * self.global_scale

    def _solved(self, w_nGg: Tensor, scale_nG: Tensor, root_Gg: Tensor | None) -> Tensor:
        """With c the steps on this scale, argmin over s of sum h (w - s c)^2 = sum h w c / sum h c^2."""
        step_nGg = self._steps(w_nGg, scale_nG)
        weighted_nGg = step_nGg if root_Gg is None else step_nGg * root_Gg.square()
        norm_nG = (weighted_nGg * step_nGg).sum(2)
        solved_nG = (weighted_nGg * w_nGg).sum(2) / norm_nG
        return torch.where((norm_nG > 0) & torch.isfinite(solved_nG), solved_nG, scale_nG)

    def _steps(self, w_nGg: Tensor, scale_nG: Tensor) -> Tensor:
        return round_float_(w_nGg / scale_nG[..., None], self.spec.bits)

    def storable(self, scale: Tensor) -> Tensor:
        """The nearest positive scale that can be stored, as float32."""
        scale = scale.float().abs()
        if self.spec.scale_format == "float":
            return scale.clamp_(min=LEAST_SCALE)
        if self.spec.scale_format == "e8m0":
            return torch.exp2(torch.log2(scale.clamp(min=LEAST_SCALE)).round_().clamp_(-126, 127))
        assert self.global_scale is not None, "a grid of e4m3 scales is made by for_tensors"
        least = torch.finfo(FP8).smallest_normal / 8  # the smallest subnormal: zero would lose the group
        return (scale / self.global_scale).clamp_(least, FP8_MAX).to(FP8).float() * self.global_scale

    def limits(self, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Least and greatest step for these zero points, float32."""
        top = torch.full_like(zero, self.spec.top, dtype=torch.float32)
        return -top, top

    def round_(self, steps: Tensor) -> Tensor:
        """Steps within their limits to the nearest ones that have a code, in place."""
        return round_float_(steps, self.spec.bits)

    def codes(self, steps: Tensor, zero: Tensor) -> Tensor:
        """Codes (uint8) of steps that have one."""
        return float_codes(steps, self.spec.bits)

    def steps(self, codes: Tensor, zero: Tensor) -> Tensor:
        """The inverse of `codes`, in zero's dtype."""
        return float_steps(codes, self.spec.bits, zero.dtype)

    def encode(self, w_NK: Tensor, parameters: GroupScales) -> Tensor:
        """Codes (uint8) [N, K] of the nearest numbers of each group's grid."""
        (N, K), scale_NG = w_NK.shape, parameters.scale_NG
        codes_NK, size = torch.empty(N, K, dtype=torch.uint8, device=w_NK.device), self.spec.columns(K)
        whole, step = scale_NG.shape[1] * size == K, max(1, 2 * CHUNK // K)
        room_nK = torch.empty(min(step, N), K, dtype=torch.float32, device=w_NK.device)
        for start in range(0, N, step):
            w_nK, scale_nG = w_NK[start : start + step], scale_NG[start : start + step]
            steps_nK = room_nK[: len(w_nK)]
            if whole:
                shape = (len(w_nK), -1, size)
                torch.div(w_nK.reshape(shape), scale_nG[..., None], out=steps_nK.view(shape))
            else:
                torch.div(w_nK, scale_nG.repeat_interleave(size, 1)[:, :K], out=steps_nK)
            encode_float(steps_nK, self.spec.bits, codes_NK[start : start + step])
        return codes_NK

    def decode(self, codes_NK: Tensor, parameters: GroupScales) -> Tensor:
        """The numbers [N, K] that codes stand for, float32."""
        return dequantize(self.weight(codes_NK, parameters))

    def weight(self, codes_NK: Tensor, parameters: GroupScales) -> QuantizedWeight:
        """Codes and scales of this grid as a QuantizedWeight."""
        return QuantizedWeight(codes_NK, parameters.scale_NG, None, self.spec, self.global_scale)

    def quantize(self, w_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor) -> QuantizedWeight:
        """Every weight rounded to its group's grid."""
        parameters = GroupScales(scale_NG, zero_NG)
        return self.weight(self.encode(w_NK, parameters), parameters)

    def by_column(self, parameters: GroupScales, K: int, dtype: torch.dtype) -> GroupColumns:
        """The parameters laid out for work on columns in `dtype`."""
        return GroupColumns(self, parameters, K, dtype)


def _float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()
