"""SmoothQuant's scale against loops, its search, and what it is for: outliers under one scale for all inputs."""

import math

import pytest
import torch
from torch import Tensor

from quantkit.algorithms.awq import storable
from quantkit.algorithms.smoothquant import ALPHAS, search_alpha, smooth_scale
from quantkit.errors import RunError, UserError
from quantkit.grids.activations import fake_quantize, static_range
from quantkit.types import ActivationSpec

STATIC, ROWS = ActivationSpec(8, dynamic=False), ActivationSpec(8)
LOUD = {7: 30.0, 50: 60.0, 99: 100.0, 200: 45.0}


def layer(loud: dict[int, float], M: int = 512, N: int = 96, K: int = 256) -> tuple[Tensor, list[Tensor]]:
    """Inputs [M, K] and the two weights [N, K] reading them; the columns of loud channels are as much smaller."""
    generator = torch.Generator().manual_seed(0)
    x_MK = torch.randn(M, K, generator=generator) * torch.rand(K, generator=generator).add(0.5)
    weights = [torch.randn(N, K, generator=generator) * K**-0.5 for _ in range(2)]
    for channel, factor in loud.items():
        x_MK[:, channel] *= factor
        for w_NK in weights:
            w_NK[:, channel] /= factor
    return x_MK, weights


def output_error(x_MK: Tensor, weights: list[Tensor], scale_K: Tensor | None) -> float:
    """Relative error of the output, W8A8 with one static input scale and one weight scale for each row."""
    scale_K = torch.ones(x_MK.shape[1]) if scale_K is None else scale_K
    smooth_MK = x_MK / scale_K
    rounded_MK = fake_quantize(smooth_MK, STATIC, static_range(smooth_MK.min().item(), smooth_MK.max().item(), STATIC))
    error = total = 0.0
    for w_NK in weights:
        wanted_MN = x_MK.double() @ w_NK.double().T
        got_MN = rounded_MK.double() @ fake_quantize(w_NK * scale_K, ROWS).double().T
        error, total = error + (got_MN - wanted_MN).square().sum().item(), total + wanted_MN.square().sum().item()
    return math.sqrt(error / total)


def test_static_int8_collapses_with_outliers_and_recovers() -> None:
    plain = output_error(*layer({}), None)
    x_MK, weights = layer(LOUD)
    collapsed = output_error(x_MK, weights, None)
    amax_K = x_MK.abs().amax(0)
    smoothed = output_error(x_MK, weights, smooth_scale(amax_K, weights, 0.5))
    found = search_alpha(amax_K, weights, lambda scale_K: output_error(x_MK, weights, scale_K))
    assert plain < 0.03
    assert collapsed > 0.5
    assert smoothed < 0.03
    assert collapsed > 20 * smoothed
    assert found.loss_identity == collapsed
    assert found.loss_best <= smoothed
    assert found.loss_best == output_error(x_MK, weights, found.scale_C)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.85, 1.0])
def test_scale_by_hand(alpha: float) -> None:
    """Six columns read four channels, of which one is dead and one has no weight worth the name."""
    amax_K = torch.tensor([2.0, 1.0, 8.0, 0.0, 0.5, 3.0])
    columns_K = torch.tensor([0, 1, 0, 2, 1, 3])
    first, second = torch.zeros(3, 6), torch.zeros(5, 6)
    first[1] = torch.tensor([0.1, -0.4, 0.2, 0.7, 0.1, 0.0])
    second[4] = torch.tensor([0.3, 0.1, -0.5, 0.2, 0.2, 0.0])
    x_C, w_C = [8.0, 1.0, 0.0, 3.0], [0.5, 0.4, 0.7, 0.7e-5]
    raw = [x**alpha / w ** (1 - alpha) for x, w in zip(x_C, w_C, strict=True)]
    mean = (raw[0] * raw[1] * raw[3]) ** (1 / 3)
    scale_C = smooth_scale(amax_K, [first, second], alpha, columns_K)
    assert scale_C.tolist() == pytest.approx([raw[0] / mean, raw[1] / mean, 1.0, raw[3] / mean])
    assert scale_C.dtype == torch.float32


