"""Rounding of inputs: float64 arithmetic on spelled-out grids, worked examples, and compressed-tensors' own forward."""

import math

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize as ct_fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.errors import RunError
from quantkit.grids.activations import TINY, fake_quantize, static_range
from quantkit.types import PRESETS, ActivationRange, ActivationSpec

INT8, INT8_ASYM, INT4 = ActivationSpec(8), ActivationSpec(8, symmetric=False), ActivationSpec(4)
INT8_STATIC, INT8_STATIC_ASYM = ActivationSpec(8, dynamic=False), ActivationSpec(8, symmetric=False, dynamic=False)
FP8, FP8_STATIC = ActivationSpec(8, element="float"), ActivationSpec(8, element="float", dynamic=False)
FP8_GROUP = ActivationSpec(8, 128, element="float")
NVFP4 = ActivationSpec(4, 16, element="float", scale_format="e4m3")
MXFP4, MXFP8 = (ActivationSpec(bits, 32, element="float", scale_format="e8m0") for bits in (4, 8))
DYNAMIC = [INT8, INT8_ASYM, INT4, ActivationSpec(8, 32), FP8, FP8_GROUP, MXFP4, MXFP8]
EVERY = [*DYNAMIC, INT8_STATIC, INT8_STATIC_ASYM, FP8_STATIC, NVFP4]


def floats(exponent_bits: int, mantissa_bits: int, bias: int, top: float) -> list[float]:
    """All numbers of a small float format, from its definition."""
    numbers = set()
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            part = mantissa / 2**mantissa_bits
            numbers.add((1 + part) * 2.0 ** (exponent - bias) if exponent else part * 2.0 ** (1 - bias))
    numbers = {n for n in numbers if n <= top}
    return sorted(numbers | {-n for n in numbers})


E4M3, E2M1 = floats(4, 3, 7, 448), floats(2, 1, 1, 6)


def nearest(value: float, grid: list[float]) -> float:
    return min(grid, key=lambda number: abs(number - value))


def expected_scale(x_g: list[float], spec: ActivationSpec, static: ActivationRange | None) -> tuple[float, int]:
    """Scale and zero point of numbers that share a scale, in Python's floats."""
    if static is not None and spec.scale_format == "float":
        return static.scale.item(), static.zero or 0
    low, high, amax = min(x_g), max(x_g), max(abs(v) for v in x_g)
    if spec.element == "int":
        if spec.symmetric:
            return amax / (2 ** (spec.bits - 1) - 1), 0
        scale = (high - low) / (2**spec.bits - 1)
        return scale, round(-low / scale)
    if spec.scale_format == "e8m0":
        return 2.0 ** (math.floor(math.log2(amax)) - (2 if spec.bits == 4 else 8)), 0
    if spec.scale_format == "e4m3":
        assert static is not None
        return nearest(amax / 6 / static.scale.item(), E4M3) * static.scale.item(), 0
    return amax / 448, 0


def expected(x_g: list[float], spec: ActivationSpec, static: ActivationRange | None) -> list[tuple[float, float]]:
    """For each number the value it is rounded to, and how far its step was from the nearest tie or bound."""
    scale, zero = expected_scale(x_g, spec, static)
    levels = 2**spec.bits
    if spec.element == "float":
        grid = E4M3 if spec.bits == 8 else E2M1
    else:
        low = -levels // 2 if spec.symmetric else -zero
        grid = [float(step) for step in range(low, low + levels)]
    result = []
    for value in x_g:
        if scale == 0:
            result.append((0.0, 1.0))
            continue
        step = value / scale
        first, second = sorted(grid, key=lambda number: abs(number - step))[:2]
        result.append((first * scale, (abs(second - step) - abs(first - step)) / abs(second - first)))
    return result


def sample(M: int = 6, K: int = 96, seed: int = 0) -> Tensor:
    """Rows of very different sizes with a few outliers."""
    generator = torch.Generator().manual_seed(seed)
    x_MK = torch.randn(M, K, generator=generator) * torch.logspace(-2, 2, M)[:, None]
    x_MK[:, ::17] *= 20
    return x_MK


