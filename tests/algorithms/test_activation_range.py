"""Histograms and the ranges chosen from them, against brute force on the raw numbers."""

import math
import random
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.algorithms import activation_range as observers
from quantkit.algorithms.activation_range import Histogram, choose_range
from quantkit.errors import RunError
from quantkit.grids.activations import fake_quantize, static_range
from quantkit.types import ActivationSpec

INT8 = ActivationSpec(8, dynamic=False)
INT8_ASYM = ActivationSpec(8, symmetric=False, dynamic=False)
INT4 = ActivationSpec(4, dynamic=False)
FP8 = ActivationSpec(8, element="float", dynamic=False)
NVFP4 = ActivationSpec(4, 16, element="float", scale_format="e4m3")


def histogram_of(*parts: Tensor, bins: int = observers.BINS) -> Histogram:
    histogram = Histogram(bins)
    for part in parts:
        histogram.add(part)
    return histogram


def same(a: Histogram, b: Histogram) -> bool:
    return torch.equal(a.counts_B, b.counts_B) and all(
        getattr(a, name) == getattr(b, name) for name in ("limit", "low", "high", "zeros", "total")
    )


def sample(kind: str, seed: int = 0) -> Tensor:
    """Numbers [65536] of the shapes that inputs of linears have."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1 << 16, generator=generator)
    if kind == "outliers":
        x[::4096] *= 60
    elif kind == "heavy":
        x *= torch.randn(1 << 16, generator=generator).exp()
    elif kind == "silu":
        x = torch.nn.functional.silu(2 * x)
    elif kind == "relu":
        x = x.relu()
    elif kind == "negative":
        x = -x.square() - 0.5
    return x


KINDS = ["normal", "outliers", "heavy", "silu", "relu", "negative"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_counts_are_exact(dtype: torch.dtype) -> None:
    x = sample("heavy").to(dtype)
    histogram = histogram_of(x.reshape(64, -1), bins=256)
    assert histogram.limit / 2 <= x.abs().max() < histogram.limit
    edges = torch.arange(257, dtype=torch.float64) * histogram.width - histogram.limit
    expected_B = torch.bincount(torch.bucketize(x.double(), edges, right=True) - 1, minlength=256)
    assert torch.equal(histogram.counts_B, expected_B)
    assert (histogram.low, histogram.high) == (x.min().item(), x.max().item())
    assert histogram.total == x.numel()
    assert histogram.zeros == (x == 0).sum()


NUMBERS = st.floats(-(2.0**40), 2.0**40, width=32).map(lambda x: x if abs(x) > 2.0**-40 else 0.0)


@given(
    batches=st.lists(st.lists(NUMBERS, max_size=6), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
@settings(max_examples=200, deadline=None)
def test_order_and_merging_change_nothing(batches: list[list[float]], seed: int) -> None:
    parts = [torch.tensor(batch, dtype=torch.float32) for batch in batches]
    at_once = histogram_of(torch.cat(parts), bins=64)
    random.Random(seed).shuffle(parts)
    assert same(histogram_of(*parts, bins=64), at_once)
    merged, other = histogram_of(*parts[::2], bins=64), histogram_of(*parts[1::2], bins=64)
    merged.merge(other)
    assert same(merged, at_once)
    assert at_once.total == sum(map(len, batches))


def test_doubling_by_hand() -> None:
    histogram = histogram_of(torch.tensor([-0.9, -0.3, 0.0, 0.3, 0.6]), bins=4)
    assert (histogram.limit, histogram.counts_B.tolist()) == (1.0, [1, 1, 2, 1])
    histogram.add(torch.tensor([1.0]))  # 1.0 is not below the limit of 1
    assert (histogram.limit, histogram.counts_B.tolist()) == (2.0, [0, 2, 3, 1])
    assert (histogram.zeros, histogram.low, histogram.high) == (1, pytest.approx(-0.9), 1.0)


def test_nothing_seen_zeros_and_overflow() -> None:
    with pytest.raises(RunError, match="no input was seen"):
        choose_range(histogram_of(torch.empty(0, 5)), INT8)
    dead = histogram_of(torch.zeros(3, 4))
    for method in ("minmax", "percentile", "mse", "entropy"):
        assert choose_range(dead, INT8, method) == (0, 0)
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(RunError, match="NaN or Inf"):
            histogram_of(torch.tensor([1.0, bad, 2.0]))


@pytest.mark.parametrize("kind", KINDS)
def test_minmax(kind: str) -> None:
    x = sample(kind)
    for spec in (INT8, INT8_ASYM, FP8, NVFP4):
        assert choose_range(histogram_of(x), spec) == (x.min().item(), x.max().item())
    for method in ("percentile", "mse", "entropy"):
        assert choose_range(histogram_of(x), NVFP4, method) == (x.min().item(), x.max().item())


@pytest.mark.parametrize("percentile", [90.0, 99.9, 99.99, 100.0])
@pytest.mark.parametrize("kind", KINDS)
def test_percentile(kind: str, percentile: float) -> None:
    x = sample(kind)
    histogram = histogram_of(x)
    low, high = choose_range(histogram, INT8, "percentile", percentile)
    kept = (x.abs() <= max(-low, high) + histogram.width).double().mean()
    assert kept >= percentile / 100
    assert (x.abs() < max(-low, high) - histogram.width).double().mean() <= percentile / 100
    low, high = choose_range(histogram, INT8_ASYM, "percentile", percentile)
    cut = (1 - percentile / 100) / 2
    for outside, within in (
        (x < low - histogram.width, x <= low + histogram.width),
        (x > high + histogram.width, x >= high - histogram.width),
    ):
        assert outside.double().mean() <= cut <= within.double().mean()
    assert x.min() <= low <= high <= x.max()


def squared_error(x: Tensor, low: float, high: float, spec: ActivationSpec) -> float:
    return (fake_quantize(x, spec, static_range(low, high, spec)).double() - x.double()).square().sum().item()


@pytest.mark.parametrize("spec", [INT8, INT4, FP8], ids=["int8", "int4", "fp8"])
@pytest.mark.parametrize("kind", KINDS)
def test_mse_reaches_brute_force(kind: str, spec: ActivationSpec) -> None:
    """300 linear and 100 logarithmic shrinks of the range, tried on the raw numbers."""
    x = sample(kind)
    low, high = choose_range(histogram_of(x), spec, "mse")
    amax = x.abs().max().item()
    shrinks = torch.cat([torch.linspace(1, 0.004, 300), torch.logspace(0, -2.1, 100)]).tolist()
    brute = min(squared_error(x, -amax * shrink, amax * shrink, spec) for shrink in shrinks)
    assert squared_error(x, low, high, spec) <= 1.01 * brute


@pytest.mark.parametrize("kind", KINDS)
def test_mse_of_asymmetric_ranges_reaches_brute_force(kind: str) -> None:
    """24 x 24 ranges, every fourth number."""
    x = sample(kind)[::4].contiguous()
    low, high = choose_range(histogram_of(x), INT8_ASYM, "mse")
    shrinks = torch.logspace(0, -2, 24).tolist()
    ends = [(min(x.min().item(), 0.0) * a, max(x.max().item(), 0.0) * b) for a in shrinks for b in shrinks]
    brute = min(squared_error(x, *range_, INT8_ASYM) for range_ in dict.fromkeys(ends))
    assert squared_error(x, low, high, INT8_ASYM) <= 1.02 * brute
    assert squared_error(x, low, high, INT8_ASYM) <= 1.001 * squared_error(x, x.min().item(), x.max().item(), INT8_ASYM)


def divergence(counts: list[int], first: int, last: int, width: float, spec: ActivationSpec) -> float:
    """KL(P || Q) of clipping to the bins first .. last, in loops; codes through the rounding of the engine itself."""
    bins = len(counts)
    static = static_range((first - bins / 2) * width, (last + 1 - bins / 2) * width, spec)
    kept = counts[first : last + 1]
    p = list(kept)
    p[0] += sum(counts[:first])
    p[-1] += sum(counts[last + 1 :])
    centres = torch.tensor([(i + 0.5 - bins / 2) * width for i in range(first, last + 1)], dtype=torch.float64)
    values = fake_quantize(centres, spec, static).tolist()
    by_value: dict[float, list[int]] = {}
    for i, value in enumerate(values):
        by_value.setdefault(value, []).append(i)
    q = [0.0] * len(p)
    for members in by_value.values():
        used = [i for i in members if p[i]]
        for i in used:
            q[i] = sum(kept[j] for j in members) / len(used)
    q = [0.5 if a and not b else b for a, b in zip(p, q, strict=True)]
    total_p, total_q = sum(p), sum(q)
    return sum(a / total_p * math.log((a / total_p) / (b / total_q)) for a, b in zip(p, q, strict=True) if a)


@pytest.mark.parametrize("spec", [INT8, INT8_ASYM, FP8], ids=["int8", "int8 asym", "fp8"])
@pytest.mark.parametrize("kind", ["outliers", "heavy", "silu"])
def test_divergences_equal_those_of_loops(kind: str, spec: ActivationSpec) -> None:
    histogram = histogram_of(sample(kind), bins=1024)
    first_S, last_S = torch.tensor([0, 100, 300, 350, 400]), torch.tensor([1023, 923, 723, 673, 623])
    if spec == INT8_ASYM:
        last_S = torch.tensor([1023, 980, 900, 990, 1000])
    ours_S = observers._divergence(histogram.counts_B.double(), first_S, last_S, histogram.width, spec)
    for i, (first, last) in enumerate(zip(first_S.tolist(), last_S.tolist(), strict=True)):
        slow = divergence(histogram.counts_B.tolist(), first, last, histogram.width, spec)
        assert ours_S[i].item() == pytest.approx(slow, rel=2e-2, abs=1e-9)  # a centre on a tie may change sides


@pytest.mark.parametrize("kind", ["normal", "outliers", "heavy", "relu"])
def test_entropy_chooses_the_least(kind: str) -> None:
    """No window of whole bins does better in the loops, as far as these are tried."""
    x = sample(kind)
    x = x[x != 0]
    histogram = histogram_of(x, bins=1024)
    low, high = choose_range(histogram, INT8, "entropy")
    half = round(max(-low, high) / histogram.width + 0.499)
    counts = histogram.counts_B.tolist()

    def loops(half: int) -> float:
        return divergence(counts, 512 - half, 511 + half, histogram.width, INT8)

    widest = math.floor(histogram.amax / histogram.width) + 1
    assert loops(half) <= 1.03 * min(loops(n) for n in range(128, widest + 1, 7))


def test_entropy_clips_outliers() -> None:
    """One of 4096 numbers is sixty times too large: not worth the resolution of all others under KL."""
    x = torch.cat([sample("outliers", seed) for seed in range(16)])
    rest = x.abs() < 6
    entropy = choose_range(histogram_of(x), INT8, "entropy")
    assert max(-entropy[0], entropy[1]) < 0.3 * x.abs().max()
    clipped = fake_quantize(x, INT8, static_range(*entropy, INT8))
    whole = fake_quantize(x, INT8, static_range(x.min().item(), x.max().item(), INT8))
    assert (clipped - x)[rest].square().sum() < 0.1 * (whole - x)[rest].square().sum()


def test_exact_zeros_do_not_move_entropy_or_mse() -> None:
    x = sample("outliers")
    padded = torch.cat([x, torch.zeros(10 * len(x))])
    for method in ("entropy", "mse"):
        assert choose_range(histogram_of(padded), INT8, method) == choose_range(histogram_of(x), INT8, method)


def test_choices_are_fast() -> None:
    histogram = histogram_of(sample("heavy"))
    start = time.process_time()
    for method in ("percentile", "mse", "entropy"):
        choose_range(histogram, INT8, method)
    assert time.process_time() - start < 3
