"""Constants of the channels of a cache: their definition in float64, and what makes them free for attention."""

import math

import pytest
import torch
from torch import Tensor

from quantkit.cache_spec import CacheSpec
from quantkit.errors import RunError, UserError
from quantkit.grids.activations import quantize_kv
from quantkit.quantization.calibration.kv_channels import LEAST_SCALE, ChannelCache, Moments, choose_channels
from quantkit.types import KVSpec

PLAIN = KVSpec(4, "int", "token", symmetric=False, group_size=8, packed=True)
CHANNELS = KVSpec(4, "int", "token", symmetric=False, group_size=8, packed=True, channels=True)


def states(B: int = 2, H: int = 2, T: int = 50, D: int = 16, seed: int = 0) -> Tensor:
    """[B, H, T, D] with channels of very different means and sizes."""
    generator = torch.Generator().manual_seed(seed)
    size_D = torch.logspace(-1, 1, D)
    return (torch.randn(B, H, T, D, generator=generator) + torch.linspace(-4, 4, D)) * size_D


def constants(*parts: Tensor) -> Tensor:
    moments = Moments()
    for part in parts:
        moments.add(part)
    return moments.constants()


def test_the_constants() -> None:
    x_BHTD = states()
    found = constants(*x_BHTD.split(7, 2))
    wide = x_BHTD.double()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0].double(), wide.mean((0, 2)))
    torch.testing.assert_close(found[1].double(), wide.var((0, 2), correction=0) ** 0.25, rtol=1e-5, atol=0)


def test_channels_that_never_change() -> None:
    x_BHTD = states()
    x_BHTD[..., 3] = 5.0
    x_BHTD[:, 1] = 7.0
    offset_HD, scale_HD = constants(x_BHTD)
    assert scale_HD[0, 3].item() == pytest.approx(scale_HD[0].max().item() * LEAST_SCALE)
    assert torch.equal(scale_HD[1], torch.ones(16))
    torch.testing.assert_close(quantize_kv(x_BHTD, CHANNELS, torch.stack([offset_HD, scale_HD]))[:, 1], x_BHTD[:, 1])


def test_rounding_with_constants_in_float64() -> None:
    x_BHTD = states()
    found = constants(x_BHTD)
    offset, scale = found.double()[:, :, None]
    inner = ((x_BHTD.double() - offset) / scale).float()
    wanted = quantize_kv(inner, PLAIN).double() * scale + offset
    read = quantize_kv(x_BHTD, CHANNELS, found)
    near = (read.double() - wanted).abs() < 1e-4 * scale
    assert near.double().mean() > 0.998  # but for halves
    error, plain = ((quantize_kv(x_BHTD, *how) - x_BHTD).square().mean() for how in ((CHANNELS, found), (PLAIN,)))
    assert error < 0.5 * plain


def test_attention_pays_for_them_once_a_query() -> None:
    """The cache holds x' alone: queries times s, m of keys left out, the output times s plus m of values."""
    keys, values = states()[0], states(seed=1)[0] / 9
    query_HQD = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2)).double()
    (k_offset, k_scale), (v_offset, v_scale) = (constants(x[None]).double()[:, :, None] for x in (keys, values))
    k_held = quantize_kv(((keys - k_offset) / k_scale).float()[None], PLAIN)[0].double()
    v_held = quantize_kv(((values - v_offset) / v_scale).float()[None], PLAIN)[0].double()
    weights = ((query_HQD * k_scale) @ k_held.mT).softmax(-1)
    found = (weights @ v_held) * v_scale + v_offset

    k_read, v_read = k_held * k_scale + k_offset, v_held * v_scale + v_offset
    wanted = (query_HQD @ k_read.mT).softmax(-1) @ v_read
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_each_side_has_what_its_format_needs() -> None:
    seen: dict = {}
    cache = ChannelCache(seen)
    kept, _ = cache.update(states(), states(seed=1), 3)
    assert torch.equal(kept, states())
    found = choose_channels(seen[3], CacheSpec(CHANNELS, KVSpec(8, "int", "token")))
    assert found.v_scale is None
    assert found.k_scale is not None
    assert found.k_scale.shape == (2, 2, 16)
    with pytest.raises(UserError, match="2 scales of cached keys or values for 3 heads"):
        quantize_kv(states(H=3), CHANNELS, found.k_scale)
    with pytest.raises(UserError, match="16 scales of cached features for heads of 8"):
        quantize_kv(states(D=8), CHANNELS, found.k_scale)
    with pytest.raises(RunError, match="NaN or Inf"):
        cache.update(states() * math.inf, states(), 0)
