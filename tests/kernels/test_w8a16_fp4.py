"""Weight-only int8, float8 and float4 against float64 references, and every code's value against its definition."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from quantkit_kernels.fp4 import E2M1, fp4_linear, fp4_reference, pack_mxfp4, pack_nvfp4
from quantkit_kernels.w8a16 import pack_w8a16, w8a16, w8a16_reference
from quantkit_kernels.weight_only import decode_weight

INTERPRETED = not torch.cuda.is_available()  # where bfloat16 is truncated, not rounded
LIMIT = {torch.bfloat16: 6e-3 if INTERPRETED else 4e-3, torch.float16: 6e-4}


def error(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return ((got.double() - wanted).norm() / wanted.norm()).item()


def finite_fp8(N: int, K: int, device: torch.device) -> Tensor:
    codes = torch.randint(0, 256, (N, K), dtype=torch.uint8, device=device)
    return torch.where(codes & 127 == 127, 126, codes).to(torch.uint8).view(torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_fp8_code_is_exact(dtype: torch.dtype, device: torch.device) -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    codes = codes[codes & 127 != 127].repeat(4)[: 4 * 254].reshape(4, 254)
    weight = pack_w8a16(codes.view(torch.float8_e4m3fn), torch.ones(4, 1, device=device), dtype=dtype)
    assert torch.equal(decode_weight(weight).float(), codes.view(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_int8_code_is_exact(dtype: torch.dtype, device: torch.device) -> None:
    values = torch.arange(-128, 128, dtype=torch.int8, device=device).repeat(3, 1)
    weight = pack_w8a16(values, torch.ones(3, 1, device=device), dtype=dtype)
    assert torch.equal(decode_weight(weight).to(torch.int8), values)


def test_every_fp4_code_is_exact(device: torch.device) -> None:
    codes = torch.arange(16, dtype=torch.uint8, device=device).repeat(2, 16)
    scale = torch.ones(2, 16, device=device).to(torch.float8_e4m3fn)
    weight = pack_nvfp4(codes, scale, 1.0, dtype=torch.bfloat16)
    values = torch.tensor(E2M1 + tuple(-v for v in E2M1), device=device).repeat(2, 16)
    assert torch.equal(decode_weight(weight).float(), values)


@pytest.mark.parametrize("group_size", [32, 64, 128, -1], ids="g{}".format)
@pytest.mark.parametrize("element", ["int8", "fp8"])
@pytest.mark.parametrize("M", [3, 40, 200])
def test_w8a16(element: str, group_size: int, M: int, device: torch.device) -> None:
    N, K, dtype = 70, 640, torch.bfloat16 if M != 40 else torch.float16
    G = 1 if group_size == -1 else K // group_size
    w_NK = torch.randint(-128, 128, (N, K), dtype=torch.int8, device=device)
    w_NK = w_NK if element == "int8" else finite_fp8(N, K, device)
    scale = (torch.rand(N, G, device=device) * 1e-3 + 1e-4).to(dtype)
    weight = pack_w8a16(w_NK, scale, group_size=group_size, dtype=dtype)
    x = torch.randn(M, K, dtype=dtype, device=device)
    assert error(w8a16(x, weight), w8a16_reference(x, weight)) < LIMIT[dtype]
    w = (w_NK.double() * scale.double().repeat_interleave(K // G, 1)).to(dtype).double()
    assert error(w8a16_reference(x, weight), x.double() @ w.T) < 1e-6


@pytest.mark.parametrize(("N", "K"), [(128, 256), (200, 300)])
def test_fp8_blocks(N: int, K: int, device: torch.device) -> None:
    w_NK = finite_fp8(N, K, device)
    scale = torch.rand(-(-N // 128), -(-K // 128), device=device) * 1e-3 + 1e-4
    weight = pack_w8a16(w_NK, scale, block=True, dtype=torch.bfloat16)
    x = torch.randn(7, K, dtype=torch.bfloat16, device=device)
    wanted = w8a16_reference(x, weight)
    expanded = scale.repeat_interleave(128, 0)[:N].repeat_interleave(128, 1)[:, :K]
    assert error(wanted, x.double() @ (w_NK.float() * expanded).bfloat16().double().T) < 1e-12
    assert error(w8a16(x, weight), wanted) < LIMIT[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("M", "N", "K"), [(1, 64, 256), (19, 100, 400), (200, 64, 256)])
def test_nvfp4(M: int, N: int, K: int, dtype: torch.dtype, device: torch.device) -> None:
    codes = torch.randint(0, 16, (N, K), dtype=torch.uint8, device=device)
    scale = (torch.rand(N, K // 16, device=device) * 440 + 0.01).to(torch.float8_e4m3fn)
    weight = pack_nvfp4(codes, scale, 3e-5, dtype=dtype)
    x = torch.randn(M, K, dtype=dtype, device=device)
    assert error(fp4_linear(x, weight), fp4_reference(x, weight)) < LIMIT[dtype]
    values = torch.tensor(E2M1 + tuple(-v for v in E2M1), device=device, dtype=torch.float64)[codes.long()]
    w = values * scale.double().repeat_interleave(16, 1) * 3e-5
    assert error(fp4_reference(x, weight), x.double() @ w.T) < 1e-6


@pytest.mark.parametrize(("M", "N", "K"), [(2, 64, 256), (33, 100, 416)])
def test_mxfp4(M: int, N: int, K: int, device: torch.device) -> None:
    codes = torch.randint(0, 16, (N, K), dtype=torch.uint8, device=device)
    exponent = torch.randint(90, 130, (N, K // 32), dtype=torch.uint8, device=device)
    weight = pack_mxfp4(codes, exponent, dtype=torch.bfloat16)
    x = torch.randn(M, K, dtype=torch.bfloat16, device=device)
    assert error(fp4_linear(x, weight), fp4_reference(x, weight)) < LIMIT[torch.bfloat16]
    values = torch.tensor(E2M1 + tuple(-v for v in E2M1), device=device, dtype=torch.float64)[codes.long()]
    w = values * torch.exp2(exponent.double() - 127).repeat_interleave(32, 1)
    assert error(fp4_reference(x, weight), x.double() @ w.T) < 1e-12


def test_refusals(device: torch.device) -> None:
    nan = torch.full((4, 64), 127, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="4x64 holds 256 NaN"):
        pack_w8a16(nan, torch.ones(4, 1, device=device), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="blocks are for float8"):
        pack_w8a16(
            torch.zeros(4, 64, dtype=torch.int8, device=device), torch.ones(1, 1), block=True, dtype=torch.bfloat16
        )
    codes = torch.zeros(4, 64, dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match="scales of 255, which is NaN"):
        pack_mxfp4(codes, torch.full((4, 2), 255, dtype=torch.uint8, device=device), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"span 2\*\*20; torch.float16 takes"):
        pack_mxfp4(codes, torch.tensor([[100, 120]] * 4, dtype=torch.uint8, device=device), dtype=torch.float16)
    with pytest.raises(ValueError, match="NVFP4 scale: wanted float8_e4m3fn"):
        pack_nvfp4(codes, torch.ones(4, 4, device=device), 1.0, dtype=torch.bfloat16)
