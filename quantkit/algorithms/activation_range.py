"""Static ranges of inputs: a histogram of all calibration inputs, and where to clip it.

A histogram has bins of equal width over -limit .. limit. The limit is the least power of two above everything seen;
when it grows, neighbouring bins merge in pairs. Bin edges are therefore multiples of a power of two, and the result
does not depend on the order of the batches or on how histograms were merged (but for negative numbers some 2^100 times
smaller than the largest, which may count as the smallest positive ones).

Ranges by method:

minmax      everything seen
percentile  what holds that share of the numbers: by magnitude, for asymmetric ranges with equal shares cut at both ends
mse         the least squared rounding and clipping error on the very grid that will be used
entropy     the least KL(P || Q), the calibration of TensorRT (S. Migacz, 8-bit Inference with TensorRT, GTC 2017):
            P is the histogram with what is clipped added to the outermost bins, Q the part not clipped with each code's
            share spread evenly over those of its bins that P uses. For fp8 a code is an e4m3 number.
            Unlike there, exact zeros are left out, which every grid holds exactly; the bins are so many that each
            has 64 numbers on average (else the noise of the counts would decide); and where P has numbers but Q has
            none, Q counts half a number instead of ruling the range out

Shapes: B = bins, S = candidate ranges, L = codes.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from quantkit.errors import RunError
from quantkit.grids.elements import FP8, round_float_
from quantkit.types import ActivationSpec

Method = Literal["minmax", "percentile", "entropy", "mse"]

BINS = 1 << 14
CHUNK = 1 << 20  # numbers binned, or cells of candidates x bins computed, at a time
LEAST_EXPONENT = -100  # of the limit: the reciprocal of a bin's width stays a float32
OCTAVES, STEPS = 7, 16  # mse tries ranges down to the 2^-7th, a sixteenth of an octave apart
ENTROPY_CANDIDATES, LEAST_COUNT, LEAST_BINS = 128, 64, 1024  # windows tried; numbers in a bin on average; bins


class Histogram:
    """Counts of the numbers added, exact least and largest of them, and how many were zero.

    counts_B  int64 [B]; bin i holds -limit + i * width <= x < -limit + (i + 1) * width, width = 2 * limit / B
    limit     a power of two, 0.0 while nothing but zeros was seen
    """

    def __init__(self, bins: int = BINS) -> None:
        assert bins % 4 == 0, "pairs of bins merge on either side of zero"
        self.counts_B = torch.zeros(bins, dtype=torch.int64)
        self.limit, self.zeros = 0.0, 0
        self.low, self.high = math.inf, -math.inf

    @property
    def total(self) -> int:
        return int(self.counts_B.sum())

    @property
    def width(self) -> float:
        return 2 * self.limit / len(self.counts_B)

    @property
    def amax(self) -> float:
        return max(-self.low, self.high)

    def add(self, x: Tensor) -> None:
        """Count all of x (any shape and float dtype, any device); RunError where it holds NaN or Inf."""
        if not x.numel():
            return
        low, high = (end.item() for end in x.detach().aminmax())
        if not math.isfinite(high - low):
            raise RunError("an input holds NaN or Inf: the model overflowed on the calibration text")
        self._grow(max(-low, high))
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.zeros += x.numel() - int(x.count_nonzero())
        bins = len(self.counts_B)
        counts_B = torch.zeros(bins, dtype=torch.int64, device=x.device)
        for part in x.detach().reshape(-1).split(CHUNK):
            steps = part.to(torch.float32, copy=True)
            if self.limit:
                steps.mul_(1 / self.width).floor_()  # width is a power of two: the product is exact
            counts_B += torch.bincount(steps.add_(bins // 2).int(), minlength=bins)
        self.counts_B += counts_B.to(self.counts_B.device)

    def merge(self, other: "Histogram") -> None:
        """Count all that `other` (of as many bins) counted; it stays as it is."""
        assert len(self.counts_B) == len(other.counts_B)
        self._grow(other.limit / 2)  # the least limit above that is other's
        times = round(math.log2(self.limit / other.limit)) if other.limit else 0
        self.counts_B += _halved(other.counts_B, times)
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.zeros += other.zeros

    def _grow(self, amax: float) -> None:
        """The least limit above amax, unless it is there already."""
        if amax == 0 or amax < self.limit:
            return
        limit = 2.0 ** max(math.frexp(amax)[1], LEAST_EXPONENT)
        if self.limit:
            self.counts_B = _halved(self.counts_B, round(math.log2(limit / self.limit)))
        self.limit = limit


def _halved(counts_B: Tensor, times: int) -> Tensor:
    """The counts over a range 2**times as large: pairs merge, and the new outer halves are empty."""
    bins = len(counts_B)
    for _ in range(times):
        wider_B = torch.zeros_like(counts_B)
        wider_B[bins // 4 : -bins // 4] = counts_B.reshape(-1, 2).sum(1)
        counts_B = wider_B
    return counts_B


def choose_range(
    histogram: Histogram, spec: ActivationSpec, method: Method = "minmax", percentile: float = 99.99
) -> tuple[float, float]:
    """The range (low, high) that inputs are clipped to, for `static_range`; within what was seen.

    "e4m3" activations get what was seen whatever the method: their groups have ranges of their own, and a smaller
    global scale only bounds those. RunError where nothing was counted.
    """
    if not histogram.total:
        raise RunError("no input was seen during calibration")
    low, high = histogram.low, histogram.high
    if method == "minmax" or spec.scale_format == "e4m3" or not histogram.limit:
        return low, high
    if method == "percentile":
        wanted = _percentile(histogram, percentile / 100, by_magnitude=spec.symmetric)
    elif method == "mse":
        wanted = _least_error(histogram, spec)
    else:
        wanted = _least_divergence(histogram, spec)
    return max(low, wanted[0]), min(high, wanted[1])


def _percentile(histogram: Histogram, share: float, *, by_magnitude: bool) -> tuple[float, float]:
    """Interpolated within a bin."""
    counts_B, half = histogram.counts_B, len(histogram.counts_B) // 2

    def quantile(counts: Tensor, share: float) -> float:
        """Where that share of the counts is reached, in bins."""
        reached = counts.cumsum(0).double()
        target = share * reached[-1].item()
        i = min(int(torch.searchsorted(reached, target)), len(counts) - 1)
        return i + 1 - (reached[i].item() - target) / max(counts[i].item(), 1)

    if by_magnitude:
        top = quantile(counts_B[half:] + counts_B[:half].flip(0), share) * histogram.width
        return -top, top
    cut = (1 - share) / 2
    low, high = -quantile(counts_B.flip(0), 1 - cut), quantile(counts_B, 1 - cut)
    return (low + half) * histogram.width, (high - half) * histogram.width


def _bins(histogram: Histogram) -> tuple[Tensor, Tensor]:
    """Centres and counts, float64, of the bins in use; exact zeros left out."""
    bins = len(histogram.counts_B)
    counts_B = histogram.counts_B.clone()
    counts_B[bins // 2] -= histogram.zeros
    used = counts_B.nonzero()[:, 0]
    return (used.double() + 0.5 - bins / 2) * histogram.width, counts_B[used].double()


def _scales(low_S: Tensor, high_S: Tensor, spec: ActivationSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point [S] of ranges; `static_range` for one. Symmetric integers: zero point 2^(bits - 1)."""
    if spec.element == "int" and not spec.symmetric:
        scale_S = (high_S - low_S) / (2**spec.bits - 1)
        return scale_S, (-low_S / scale_S).round()
    top = spec.top if spec.element == "float" else 2 ** (spec.bits - 1) - 1
    scale_S = torch.maximum(-low_S, high_S) / top
    return scale_S, torch.full_like(scale_S, 2.0 ** (spec.bits - 1))