def test_half_evens_input_and_weight_out() -> None:
    x_MK, weights = layer(LOUD)
    scale_K = smooth_scale(x_MK.abs().amax(0), weights, 0.5)
    x_K = (x_MK / scale_K).abs().amax(0)
    w_K = torch.stack([(w_NK * scale_K).abs().amax(0) for w_NK in weights]).amax(0)
    ratio_K = x_K / w_K
    torch.testing.assert_close(ratio_K, ratio_K.mean().expand_as(ratio_K), rtol=1e-4, atol=0)


def test_all_ones_where_nothing_is_seen() -> None:
    assert smooth_scale(torch.zeros(4), [torch.ones(2, 4)], 0.5).tolist() == [1] * 4
    assert smooth_scale(torch.ones(4), [torch.zeros(2, 4)], 0.5).tolist() == [1] * 4


def test_bf16_and_extremes_stay_positive_and_finite() -> None:
    amax_K = torch.tensor([3e38, 1e-38, 1.0, 0.0])
    for alpha in (0.0, 0.5, 1.0):
        scale_K = smooth_scale(amax_K.bfloat16(), [torch.tensor([[1e-38, 3e38, 0.0, 1.0]]).bfloat16()], alpha)
        assert (torch.isfinite(scale_K) & (scale_K > 0)).all()


def test_search_keeps_the_identity_unless_beaten() -> None:
    x_MK, weights = layer(LOUD)
    amax_K = x_MK.abs().amax(0)
    seen: list[Tensor | None] = []

    def loss(scale_K: Tensor | None) -> float:
        seen.append(scale_K)
        return 1.0

    tied = search_alpha(amax_K, weights, loss)
    assert (tied.alpha, tied.scale_C.tolist()) == (0.0, [1.0] * 256)
    assert seen[0] is None
    assert len(seen) == len(ALPHAS)
    nan = search_alpha(amax_K, weights, lambda scale_K: 1.0 if scale_K is None else math.nan)
    assert (nan.alpha, nan.loss_best) == (0.0, 1.0)
    broken = search_alpha(amax_K, weights, lambda scale_K: math.nan if scale_K is None else scale_K.max().item())
    assert broken.alpha > 0
    assert math.isfinite(broken.loss_best)


def test_search_measures_what_the_producer_can_store() -> None:
    x_MK, weights = layer(LOUD)
    norm_K = torch.rand(256, generator=torch.Generator().manual_seed(1)).add(0.5).bfloat16()
    found = search_alpha(
        x_MK.abs().amax(0),
        weights,
        lambda scale_K: output_error(x_MK, weights, scale_K),
        alphas=(0.4, 0.5, 0.6),
        snap=lambda scale_K: storable(scale_K, norm_K, torch.bfloat16),
    )
    assert found.alpha in (0.4, 0.5, 0.6)
    divided_K = norm_K.double() / found.scale_C.double()
    torch.testing.assert_close(divided_K, divided_K.bfloat16().double(), rtol=1e-7, atol=0)
    assert found.loss_best < 0.05 * found.loss_identity


def test_refusals() -> None:
    w_NK = torch.ones(3, 4)
    with pytest.raises(UserError, match=r"\(3, 4\).*\(5,\)"):
        smooth_scale(torch.ones(5), [w_NK], 0.5)
    with pytest.raises(UserError, match="do not fit"):
        smooth_scale(torch.ones(4), [], 0.5)
    with pytest.raises(RunError, match="input magnitude"):
        smooth_scale(torch.tensor([1.0, math.nan, 1, 1]), [w_NK], 0.5)
    with pytest.raises(RunError, match="weight"):
        smooth_scale(torch.ones(4), [w_NK, w_NK * math.inf], 0.5)
