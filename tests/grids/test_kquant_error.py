"""How much error the search of block scales leaves: less than ggml's own, near the least there is."""

import numpy as np
import pytest
import torch
from torch import Tensor

from quantkit.ggml_types import QUANTIZED
from quantkit.grids.block_types import BLOCK_TYPES, IQ4_LEVELS
from quantkit.grids.kquants import BlockGrid
from quantkit.types import block_spec

# errors of ggml_quantize_chunk on `sample`, without an importance and with one (llama.cpp of October 2026), made by
# `python -m tests.interop.test_gguf_grids`
GGML = {
    "gaussian Q4_0": (0.0017258, 0.0015435),
    "gaussian Q4_1": (0.0015612, 0.0012503),
    "gaussian Q5_0": (0.00085497, 0.00076211),
    "gaussian Q5_1": (0.00076091, 0.00060666),
    "gaussian Q8_0": (0.00010726, 0.00010685),
    "gaussian Q2_K": (0.0059134, 0.0045958),
    "gaussian Q3_K": (0.003035, 0.0026627),
    "gaussian Q4_K": (0.0014246, 0.0012712),
    "gaussian Q5_K": (0.0007265, 0.00065045),
    "gaussian Q6_K": (0.00035528, 0.00032116),
    "gaussian IQ4_NL": (0.0015263, 0.0013871),
    "gaussian IQ4_XS": (0.0015371, 0.0014028),
    "heavy Q4_0": (0.0043242, 0.0040796),
    "heavy Q4_1": (0.0033768, 0.0027572),
    "heavy Q5_0": (0.0021962, 0.0020774),
    "heavy Q5_1": (0.0016442, 0.001353),
    "heavy Q8_0": (0.0002805, 0.00028289),
    "heavy Q2_K": (0.011931, 0.0091599),
    "heavy Q3_K": (0.0065649, 0.0060128),
    "heavy Q4_K": (0.0031243, 0.0028285),
    "heavy Q5_K": (0.0015882, 0.001479),
    "heavy Q6_K": (0.00085956, 0.00081425),
    "heavy IQ4_NL": (0.0033908, 0.0031484),
    "heavy IQ4_XS": (0.0034255, 0.0032061),
}


def sample(kind: str) -> np.ndarray:
    """float32 [64, 512] of numpy's own stream, the same everywhere."""
    random = np.random.default_rng(0)
    w_NK = random.normal(size=(64, 512)) if kind == "gaussian" else random.standard_t(3, size=(64, 512))
    return (w_NK * 0.02).astype(np.float32)


def ours(name: str, w_NK: np.ndarray, importance_K: np.ndarray | None) -> np.ndarray:
    """A weight rounded to the nearest on the scales that are found."""
    grid, w = BlockGrid(block_spec(name)), torch.from_numpy(w_NK)
    parameters = grid.fit(w, None if importance_K is None else torch.from_numpy(importance_K))
    return grid.decode(grid.encode(w, parameters), parameters).numpy()


def error(found_NK: np.ndarray, w_NK: np.ndarray, weights: np.ndarray | None) -> float:
    """The root of the (weighted) mean squared error, in float64."""
    square_NK = (found_NK.astype(np.float64) - w_NK) ** 2
    return float(
        np.sqrt(np.average(square_NK, weights=None if weights is None else np.broadcast_to(weights, w_NK.shape)))
    )


@pytest.mark.parametrize("kind", ["gaussian", "heavy"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_no_more_error_than_ggml_had(name: str, kind: str) -> None:
    w_NK = sample(kind)
    importance_K = np.exp(np.random.default_rng(5).normal(size=512) * 1.2)
    for e_K, theirs in zip((None, importance_K), GGML[f"{kind} {name}"], strict=True):
        assert error(ours(name, w_NK, e_K), w_NK, e_K) <= theirs * (1 + 1e-4)  # they have five digits


def levels_of(name: str) -> Tensor:
    type_ = BLOCK_TYPES[name]
    return torch.tensor(IQ4_LEVELS).double() if type_.codebook else torch.arange(type_.top + 1).double() - type_.zero


def least_errors(name: str, w_MSg: Tensor) -> Tensor:
    """The least squared error of each sub-block [M, S] over hundreds of ranges, each with its best scale and offset.

    Scales and offsets are any numbers: what whole blocks can reach is a little more.
    """
    levels, offset = levels_of(name), BLOCK_TYPES[name].sub_offset > 0
    limits = (levels[1:] + levels[:-1]) / 2
    low, high = w_MSg.amin(2, keepdim=True), w_MSg.amax(2, keepdim=True)
    extreme = torch.maximum(high, -low)
    least_MS = torch.full(w_MSg.shape[:2], torch.inf, dtype=torch.float64)
    spans = torch.linspace(0.55, 1.25, 141).tolist()
    if offset:
        pairs = [
            (span * (high - low) / levels[-1], low + shift * (high - low))
            for span in spans[::4]
            for shift in torch.linspace(-0.15, 0.25, 21).tolist()
        ]
    else:
        pairs = [(sign * span * extreme / levels[0].abs(), 0 * low) for span in spans for sign in (1, -1)]
    for scale, start in pairs:
        q = levels[torch.bucketize((w_MSg - start) / scale, limits)]
        w_mean, q_mean = (t.mean(2, keepdim=True) * offset for t in (w_MSg, q))
        best = ((w_MSg - w_mean) * (q - q_mean)).sum(2) / (q - q_mean).square().sum(2).clamp(min=1e-12)
        found = (w_MSg - w_mean - best[..., None] * (q - q_mean)).square().sum(2)
        least_MS = torch.minimum(least_MS, found)
    return least_MS


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("IQ4_NL", 1.006),
        ("Q2_K", 1.078),
        ("Q3_K", 1.0075),
        ("Q4_K", 1.0465),
        ("Q5_K", 1.0605),
        ("Q6_K", 1.0465),
        ("IQ4_XS", 1.0195),
    ],
)
def test_near_the_least_error(name: str, more: float) -> None:
    """Without an importance, over brute force in float64 on every sub-block alone."""
    w_NK = sample("gaussian")[:16]
    found = float(np.square(ours(name, w_NK, None).astype(np.float64) - w_NK).sum())
    least = float(least_errors(name, torch.from_numpy(w_NK).double().reshape(16, -1, BLOCK_TYPES[name].span)).sum())
    assert found < more * least, found / least