def _rounded(steps: Tensor, zero: Tensor, spec: ActivationSpec) -> Tensor:
    """Steps on the grid, in place."""
    if spec.element == "float":
        return round_float_(steps, spec.bits)
    return steps.round_().add_(zero).clamp_(0, 2**spec.bits - 1).sub_(zero)


def _squared_error(histogram: Histogram, low_S: Tensor, high_S: Tensor, spec: ActivationSpec) -> Tensor:
    """Sum of squared rounding and clipping errors over the histogram, float64 [S]."""
    centre_B, count_B = _bins(histogram)
    scale_S, zero_S = _scales(low_S, high_S, spec)
    errors = []
    for part in torch.arange(len(scale_S)).split(max(1, CHUNK // max(1, len(centre_B)))):
        scale_S1, zero_S1 = scale_S[part, None], zero_S[part, None]
        error_SB = _rounded(centre_B / scale_S1, zero_S1, spec).mul_(scale_S1).sub_(centre_B)
        errors.append(error_SB.square_() @ count_B)
    return torch.cat(errors)


def _least_error(histogram: Histogram, spec: ActivationSpec) -> tuple[float, float]:
    """Both ends shrink together, then, where they are independent, each alone; then finer steps around each best."""
    least, most = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if spec.symmetric:
        least, most = -histogram.amax, histogram.amax
    coarse = [2.0 ** (-i / STEPS) for i in range(OCTAVES * STEPS + 1)]
    fine = [2.0 ** (i / (8 * STEPS)) for i in range(-8, 9)]

    def best(candidates: list[tuple[float, float]]) -> tuple[float, float]:
        """The first of those that lose least."""
        low_S, high_S = torch.tensor(candidates, dtype=torch.float64).unbind(1)
        return candidates[int(_squared_error(histogram, low_S, high_S, spec).argmin())]

    low, high = best([(least * f, most * f) for f in coarse])
    low, high = best([(low, high), *((max(least, low * f), min(most, high * f)) for f in fine)])
    if not spec.symmetric:
        for _ in range(2):
            low, high = best([(low, high), *((low, most * f) for f in coarse)])
            low, high = best([(low, high), *((low, min(most, high * f)) for f in fine)])
            low, high = best([(low, high), *((least * f, high) for f in coarse)])
            low, high = best([(low, high), *((max(least, low * f), high) for f in fine)])
    return low, high


def _least_divergence(histogram: Histogram, spec: ActivationSpec) -> tuple[float, float]:
    """Windows of whole bins around zero, from all that was seen down to as many bins as there are codes."""
    counts_B = histogram.counts_B.clone()
    counts_B[len(counts_B) // 2] -= histogram.zeros
    filled = 1 << (int(counts_B.sum()) // LEAST_COUNT | 1).bit_length() - 1  # the power of two below
    bins = min(len(counts_B), max(LEAST_BINS, filled))
    counts_B = counts_B.reshape(bins, -1).sum(1).double()
    width, half = 2 * histogram.limit / bins, bins // 2
    below = above = math.floor(histogram.amax / width) + 1  # bins on either side of zero
    if not spec.symmetric:
        below = max(0, math.ceil(-histogram.low / width))
        above = max(0, math.floor(histogram.high / width) + 1)
    least = min(1.0, 2**spec.bits / (below + above))
    shrink_S = least ** torch.linspace(0, 1, ENTROPY_CANDIDATES, dtype=torch.float64)
    first_S = half - (below * shrink_S).ceil().long()
    last_S = half - 1 + (above * shrink_S).ceil().long()
    parts = zip(first_S.split(CHUNK // bins), last_S.split(CHUNK // bins), strict=True)
    i = int(torch.cat([_divergence(counts_B, first_S, last_S, width, spec) for first_S, last_S in parts]).argmin())
    return (first_S[i].item() - half) * width, (last_S[i].item() + 1 - half) * width


def _divergence(counts_B: Tensor, first_S: Tensor, last_S: Tensor, width: float, spec: ActivationSpec) -> Tensor:
    """KL(P || Q) of clipping to the bins first .. last, float64 [S]."""
    bins = len(counts_B)
    bin_B = torch.arange(bins)
    inside_SB = (bin_B >= first_S[:, None]) & (bin_B <= last_S[:, None])
    kept_SB = counts_B * inside_SB
    p_SB = kept_SB.clone()
    before_S = (counts_B * (bin_B < first_S[:, None])).sum(1, keepdim=True)
    after_S = (counts_B * (bin_B > last_S[:, None])).sum(1, keepdim=True)
    p_SB.scatter_add_(1, first_S[:, None], before_S).scatter_add_(1, last_S[:, None], after_S)

    scale_S, zero_S = _scales((first_S - bins / 2) * width, (last_S + 1 - bins / 2) * width, spec)
    step_SB = _rounded((bin_B + 0.5 - bins / 2) * width / scale_S[:, None], zero_S[:, None], spec)
    if spec.element == "float":
        code_SB = step_SB.to(FP8).view(torch.uint8).long()
    else:
        code_SB = (step_SB + zero_S[:, None]).long()
    used_SB = (p_SB > 0).double()
    share_SL, spread_SL = (
        torch.zeros(len(first_S), 256, dtype=torch.float64).scatter_add_(1, code_SB, t) for t in (kept_SB, used_SB)
    )
    q_SB = (share_SL / spread_SL.clamp(min=1)).gather(1, code_SB)
    q_SB = torch.where(q_SB > 0, q_SB, 0.5) * used_SB
    p_SB, q_SB = p_SB / p_SB.sum(1, keepdim=True), q_SB / q_SB.sum(1, keepdim=True)
    return torch.where(p_SB > 0, p_SB * (p_SB / q_SB).log(), 0).sum(1)
