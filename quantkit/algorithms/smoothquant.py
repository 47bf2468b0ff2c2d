"""SmoothQuant (arXiv:2211.10438): move the outliers of a linear's input into its weight, which has a scale per row.

(x / s) (W s)^T is x W^T for any s > 0, the division folded into whatever produces x. Rounding x with one scale for a
token or a tensor costs every channel the resolution that the largest one takes; s evens the channels out,

    s_c = amax|x_c|^alpha / amax|w_c|^(1 - alpha),

at alpha = 0.5 until input and weight are equally hard to round; larger alphas leave more to the weight.

Shapes: N = out features, K = in features, C = channels of the producer (K, or fewer where input columns share one, as
the kv heads of grouped attention do).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import RunError, UserError

ALPHAS = tuple(i / 20 for i in range(20))  # 0 stands for the identity
FLOOR = 1e-5  # of the largest: smaller channels are scaled as if they had this magnitude


@dataclass(frozen=True, slots=True)
class SmoothResult:
    """What the search chose: scale_C (float32 [C]) is all ones and alpha 0 where nothing beat the identity."""

    scale_C: Tensor
    alpha: float
    loss_identity: float
    loss_best: float


def smooth_scale(amax_x_K: Tensor, weights: Sequence[Tensor], alpha: float, columns_K: Tensor | None = None) -> Tensor:
    """The scale (float32 [C], positive) of the producer's channels; their geometric mean is 1.

    amax_x_K   max |x| of each input column over the calibration tokens
    weights    all that read the input, each [N_i, K]
    columns_K  int64 [K]: the producer channel each input column reads; None: column k reads channel k. A channel has
               the largest magnitude of the columns that share it

    Channels without any input keep the scale 1. The mean is arbitrary as far as rounding goes: 1 leaves the bulk of the
    channels, and so the producer's weights, near what they were. RunError where a magnitude or a weight is NaN or Inf.
    """
    _check(amax_x_K, weights)
    device = amax_x_K.device
    columns_K = torch.arange(len(amax_x_K), device=device) if columns_K is None else columns_K.to(device)
    C = int(columns_K.max()) + 1

    def largest(value_K: Tensor) -> Tensor:
        return torch.zeros(C, dtype=torch.float64, device=device).scatter_reduce_(
            0, columns_K, value_K.double(), "amax"
        )

    x_C = largest(amax_x_K)
    w_C = largest(torch.stack([w_NK.abs().amax(0).to(device, torch.float64) for w_NK in weights]).amax(0))
    live_C = x_C > 0
    if not live_C.any() or not w_C.any():
        return torch.ones(C, device=device)
    log_x_C, log_w_C = (value_C.clamp(min=FLOOR * value_C.amax().item()).log() for value_C in (x_C, w_C))
    log_s_C = alpha * log_x_C - (1 - alpha) * log_w_C
    return torch.where(live_C, (log_s_C - log_s_C[live_C].mean()).exp(), 1.0).float()


def search_alpha(
    amax_x_K: Tensor,
    weights: Sequence[Tensor],
    loss: Callable[[Tensor | None], float],
    *,
    columns_K: Tensor | None = None,
    alphas: Sequence[float] = ALPHAS,
    snap: Callable[[Tensor], Tensor] | None = None,
) -> SmoothResult:
    """The alpha with the least loss; the identity is tried first and wins ties, and no NaN ever wins.

    loss  loss(scale_C) of the scale folded into producer and readers, e.g. the error of the decoder block's output with
          all of it rounded; loss(None): of nothing folded
    snap  maps a scale [C] to the nearest one the producer can store (see `awq.storable`): what is measured is then what
          will be written

    The other arguments are those of `smooth_scale`.
    """
    identity = torch.ones_like(smooth_scale(amax_x_K, weights, 0.5, columns_K))
    best_C, best_alpha = identity, 0.0
    loss_identity = best = loss(None)
    for alpha in alphas:
        if alpha == 0:
            continue
        scale_C = smooth_scale(amax_x_K, weights, alpha, columns_K)
        scale_C = scale_C if snap is None else snap(scale_C)
        tried = loss(scale_C)
        if tried < best or (best != best and tried == tried):
            best_C, best_alpha, best = scale_C, alpha, tried
    return SmoothResult(best_C, best_alpha, loss_identity, best)


def _check(amax_x_K: Tensor, weights: Sequence[Tensor]) -> None:
    if not weights or amax_x_K.dim() != 1 or any(w_NK.shape[1:] != amax_x_K.shape for w_NK in weights):
        shapes = [tuple(w_NK.shape) for w_NK in weights]
        raise UserError(f"smoothquant: weights {shapes} and {tuple(amax_x_K.shape)} input magnitudes do not fit")
    if not torch.isfinite(amax_x_K.sum(dtype=torch.float64)):
        raise RunError("smoothquant: an input magnitude is NaN or Inf: the inputs overflowed during calibration")
    if any(not torch.isfinite(w_NK.sum(dtype=torch.float32)) for w_NK in weights):
        raise RunError("smoothquant: a weight holds NaN or Inf")