def range_for(x: Tensor, spec: ActivationSpec, clip: float = 1.0) -> ActivationRange | None:
    return static_range(x.min().item() * clip, x.max().item() * clip, spec) if spec.calibrated else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_every_value_is_the_nearest_on_its_grid(spec: ActivationSpec, dtype: torch.dtype) -> None:
    x_MK = sample().to(dtype)
    static = range_for(x_MK.float(), spec, clip=0.7 if spec.scale_format == "float" else 1.0)
    rounded_MK = fake_quantize(x_MK, spec, static)
    assert rounded_MK.dtype == dtype
    size = 96 if spec.group_size == -1 else spec.group_size
    compared = 0
    for row_K, ours_K in zip(x_MK.double().tolist(), rounded_MK.tolist(), strict=True):
        for start in range(0, 96, size):
            group = expected(row_K[start : start + size], spec, static)
            for (value, margin), ours in zip(group, ours_K[start : start + size], strict=True):
                if margin > 1e-3:  # elsewhere float32 may see a tie on the other side
                    tolerance = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]
                    assert ours == pytest.approx(value, rel=tolerance, abs=6e-8 if dtype == torch.float16 else 0)
                    compared += 1
    assert compared > 500


def test_worked_examples() -> None:
    x = torch.tensor([[127.0, -127.0, 0.5, 1.5, 2.5, -0.5]])  # scale 1, halves to even
    assert fake_quantize(x, INT8).tolist() == [[127, -127, 0, 2, 2, 0]]
    one = ActivationRange(torch.tensor(1.0))
    assert fake_quantize(torch.tensor([[-300.0, -128.4, 127.4, 300.0]]), INT8_STATIC, one).tolist() == [
        [-128, -128, 127, 127]
    ]
    # codes 0 .. 255 with zero point 100: from -100 to 155; halves round before the zero point is added
    shifted = ActivationRange(torch.tensor(1.0), 101)
    assert fake_quantize(torch.tensor([[-300.0, 0.0, 0.5, 2.5, 300.0]]), INT8_STATIC_ASYM, shifted).tolist() == [
        [-101, 0, 0, 2, 154]
    ]
    assert fake_quantize(torch.tensor([[5.0, 260.0, 132.4]]), INT8_ASYM).tolist() == [[5, 260, 132]]  # no zero inside
    assert fake_quantize(torch.tensor([[448.0, 17.0, 1e-9, -19.0]]), FP8).tolist() == [[448, 16, 0, -20]]
    assert fake_quantize(torch.tensor([[1e6, -1e6, 1.0]]), FP8_STATIC, one).tolist() == [[448, -448, 1]]
    # amax 7: exponent floor(log2 7) - 2 = 0, so 7 is clamped to 6 and 5 is a tie that goes to the even mantissa
    mx = torch.zeros(1, 32)
    mx[0, :4] = torch.tensor([7.0, 5.0, -2.4, 0.25])
    assert fake_quantize(mx, MXFP4)[0, :4].tolist() == [6, 4, -2, 0]
    assert fake_quantize(mx, MXFP8)[0, :4].tolist() == [7, 5, -2.5, 0.25]  # scale 2^-6: 448, 320, -153.6 -> -160, 16
    # amax 12, global 1: scale e4m3(2) = 2
    nv = torch.zeros(1, 16)
    nv[0, :4] = torch.tensor([12.0, 7.1, -4.9, 0.4])
    assert fake_quantize(nv, NVFP4, one)[0, :4].tolist() == [12, 8, -4, 0]


