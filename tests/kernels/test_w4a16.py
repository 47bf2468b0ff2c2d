"""W4A16 against its float64 reference: dtypes, groups, zero points, ragged shapes, split K, many tokens.

Outputs are NaN before the launch. In the interpreter sums leave the kernel in float32 and are right to 1e-5; what it
rounds to bfloat16 it truncates, an error of 3.4e-3 in norm where rounding gives 1.7e-3.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from quantkit_kernels.configs import DEQUANTIZE_FROM, WeightOnlyConfig, weight_only_config
from quantkit_kernels.layout import PackedWeight
from quantkit_kernels.w4a16 import pack_w4a16, w4a16, w4a16_reference
from quantkit_kernels.w8a16 import pack_w8a16, w8a16, w8a16_reference
from quantkit_kernels.weight_only import decode_weight, launch

INTERPRETED = not torch.cuda.is_available()
LIMIT = {torch.bfloat16: 6e-3 if INTERPRETED else 4e-3, torch.float16: 6e-4}  # of rounded outputs
SUMS = 1e-5


def error(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return ((got.double() - wanted).norm() / wanted.norm()).item()


def make(N: int, K: int, group_size: int, asymmetric: bool, dtype: torch.dtype, device: torch.device) -> PackedWeight:
    G = 1 if group_size == -1 else K // group_size
    codes = torch.randint(0, 16, (N, K), dtype=torch.uint8, device=device)
    scale = (torch.rand(N, G, device=device) * 0.02 + 0.002).to(dtype)
    zero = torch.randint(0, 16, (N, G), dtype=torch.uint8, device=device) if asymmetric else None
    return pack_w4a16(codes, scale, zero, group_size=group_size, dtype=dtype)


def run(x: Tensor, weight: PackedWeight, config: WeightOnlyConfig) -> Tensor:
    y = torch.full((x.shape[0], weight.out_features), float("nan"), device=x.device)
    return launch(x, weight, y, config)


@pytest.mark.parametrize("asymmetric", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, -1], ids="g{}".format)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_format(dtype: torch.dtype, group_size: int, asymmetric: bool, device: torch.device) -> None:
    weight = make(80, 512, group_size, asymmetric, dtype, device)
    x = torch.randn(5, 512, dtype=dtype, device=device)
    assert error(run(x, weight, WeightOnlyConfig(16, 64, 2, 4, 2)), w4a16_reference(x, weight)) < SUMS


@pytest.mark.parametrize("M", [1, 16, 17, 33, 65])
def test_tiles_for_every_token_count(M: int, device: torch.device) -> None:
    """Small and large tiles, several of them."""
    weight = make(64, 256, 128, True, torch.bfloat16, device)
    x = torch.randn(M, 256, dtype=torch.bfloat16, device=device)
    config = weight_only_config("int4", M, 64, 256, device)
    assert error(run(x, weight, config), w4a16_reference(x, weight)) < SUMS


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 150), st.integers(1, 9), st.sampled_from([32, 128, -1]), st.booleans(),
    st.integers(1, 3),
)  # fmt: skip
def test_ragged_shapes(M: int, N: int, groups: int, group_size: int, asymmetric: bool, splits: int) -> None:
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    K = groups * (24 if group_size == -1 else group_size)
    weight = make(N, K, group_size, asymmetric, torch.bfloat16, device)
    x = torch.randn(M, K, dtype=torch.bfloat16, device=device)
    config = WeightOnlyConfig(16 if M <= 16 else 32, 64, splits, 4, 2)
    assert error(run(x, weight, config), w4a16_reference(x, weight)) < SUMS


@pytest.mark.parametrize("group_size", [32, 128, -1], ids="g{}".format)
@pytest.mark.parametrize("scales", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", ["int4", "int4 asym", "int8", "fp8"])
def test_the_weight_is_the_same_for_any_number_of_tokens(
    format: str, dtype: torch.dtype, scales: torch.dtype, group_size: int, device: torch.device
) -> None:
    """Products with the identity are the weight itself: the product of code and scale, rounded as the scales say."""
    N, K = 32, 256
    G = 1 if group_size == -1 else K // group_size
    scale = ((torch.rand(N, G, device=device) - 0.5) * 0.01).to(scales)
    codes = torch.randint(0, 16 if "int4" in format else 256, (N, K), dtype=torch.uint8, device=device)
    zero = torch.randint(0, 16, (N, G), dtype=torch.uint8, device=device) if "asym" in format else None
    if "int4" in format:
        weight = pack_w4a16(codes, scale, zero, group_size=group_size, dtype=dtype)
        steps = codes.float() - (8 if zero is None else zero.float().repeat_interleave(K // G, 1))
    else:
        codes[codes & 127 == 127] = 0
        elements = codes.view(torch.int8 if format == "int8" else torch.float8_e4m3fn)
        weight, steps = pack_w8a16(elements, scale, group_size=group_size, dtype=dtype), elements.float()
    wanted = (steps * scale.float().repeat_interleave(K // G, 1)).to(scales).to(dtype)
    assert torch.equal(decode_weight(weight), wanted)
    x = torch.eye(K, dtype=dtype, device=device)
    for block_m, block_n in ((16, 32), (64, 32)):
        assert torch.equal(run(x, weight, WeightOnlyConfig(block_m, block_n, 1, 4, 2)).T, wanted.float())


@pytest.mark.parametrize("group_size", [128, -1], ids="g{}".format)
@pytest.mark.parametrize("asymmetric", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize("M", [1, 40, 200])
def test_sums_of_whole_numbers_are_exact(M: int, asymmetric: bool, group_size: int, device: torch.device) -> None:
    """int8 codes as inputs: nothing is rounded but the scaled sums, in float32."""
    N, K = 70, 384
    G = 1 if group_size == -1 else K // group_size
    codes = torch.randint(0, 16, (N, K), dtype=torch.uint8, device=device)
    scale = (torch.rand(N, G, device=device) * 0.02 + 0.002).bfloat16()
    zero = torch.randint(0, 16, (N, G), dtype=torch.uint8, device=device) if asymmetric else None
    weight = pack_w4a16(codes, scale, zero, group_size=group_size, dtype=torch.bfloat16, sums=True)
    x = torch.randint(-128, 128, (M, K), device=device).bfloat16()
    steps = codes.double() - (8 if zero is None else zero.double().repeat_interleave(K // G, 1))
    wanted = x.double() @ (steps * scale.double().repeat_interleave(K // G, 1)).T
    y = w4a16(x, weight)
    assert y.dtype == torch.float32
    assert error(y, wanted) < 1e-6
    assert error(w4a16_reference(x, weight), wanted) < 1e-12
    assert error(x.double() @ decode_weight(weight).double().T, wanted) < 1e-6
    eight = pack_w8a16((codes.to(torch.int8) - 8), scale, group_size=group_size, dtype=torch.bfloat16, sums=True)
    assert error(w8a16(x, eight), w8a16_reference(x, eight)) < 1e-6


def test_split_k_is_deterministic_and_leaves_the_counters_at_zero(device: torch.device) -> None:
    weight = make(96, 1024, 128, False, torch.bfloat16, device)
    x = torch.randn(4, 1024, dtype=torch.bfloat16, device=device)
    results = [run(x, weight, WeightOnlyConfig(16, 64, 4, 4, 2)) for _ in range(3)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("splits", [1, 2, 3])
def test_scales_follow_the_steps_of_a_part(splits: int, device: torch.device) -> None:
    """Groups of 128 load their scales one step ahead; four steps in parts of 4, of 2, and of 2, 2 and none."""
    weight = make(64, 1024, 128, False, torch.bfloat16, device)
    x = torch.randn(3, 1024, dtype=torch.bfloat16, device=device)
    assert error(run(x, weight, WeightOnlyConfig(16, 64, splits, 4, 2)), w4a16_reference(x, weight)) < SUMS


def test_rows_of_x_may_be_strided(device: torch.device) -> None:
    weight = make(64, 256, 128, False, torch.bfloat16, device)
    wide = torch.randn(3, 512, dtype=torch.bfloat16, device=device)
    x = wide[:, 256:]
    assert torch.equal(w4a16(x, weight), w4a16(x.contiguous(), weight))


@pytest.mark.parametrize("group_size", [32, 128, -1], ids="g{}".format)
@pytest.mark.parametrize("asymmetric", [False, True], ids=["sym", "asym"])
def test_decoded_weight_and_many_tokens(group_size: int, asymmetric: bool, device: torch.device) -> None:
    weight = make(70, 384, group_size, asymmetric, torch.float16, device)
    wanted = w4a16_reference(torch.eye(384, device=device), weight).T
    assert error(decode_weight(weight), wanted) < LIMIT[torch.float16]
    x = torch.randn(DEQUANTIZE_FROM, 384, dtype=torch.float16, device=device)
    assert error(w4a16(x, weight), w4a16_reference(x, weight)) < LIMIT[torch.float16]


def test_empty_and_leading_dimensions(device: torch.device) -> None:
    weight = make(64, 256, 64, False, torch.bfloat16, device)
    assert w4a16(torch.empty(0, 256, dtype=torch.bfloat16, device=device), weight).shape == (0, 64)
    x = torch.randn(2, 3, 256, dtype=torch.bfloat16, device=device)
    assert torch.equal(w4a16(x, weight).reshape(6, 64), w4a16(x.reshape(6, 256), weight))


def test_operator_has_a_fake_and_a_schema(device: torch.device) -> None:
    weight = make(64, 256, 128, True, torch.bfloat16, device)
    x = torch.randn(2, 256, dtype=torch.bfloat16, device=device)
    arguments = (x, weight.words, weight.scale, weight.zero, weight.row_scale, "int4", 128)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.quantkit_kernels.weight_only.default, arguments, test_utils=checks)


def test_refusals(device: torch.device) -> None:
    weight = make(64, 256, 128, False, torch.bfloat16, device)
    with pytest.raises(ValueError, match=r"x is \(2, 128\), the weight is 64x256"):
        w4a16(torch.randn(2, 128, dtype=torch.bfloat16, device=device), weight)
    codes, scale = torch.zeros(64, 256, dtype=torch.uint8, device=device), torch.ones(64, 4, device=device)
    with pytest.raises(ValueError, match="sums of groups of 64; supported: 128 and -1"):
        pack_w4a16(codes, scale, group_size=64, dtype=torch.bfloat16, sums=True)
    with pytest.raises(ValueError, match=r"x is torch.float16, the weight was packed for torch.bfloat16"):
        w4a16(torch.randn(2, 256, dtype=torch.float16, device=device), weight)
