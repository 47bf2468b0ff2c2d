"""W8A8 products (int8 exactly) and activation quantization against their references."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from quantkit_kernels.configs import GemmConfig
from quantkit_kernels.quantize_activations import quantize_activations, quantize_reference
from quantkit_kernels.w8a8 import launch, w8a8, w8a8_reference

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def error(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return ((got.double() - wanted).norm() / wanted.norm()).item()


def operands(kind: str, M: int, N: int, K: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if kind == "int8":
        x, w = (torch.randint(-128, 128, (rows, K), dtype=torch.int8, device=DEVICE) for rows in (M, N))
    else:
        x, w = (torch.randn(rows, K, device=DEVICE).mul(60).clamp(-448, 448).to(torch.float8_e4m3fn) for rows in (M, N))
    if kind == "fp8_block":
        G = -(-K // 128)
        return x, torch.rand(G, M, device=DEVICE).T + 0.1, w, torch.rand(-(-N // 128), G, device=DEVICE) + 0.1
    return x, torch.rand(M, device=DEVICE) + 0.1, w, torch.rand(N, device=DEVICE) + 0.1


def poisoned(M: int, N: int) -> Tensor:
    return torch.full((M, N), float("nan"), device=DEVICE)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 64, 128), (7, 200, 512), (40, 130, 336), (150, 70, 256)])
def test_int8_is_exact(M: int, N: int, K: int, splits: int) -> None:
    x, _, w, _ = operands("int8", M, N, K)
    ones = torch.ones(max(M, N), device=DEVICE)
    y = launch(
        x, ones[:M], w, ones[:N], "int8", poisoned(M, N), GemmConfig(16 if M < 17 else 64, 64, 128, splits, 4, 2)
    )
    assert torch.equal(y.double(), x.double() @ w.double().T)  # below 2**24, so float32 holds them


def test_int8_sums_beyond_float32_are_exact() -> None:
    """The split sums 2**24 + 1 and -2**24 meet in int32; in float32 the one would be lost."""
    x = torch.full((1, 4096), 127, dtype=torch.int8, device=DEVICE)
    w = torch.full((64, 4096), 127, dtype=torch.int8, device=DEVICE)
    w[:, 2048:] = -127
    w[:, 0] = 126
    one = torch.ones(64, device=DEVICE)
    y = launch(x, one[:1], w, one, "int8", poisoned(1, 64), GemmConfig(16, 64, 128, 2, 4, 2))
    assert y.eq(-127).all()


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("kind", ["int8", "fp8", "fp8_block"])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 128, 256), (33, 200, 384), (9, 70, 330)])
def test_scaled_products(kind: str, M: int, N: int, K: int, splits: int) -> None:
    arguments = operands(kind, M, N, K)
    y = launch(*arguments, kind, poisoned(M, N), GemmConfig(16, 64, 128, splits, 4, 2))
    limit = 1e-6 if kind == "int8" or not torch.cuda.is_available() else 1e-3
    assert error(y, w8a8_reference(*arguments, kind)) < limit


@pytest.mark.parametrize("kind", ["int8", "fp8", "fp8_block"])
def test_public_function_dtypes_and_empty(kind: str) -> None:
    arguments = operands(kind, 5, 100, 256)
    for dtype, limit in ((torch.bfloat16, 6e-3), (torch.float16, 1e-3), (torch.float32, 1e-3)):
        scale = arguments[1] * 1e-3  # within float16
        y = w8a8(arguments[0], scale, *arguments[2:], kind, dtype=dtype)
        assert y.dtype == dtype
        assert error(y, w8a8_reference(arguments[0], scale, *arguments[2:], kind)) < limit
    assert w8a8(arguments[0][:0], arguments[1][:0], *arguments[2:], kind).shape == (0, 100)


def test_w8a8_refusals() -> None:
    x, xs, w, ws = operands("int8", 4, 64, 128)
    for change, message in [
        ((x.float(), xs, w, ws, "int8"), "w8a8 x: wanted int8"),
        ((x, xs, w[:, :64].contiguous(), ws, "int8"), r"w8a8 W: wanted int8 of shape \[anyx128\], got int8 64x64"),
        ((x, xs[:3], w, ws, "int8"), r"w8a8 x_scale: wanted float32 of shape \[4\]"),
        ((x, xs, w, ws.double(), "int8"), "w8a8 w_scale"),
        ((x, xs, w, ws, "int4"), "supported: int8, fp8, fp8_block"),
        ((x.t().contiguous().t(), xs, w, ws, "int8"), "not contiguous"),
    ]:
        with pytest.raises(ValueError, match=message):
            w8a8(*change)


@pytest.mark.parametrize("group", [-1, 128], ids=["row", "g128"])
@pytest.mark.parametrize("element", ["int8", "fp8"])
@pytest.mark.parametrize("fuse", ["none", "rmsnorm", "silu_mul"])
def test_quantize(fuse: str, element: str, group: int) -> None:
    for M, K, dtype in [(3, 256, torch.bfloat16), (1, 72, torch.float16), (5, 700, torch.float32)]:
        x = torch.randn(M, K * (2 if fuse == "silu_mul" else 1), dtype=dtype, device=DEVICE) * 3
        x[0] = 0
        weight = torch.rand(K, dtype=dtype, device=DEVICE) + 0.5 if fuse == "rmsnorm" else None
        codes, scale = quantize_activations(x, element=element, group=group, fuse=fuse, norm_weight=weight)
        codes_wanted, scale_wanted = quantize_reference(x, weight, 1e-6, fuse, element, group)
        torch.testing.assert_close(scale, scale_wanted, rtol=1e-6, atol=0)
        a, b = (c.view(torch.int8).int() for c in (codes, codes_wanted))
        assert (a - b).abs().max() <= 1  # a tie may fall to either side, by float32's last bit
        assert (a != b).float().mean() < 5e-3


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(-448, 448, width=32), min_size=1, max_size=64))
def test_fp8_codes_are_torchs(values: list[float]) -> None:
    """With 448 in the row the scale is 1, and codes must be those of torch's cast."""
    x = torch.tensor([[448.0, *values]], device=DEVICE)
    codes, scale = quantize_activations(x, element="fp8")
    assert scale.item() == 1.0
    assert torch.equal(codes.float(), x.to(torch.float8_e4m3fn).float())


def test_every_fp8_value_and_midpoint() -> None:
    grid = torch.arange(127, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn).float()
    middle = (grid[1:] + grid[:-1]) / 2
    x = torch.cat([grid, middle, middle.nextafter(grid[1:]), middle.nextafter(grid[:-1])])
    x = torch.cat([x, -x])[None]
    codes, _ = quantize_activations(x, element="fp8")
    assert torch.equal(codes.view(torch.uint8) & 127, x.to(torch.float8_e4m3fn).view(torch.uint8) & 127)


def test_quantize_refusals() -> None:
    x = torch.randn(2, 64, device=DEVICE)
    for change, message in [
        ({"x": x.double()}, "x is torch.float64"),
        ({"x": x.t()}, "contiguous rows"),
        ({"group": 64}, "group is 64; supported: -1"),
        ({"fuse": "rmsnorm"}, "norm_weight goes with"),
        ({"fuse": "silu_mul", "x": x[:, :63]}, "even columns"),
        ({"element": "int4"}, "supported: int8, fp8"),
    ]:
        with pytest.raises(ValueError, match=message):
            quantize_activations(**{"x": x, "element": "int8"} | change)
    assert quantize_activations(x[:0], element="fp8")[0].shape == (0, 64)