@pytest.mark.parametrize("spec", EVERY, ids=str)
@pytest.mark.parametrize("shape", [(0, 64), (3, 64), (2, 3, 64), (64,)], ids=str)
def test_zeros_stay_zero_and_shapes_stay(spec: ActivationSpec, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    static = static_range(-3.0, 5.0, spec) if spec.calibrated else None
    assert torch.equal(fake_quantize(x, spec, static), x)
    if spec.calibrated:
        assert torch.equal(fake_quantize(x, spec, static_range(0.0, 0.0, spec)), x)


@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_input_is_left_alone(spec: ActivationSpec) -> None:
    x_MK = sample()
    before_MK = x_MK.clone()
    fake_quantize(x_MK, spec, range_for(x_MK, spec))
    assert torch.equal(x_MK, before_MK)


@given(value=st.floats(-6e4, 6e4, width=32, allow_subnormal=True), spec=st.sampled_from(EVERY))
@example(value=1.2257867509199263e-36, spec=ActivationSpec(8))
@settings(max_examples=300, deadline=None)
def test_never_nan(value: float, spec: ActivationSpec) -> None:
    """A row of one number, of two and of that number among zeros; the largest is kept to within the format's step."""
    rows = torch.tensor([[value] * 32, [value, -value] * 16, [value, *[0.0] * 31]])
    static = static_range(-abs(value), abs(value), spec) if spec.calibrated else None
    rounded = fake_quantize(rows, spec, static)
    assert torch.isfinite(rounded).all()
    step = {"int": 1 / 100 if spec.bits == 8 else 1 / 6, "float": 1 / 7.9 if spec.bits == 8 else 1 / 2.9}[spec.element]
    least = 127 * TINY  # integers below it become zero: their scale would have no finite reciprocal
    floor = 1 / 512 / 448 if spec.scale_format == "float" and spec.element == "float" else least
    assert abs(rounded[2, 0] - value) <= max(abs(value) * step, floor)


def test_ragged_last_group_has_its_own_scale() -> None:
    x_MK = sample(4, 300)
    parts = [fake_quantize(x_MK[:, a:b], FP8) for a, b in ((0, 128), (128, 256), (256, 300))]
    assert torch.equal(fake_quantize(x_MK, FP8_GROUP), torch.cat(parts, 1))


def test_tiny_tokens_keep_vllms_least_scale() -> None:
    """Below amax = 1/512 a token's fp8 scale no longer shrinks; a group's does."""
    x = torch.tensor([[1e-4, 7e-5]])
    least = 1 / (448 * 512)
    assert fake_quantize(x, FP8).tolist()[0] == pytest.approx([nearest(v / least, E4M3) * least for v in x[0].tolist()])
    assert fake_quantize(x, FP8_GROUP)[0, 0].item() == pytest.approx(1e-4, rel=1e-6)


def test_static_scale_may_differ_by_head() -> None:
    x_BHTD = torch.randn(2, 3, 5, 8) * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    scale_H = x_BHTD.abs().amax((0, 2, 3)) / 448
    rounded_BHTD = fake_quantize(x_BHTD, FP8_STATIC, ActivationRange(scale_H[:, None, None]))
    for h in range(3):
        alone = fake_quantize(x_BHTD[:, h], FP8_STATIC, ActivationRange(scale_H[h]))
        assert torch.equal(rounded_BHTD[:, h], alone)


def test_static_ranges() -> None:
    assert static_range(-2.54, 1.0, INT8_STATIC).scale.item() == pytest.approx(0.02)
    assert static_range(-1.0, 896.0, FP8_STATIC).scale.item() == 2.0
    assert static_range(-1.0, 2688.0, NVFP4).scale.item() == 1.0
    assert static_range(-2689.0, 1.0, NVFP4).scale.item() == 2.0
    assert static_range(-0.1, 0.01, NVFP4).scale.item() == 2.0**-14  # 0.1 / 2688 = 1.22 * 2^-15
    asym = static_range(-0.5, 2.05, INT8_STATIC_ASYM)
    assert (asym.scale.item(), asym.zero) == (pytest.approx(0.01), 50)
    positive, negative = static_range(1.0, 2.55, INT8_STATIC_ASYM), static_range(-2.55, -1.0, INT8_STATIC_ASYM)
    assert (positive.zero, negative.zero) == (0, 255)
    assert positive.scale.item() == negative.scale.item() == pytest.approx(0.01)
    for spec in (INT8_STATIC, INT8_STATIC_ASYM, FP8_STATIC, NVFP4):
        dead = static_range(0.0, 0.0, spec)
        assert dead.scale.dtype == torch.float32
        assert dead.scale.item() == 1.0
        assert static_range(-1e-44, 1e-44, spec).scale.item() > 0
        with pytest.raises(RunError, match="overflowed"):
            static_range(-1.0, math.inf, spec)


@pytest.mark.parametrize("preset", [name for name, scheme in PRESETS.items() if scheme.activations])
def test_presets_lose_little(preset: str) -> None:
    """Signal to noise of Gaussian inputs, in dB: about 6 a bit of mantissa, as each format promises."""
    spec = PRESETS[preset].activations
    assert spec is not None
    x_MK = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    error_MK = fake_quantize(x_MK, spec, range_for(x_MK, spec)) - x_MK
    noise = 10 * math.log10(x_MK.square().sum().item() / error_MK.square().sum().item())
    low = {("int", 8): 38, ("float", 8): 30, ("float", 4): 17}[spec.element, spec.bits]
    assert low < noise < low + 8


def ct_args(spec: ActivationSpec) -> QuantizationArgs:
    scales = {"e4m3": torch.float8_e4m3fn, "e8m0": torch.uint8, "float": None}[spec.scale_format]
    strategy = {"e4m3": "tensor_group", "e8m0": "group"}.get(spec.scale_format) or (
        "tensor" if not spec.dynamic else "token" if spec.group_size == -1 else "group"
    )
    return QuantizationArgs(
        num_bits=spec.bits,
        type=spec.element,
        symmetric=spec.symmetric,
        strategy=strategy,
        group_size=None if spec.group_size == -1 else spec.group_size,
        dynamic="local" if spec.scale_format == "e4m3" else spec.dynamic,
        scale_dtype=scales,
        zp_dtype=None if scales is None else scales,
    )


def ct_dynamic(x_MK: Tensor, spec: ActivationSpec, divisor: Tensor | None = None) -> Tensor:
    """What transformers would compute for a dynamic spec; of [B, T, K] only, else its tokens are other dimensions."""
    args = ct_args(spec)
    scale, zero = compute_dynamic_scales_and_zp(x_MK[None], args, torch.nn.Module(), divisor)
    return ct_fake_quantize(x_MK[None], scale, zero, args, divisor)[0]


def test_fp8_equals_compressed_tensors() -> None:
    x_MK = sample(16, 256)
    assert torch.equal(fake_quantize(x_MK, FP8), ct_dynamic(x_MK, FP8))
    assert torch.equal(fake_quantize(x_MK, FP8_GROUP), ct_dynamic(x_MK, FP8_GROUP))
    static = ActivationRange(torch.tensor(0.25))  # a power of two: 1 / s is exact
    theirs_MK = ct_fake_quantize(x_MK, static.scale[None], None, ct_args(FP8_STATIC))
    assert torch.equal(fake_quantize(x_MK, FP8_STATIC, static), theirs_MK)


def test_int8_static_equals_compressed_tensors() -> None:
    x_MK = sample(16, 256)
    static = range_for(x_MK, INT8_STATIC, clip=0.5)
    assert static is not None
    theirs_MK = ct_fake_quantize(x_MK, static.scale[None], None, ct_args(INT8_STATIC))
    assert torch.equal(fake_quantize(x_MK, INT8_STATIC, static), theirs_MK)
    shifted = ActivationRange(torch.tensor(0.25), 90)
    zero = torch.tensor([90 - 128], dtype=torch.int8)
    theirs_MK = ct_fake_quantize(x_MK, shifted.scale[None], zero, ct_args(INT8_STATIC_ASYM))
    assert torch.equal(fake_quantize(x_MK, INT8_STATIC_ASYM, shifted), theirs_MK)


def test_int8_dynamic_differs_from_compressed_tensors_by_its_scale_only() -> None:
    """Theirs is amax / 127.5, vLLM's kernels' is amax / 127: with ours put into their code the results are equal."""
    x_MK = sample(16, 256)
    scale_M1 = x_MK.abs().amax(1, keepdim=True) / 127
    theirs_MK = ct_fake_quantize(x_MK, scale_M1, None, ct_args(INT8))
    ours_MK = fake_quantize(x_MK, INT8)
    assert (ours_MK == theirs_MK).float().mean() > 0.999  # a product with 127 / amax may see a tie differently
    torch.testing.assert_close(ours_MK, theirs_MK, rtol=0, atol=1.001 * scale_M1.max().item())
    assert (ours_MK == ct_dynamic(x_MK, INT8)).float().mean() < 0.5


def test_nvfp4_equals_compressed_tensors() -> None:
    x_MK = sample(16, 256)
    static = range_for(x_MK, NVFP4)
    assert static is not None
    theirs_MK = ct_dynamic(x_MK, NVFP4, 1 / static.scale)  # their global scale divides
    live_MG = x_MK.abs().unflatten(1, (-1, 16)).amax(2) / 6 / static.scale > 2**-9  # see the module's docstring
    same_MG = (fake_quantize(x_MK, NVFP4, static) == theirs_MK).unflatten(1, (-1, 16)).all(2)
    assert same_MG[live_MG].all()
    assert live_MG.float().mean() > 0.9


def test_mx_equals_compressed_tensors_below_seven_quarters() -> None:
    x_MK = sample(64, 256)
    mantissa_MG = torch.frexp(x_MK.abs().unflatten(1, (-1, 32)).amax(2)).mantissa * 2
    for spec in (MXFP4, MXFP8):
        same_MG = (fake_quantize(x_MK, spec) == ct_dynamic(x_MK, spec)).unflatten(1, (-1, 32)).all(2)
        assert same_MG[mantissa_MG < 1.75].all()
        assert spec == MXFP8 or not same_MG[mantissa_MG >= 1.75].any()
