"""Integers whose scale and zero point share 16 bits, against float64 arithmetic on Python's own float16."""

import struct

import pytest
import torch
from torch import Tensor

from quantkit.grids.activations import quantize_kv
from quantkit.grids.packed_scales import packed_codes, packed_values
from quantkit.types import KVSpec


def spec(bits: int, group: int = -1, *, symmetric: bool = False) -> KVSpec:
    return KVSpec(bits, "int", "token", symmetric, group, packed=True)


def half(x: float) -> int:
    """The bits of x as float16."""
    return struct.unpack("<H", struct.pack("<e", x))[0]


def number(bits: int) -> float:
    return struct.unpack("<e", struct.pack("<H", bits))[0]


def by_hand(group: list[float], bits: int) -> list[float]:
    """A group as it is read again: min-max with zero in the range, the scale's last `bits` bits given to the zero."""
    low, high, top = min(0.0, *group), max(0.0, *group), 2**bits - 1
    step = number((half((high - low) / top) + (1 << bits >> 1)) >> bits << bits)
    if step == 0:
        return [0.0] * len(group)
    zero = max(0, min(top, round(-low / step)))
    return [(max(0, min(top, round(x / step) + zero)) - zero) * step for x in group]


def rows(kind: str) -> Tensor:
    """[40, 24] of float32."""
    x = torch.randn(40, 24, generator=torch.Generator().manual_seed(3))
    return {"both": x, "above": x.abs() + 2, "below": -x.abs() - 2, "large": x * 9e3, "small": x * 1e-4}[kind]


@pytest.mark.parametrize("kind", ["both", "above", "below", "large", "small"])
@pytest.mark.parametrize(("bits", "group"), [(4, -1), (4, 8), (3, 12), (2, -1)])
def test_zero_points_in_the_scale(kind: str, bits: int, group: int) -> None:
    x = rows(kind)
    codes, words = packed_codes(x, spec(bits, group))
    size = 24 if group == -1 else group
    assert (codes.dtype, words.dtype) == (torch.uint8, torch.int16)
    assert words.shape == (40, 24 // size)
    assert codes.max() < 2**bits
    read = packed_values(codes, words, spec(bits, group)).double()
    wanted = torch.tensor(
        [[v for i in range(0, 24, size) for v in by_hand(row[i : i + size], bits)] for row in x.tolist()]
    )
    different = (read - wanted.double()).abs() > 1e-6 * wanted.abs().max()
    assert different.double().mean() < 0.003  # but for halves that float32 division moves


def test_the_word_is_a_float16_with_the_zero_point_in_its_last_bits() -> None:
    codes, words = packed_codes(torch.tensor([[-1.0, 0.0, 2.0, 0.5]]), spec(4))
    step = words[0, 0].item() & 0xFFFF
    assert number(step >> 4 << 4) == pytest.approx(0.2, rel=1 / 128)
    assert step & 15 == 5
    assert codes[0].tolist() == [0, 5, 15, 8 if 0.5 / number(step >> 4 << 4) > 2.5 else 7]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_symmetric_scales_are_float16(bits: int) -> None:
    x = rows("both")
    codes, words = packed_codes(x, spec(bits, 8, symmetric=True))
    top = 2 ** (bits - 1) - 1
    scale = words.view(torch.float16).double()[..., None]
    amax = x.double().unflatten(-1, (3, 8)).abs().amax(-1, keepdim=True)
    torch.testing.assert_close(scale, amax / top, rtol=2**-11, atol=0)
    wanted = (x.double().unflatten(-1, (3, 8)) / scale).round().clamp(-top - 1, top) * scale
    read = packed_values(codes, words, spec(bits, 8, symmetric=True)).double().unflatten(-1, (3, 8))
    assert ((read - wanted).abs() < 1e-5 * scale).double().mean() > 0.999


@pytest.mark.parametrize("given", [spec(4), spec(4, symmetric=True), spec(8, 8, symmetric=True), spec(4, 7)], ids=str)
def test_zeros_tiny_and_huge_numbers_stay_finite(given: KVSpec) -> None:
    for value in (0.0, 1e-30, 3e38, -3e38):
        x = torch.full((1, 1, 2, 16), value)
        read = quantize_kv(x, given)
        assert read.shape == x.shape
        assert torch.isfinite(read).all()
        assert (read.abs() <= x.abs()).all()
    assert torch.equal(quantize_kv(torch.zeros(1, 1, 1, 16), given), torch.zeros(1, 1, 1, 16))


def test_a_token_is_rounded_by_itself_and_only_once() -> None:
    x = torch.randn(2, 3, 9, 32, generator=torch.Generator().manual_seed(0))
    given = spec(4, 16)
    read = quantize_kv(x, given)
    assert torch.equal(read[:, :, 4:6], quantize_kv(x[:, :, 4:6], given))
    step = (x.unflatten(-1, (2, 16)).aminmax(dim=-1).max - x.unflatten(-1, (2, 16)).aminmax(dim=-1).min) / 15
    assert ((read - x).abs().unflatten(-1, (2, 16)) <= 1.02 * step[..., None]).all()
    assert quantize_kv(x.bfloat16(), given).dtype == torch.bfloat16
