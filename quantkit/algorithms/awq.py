"""AWQ (arXiv:2306.00978): scale input channels so that those which matter round better.

A layer's inputs x can be divided by s and its weight's columns multiplied by it: the same function, but the grid sees
W s. Rounding noise of a group is proportional to its largest |w s|, and column k of it reaches the output as
noise * x_k / s_k: channels with large inputs gain from s > 1 as long as they do not widen the group's range too much.
The search minimises the error of the layer's output on the calibration inputs, or whatever loss it is given,

    tr(E H E^T),   E = Q(W s) / s - W,   H = X^T X.

The paper's second half, clipping, is `search_clip` on W s. Weights stay in float32 (or wider) between a scale and
the grid.

Shapes: N = out features, K = in features, C = channels of the producer (K, or fewer where input columns share one, as
the kv heads of grouped attention do), S = candidates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import RunError, UserError
from quantkit.grids import Grid

CHUNK = 1 << 22  # elements of candidate weights held at a time
PROBE_ROWS = 512  # rows of each weight that screen the candidates: all of them would cost N K^2 for each candidate
FLOOR = 1e-4  # of the mean magnitude: smaller channels are scaled as if they had this one


@dataclass(frozen=True, slots=True)
class AwqResult:
    """What the search chose. scale_C (float32 [C]) is all ones where nothing beat the identity.

    exponents  (a, b) of s = x^a / w^b before it was normalised; (0, 0) is the identity
    Both losses come from the same measure (see `search_scale`): loss_best <= loss_identity always.
    """

    scale_C: Tensor
    exponents: tuple[float, float]
    loss_identity: float
    loss_best: float


def search_scale(
    weights: Sequence[Tensor],
    hessian_KK: Tensor,
    magnitude_K: Tensor,
    grid: Grid,
    *,
    columns_K: Tensor | None = None,
    candidates: int = 20,
    finalists: int = 4,
    loss: Callable[[list[Tensor]], float] | None = None,
    snap: Callable[[Tensor], Tensor] | None = None,
) -> AwqResult:
    """The scale of the producer's channels with which the weights [N_i, K] that read it quantize best.

    hessian_KK   X^T X of the input, before any scale; any positive factor is fine
    magnitude_K  mean |x| of each input column
    columns_K    int64 [K]: the producer channel each input column reads (values repeated for grouped attention);
                 None: column k reads channel k. Statistics are averaged over the columns that share a channel
    loss         loss(weights) of weights put in the originals' place, in the same order and shapes, e.g. the error of
                 the decoder block's output. It decides between the `finalists` best candidates by the Hessian and the
                 identity. None: the Hessian decides, on all rows
    snap         maps a scale [C] to the nearest one the producer can store (see `storable`): what is measured is then
                 what will be written
    grid         one without a range search: searching each candidate's ranges costs far more and chose no better

    RunError where a statistic or a weight holds NaN or Inf.
    """
    _check(weights, hessian_KK, magnitude_K)
    device = hessian_KK.device
    columns_K = torch.arange(len(hessian_KK), device=device) if columns_K is None else columns_K.to(device)
    scale_SC, exponents = _candidates(weights, magnitude_K, columns_K, candidates)
    if snap is not None:
        scale_SC = torch.stack([snap(scale_C) for scale_C in scale_SC])
    scale_SC[0] = 1
    scale_SK = scale_SC[:, columns_K]

    whole = all(len(w_NK) <= PROBE_ROWS for w_NK in weights)
    losses = _hessian_losses(weights, hessian_KK, scale_SK, grid, None if whole else PROBE_ROWS)
    chosen = list(range(len(scale_SC)))
    if loss is not None or not whole:
        ranked = torch.argsort(losses, stable=True).tolist()
        chosen = [0, *[i for i in ranked if i][:finalists]]
        if loss is None:
            losses = _hessian_losses(weights, hessian_KK, scale_SK[chosen], grid, None)
        else:
            tried = ([_round_scaled(w_NK, scale_SK[i : i + 1], grid)[:, 0] for w_NK in weights] for i in chosen)
            losses = torch.tensor([loss(candidate) for candidate in tried], dtype=torch.float64)
    # argmin would choose a loss of NaN; ties go to the first, and the identity comes first
    best = int(losses.nan_to_num(nan=torch.inf).argmin())
    return AwqResult(scale_SC[chosen[best]], exponents[chosen[best]], losses[0].item(), losses[best].item())


def working_sizes() -> list[int]:
    """Bytes of the tensors the search holds at its worst: candidates of a chunk, their errors and products."""
    return [4 * CHUNK] * 3


def storable(scale_C: Tensor, producer_C: Tensor, dtype: torch.dtype, *, offset: float = 0.0) -> Tensor:
    """The scale that a norm's weight can be divided by without rounding: near scale_C, float32, positive.

    producer_C is the weight as stored, `dtype` what it will be stored in, offset 1 for norms that multiply by 1 + w.
    Dividing by a wanted s and rounding to bf16 changes the function by up to 0.4 %; multiplying the readers' columns by
    what the rounded weight was really divided by does not. Channels that cannot be scaled (weight 0) keep scale 1.
    """
    whole_C = producer_C.double() + offset
    stored_C = (whole_C / scale_C.double() - offset).to(dtype).double() + offset
    exact_C = (whole_C / stored_C).float()
    return torch.where(torch.isfinite(exact_C) & (exact_C > 0), exact_C, torch.ones_like(exact_C))


def _candidates(
    weights: Sequence[Tensor], magnitude_K: Tensor, columns_K: Tensor, count: int
) -> tuple[Tensor, list[tuple[float, float]]]:
    """Scales [S, C] and their exponents; the identity first, then x^a, then x^a / w^(1-a) (AutoAWQ's duo scaling)."""
    C = int(columns_K.max()) + 1
    shared_C = torch.bincount(columns_K, minlength=C).clamp(min=1)

    def per_channel(value_K: Tensor) -> Tensor:
        value_K = value_K.to(columns_K.device, torch.float32)
        return torch.zeros(C, device=columns_K.device).index_add_(0, columns_K, value_K) / shared_C

    x_C = per_channel(magnitude_K)
    if count < 1 or not x_C.any():
        return torch.ones(1, C, device=x_C.device), [(0.0, 0.0)]
    size_K = torch.zeros_like(magnitude_K, dtype=torch.float32)
    for w_NK in weights:  # relative to the row's largest, so that every row counts alike
        w_NK = w_NK.float().abs()
        size_K += (w_NK / w_NK.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)).sum(0)
    dead_C, w_C = x_C == 0, per_channel(size_K)
    x_C = x_C.clamp(min=FLOOR * x_C.mean())
    w_C = w_C.clamp(min=FLOOR * w_C.mean()) if w_C.any() else torch.ones_like(w_C)
    half = (count + 1) // 2
    exponents = [(i / half, 0.0) for i in range(1, half + 1)]
    exponents += [(i / (count - half), 1 - i / (count - half)) for i in range(count - half)]
    scales = [torch.ones_like(x_C)]
    for a, b in exponents:
        s_C = x_C**a / w_C**b
        live_C = s_C[~dead_C]
        scales.append(torch.where(dead_C, 1.0, s_C / (live_C.amax() * live_C.amin()).sqrt()))
    return torch.stack(scales), [(0.0, 0.0), *exponents]


