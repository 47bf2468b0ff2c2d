"""Confidence intervals by resampling windows: tokens of one window depend on each other, windows hardly do.

Shapes: W = windows, P = tokens of a window, S = resamples, N = W * P tokens.
"""

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import RunError
from quantkit_eval.results import Interval

RESAMPLES = 1000
LEVEL = 0.95
CELLS = 1 << 24  # entries of one resampling matrix at a time


def draw(windows: int, seed: int = 0, resamples: int = RESAMPLES) -> NDArray[np.int32]:
    """int32 [S, W]: how often each window is drawn in each resample; every row sums to W."""
    generator = np.random.default_rng(seed)
    rows = max(1, CELLS // windows)
    parts = [
        generator.multinomial(windows, np.full(windows, 1 / windows), size=min(rows, resamples - start))
        for start in range(0, resamples, rows)
    ]
    return np.concatenate(parts).astype(np.int32)


def mean(values_W: NDArray[np.float64], counts_SW: NDArray[np.int32]) -> Interval:
    """The mean over windows of equal size; values_W holds each window's mean."""
    return _interval(float(values_W.mean()), counts_SW @ values_W / len(values_W))


def ratio(over_W: NDArray[np.float64], under_W: NDArray[np.float64], counts_SW: NDArray[np.int32]) -> Interval:
    """The sum of one count divided by that of another; both hold each window's."""
    return _interval(float(over_W.sum() / under_W.sum()), (counts_SW @ over_W) / (counts_SW @ under_W))


def quantile(values_WP: NDArray[np.float64], counts_SW: NDArray[np.int32], q: float) -> Interval:
    """The smallest value that at least a share q of the tokens does not exceed (numpy's "inverted_cdf").

    A resample's quantile is found from the top: walk down the sorted values, each counted as often as its window was
    drawn, until more than (1 - q) N tokens were passed. Only the top of the list is ever looked at.
    """
    W, P = values_WP.shape
    N = W * P
    order_N = np.argsort(values_WP, axis=None, kind="stable")[::-1]
    sorted_N, window_N = values_WP.ravel()[order_N], order_N // P
    passed = N - np.ceil(q * N - 1e-9)  # so many tokens may lie above
    value = float(sorted_N[int(passed)])
    estimates = []
    for counts in np.array_split(counts_SW, max(1, len(counts_SW) * N // (8 * CELLS))):
        length = max(1, N // 20)
        while (seen := np.cumsum(counts[:, window_N[:length]], axis=1, dtype=np.int64))[:, -1].min() <= passed:
            length = min(2 * length, N)  # a resample that missed the windows with the large values
        estimates.append(sorted_N[(seen > passed).argmax(1)])
    return _interval(value, np.concatenate(estimates))


def _interval(value: float, estimates_S: NDArray[np.float64]) -> Interval:
    if not (np.isfinite(value) and np.isfinite(estimates_S).all()):
        raise RunError("a score is not finite: the model gave NaN or Inf")
    low, high = np.quantile(estimates_S, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))
