"""How far the largest values of a weight and of its inputs stand out: what makes a linear hard to quantize."""

import math

import torch
from torch import Tensor


def weight_peak(w_NK: Tensor) -> float:
    """The largest |w| over the root mean square of all; 0 for a weight of zeros. Any float dtype, nothing is copied."""
    least, most = torch.aminmax(w_NK := w_NK.detach())
    largest = max(-float(least), float(most))
    square_mean = float(torch.linalg.vector_norm(w_NK, dtype=torch.float32)) / math.sqrt(w_NK.numel())
    return largest / square_mean if square_mean else 0.0


def input_peak(mean_square_K: Tensor) -> float | None:
    """The largest channel over the median one, each by its root mean square; None where the median channel is zero.

    mean_square_K  E[x^2] of each channel, float32
    """
    median = float(mean_square_K.median())
    return math.sqrt(float(mean_square_K.max()) / median) if median > 0 else None