def _hessian_losses(
    weights: Sequence[Tensor], hessian_KK: Tensor, scale_SK: Tensor, grid: Grid, rows: int | None
) -> Tensor:
    """tr(E H E^T) over all weights, float64 [S]; estimated from about `rows` evenly spaced rows of each weight."""
    losses_S = torch.zeros(len(scale_SK), dtype=torch.float64, device=hessian_KK.device)
    for w_NK in weights:
        N, K = w_NK.shape
        every = 1 if rows is None else -(-N // rows)
        w_PK = w_NK[::every]
        step = max(1, CHUNK // w_PK.numel())
        for start in range(0, len(scale_SK), step):
            part_SK = scale_SK[start : start + step]
            error_RK = (_round_scaled(w_PK, part_SK, grid) - _wide(w_PK)[:, None]).reshape(-1, K)
            loss_R = ((error_RK @ hessian_KK.to(error_RK.dtype)) * error_RK).sum(1, dtype=torch.float64)
            losses_S[start : start + step] += loss_R.reshape(-1, len(part_SK)).sum(0) * (N / len(w_PK))
    return losses_S


def _round_scaled(w_NK: Tensor, scale_SK: Tensor, grid: Grid) -> Tensor:
    """Q(W s) / s of every candidate, [N, S, K], each with parameters of its own."""
    w_NK, rounded = _wide(w_NK), []
    for scale_K in scale_SK.to(w_NK.device):
        scaled_NK = w_NK * scale_K
        own = grid.for_tensors([scaled_NK])
        fitted = own.fit(scaled_NK)
        rounded.append(own.decode(own.encode(scaled_NK, fitted), fitted).to(w_NK.dtype).div_(scale_K))
    return torch.stack(rounded, 1)


def _wide(w: Tensor) -> Tensor:
    return w.to(torch.promote_types(w.dtype, torch.float32))


def _check(weights: Sequence[Tensor], hessian_KK: Tensor, magnitude_K: Tensor) -> None:
    K = len(magnitude_K)
    if hessian_KK.shape != (K, K) or not weights or any(w_NK.shape[1:] != (K,) for w_NK in weights):
        shapes = [tuple(w_NK.shape) for w_NK in weights]
        raise UserError(f"awq: weights {shapes}, Hessian {tuple(hessian_KK.shape)} and {K} magnitudes do not fit")
    for name, t in (("Hessian", hessian_KK), ("mean magnitude of the input", magnitude_K)):
        if not torch.isfinite(t.sum()):
            raise RunError(f"awq: the {name} holds NaN or Inf: the inputs overflowed during calibration")
    if any(not torch.isfinite(w_NK.sum(dtype=torch.float32)) for w_NK in weights):
        raise RunError("awq: a weight holds NaN or Inf")
