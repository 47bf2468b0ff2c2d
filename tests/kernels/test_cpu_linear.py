"""The CPU products against float64, with and without the compiled kernels, outputs poisoned with NaN."""

import copy
import ctypes
import pickle
import platform
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantkit_kernels.cpu import build, linear
from quantkit_kernels.cpu import weight as weights
from quantkit_kernels.cpu.linear import (
    Machine,
    choose,
    choose_int8,
    cpu_linear,
    cpu_linear_by_row,
    cpu_linear_int8,
    cpu_linear_reference,
    product,
    product_int8,
)
from quantkit_kernels.cpu.weight import CpuWeight, decode_rows, dense_cpu, pack_cpu, reference_weight
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CODES = {"int4": 16, "int8": 256, "fp8": 256, "fp4": 16}
PLAIN = Machine(compiled=False, bf16=False, vnni=False)
SERVER = Machine(compiled=False, bf16=True, vnni=True)
# every instruction that is used where the processor has it, spelled out
SPELLED_OUT = ("-DQK_WIDTH=16", "-DQK_TEST_VNNI", "-DQK_TEST_BF16", "-DQK_TEST_TILES", "-O1")
SPELLED_OUT += ("-mno-avx512f",) if platform.machine() == "x86_64" else ()
FORMATS = [("int4", False), ("int4", True), ("int8", False), ("int8", True), ("fp8", False), ("fp4", False)]


@pytest.fixture(scope="module", params=["compiled", "spelled out", "torch alone"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """The library as built for this processor; its AVX-512 width, VNNI, bfloat16 and AMX paths, spelled out; none."""
    found, patch = None, pytest.MonkeyPatch()
    if request.param != "torch alone":
        request.getfixturevalue("lib")
        flags = SPELLED_OUT if request.param != "compiled" else ()
        found = build.declare(ctypes.CDLL(str(build.build(flags))))
    for module in (linear, weights):
        patch.setattr(module, "library", lambda: found)
    tiles = found is not None and bool(found.quantkit_has_tiles())
    patch.setattr(linear, "machine", lambda: Machine(found is not None, bf16=False, vnni=False, tiles=tiles))
    yield request.param
    patch.undo()


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN: what a kernel leaves out shows."""
    plain = torch.empty

    def empty(*size: Any, **options: Any) -> Tensor:
        made = plain(*size, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made.fill_(77)

    monkeypatch.setattr(linear.torch, "empty", empty)


def random_weight(
    format: str, asym: bool, N: int, K: int, group: int, scales: torch.dtype = torch.float32,
    rounding: torch.dtype = torch.float32,
) -> CpuWeight:  # fmt: skip
    codes = torch.randint(0, CODES[format], (N, K), dtype=torch.uint8)
    if format == "fp8":
        codes[codes & 127 == 127] = 0  # NaN
    scale = torch.rand(N, 1 if group == -1 else K // group) + 0.1
    scale[0] *= -1
    scale = scale.to(scales)
    zero = torch.randint(0, CODES[format], scale.shape, dtype=torch.uint8) if asym else None
    return pack_cpu(codes, scale, zero, format=format, group_size=group, rounding=rounding)  # type: ignore[arg-type]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


def test_what_onednn_made_is_not_copied() -> None:
    """It cannot be: a W8A8 model that has run is copied and saved all the same."""
    weight = random_weight("int8", False, 16, 64, -1)
    weight.kept["qlinear"] = torch.zeros(1).to_mkldnn()
    for twin in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert not twin.kept
        assert torch.equal(reference_weight(twin, torch.float32), reference_weight(weight, torch.float32))
    assert weight.kept


@pytest.mark.parametrize(("K", "group"), [(2112, -1), (100, -1), (2112, 64), (1536, 128)])
def test_a_row_of_an_fp8_product_does_not_depend_on_the_others(kernels: str, K: int, group: int) -> None:
    """To the bit, over several blocks of columns; torch alone promises less."""
    torch.manual_seed(0)
    weight, x = random_weight("fp8", False, 37, K, group), torch.randn(21, K)
    every = cpu_linear_by_row(x, weight)
    assert relative(every, cpu_linear_reference(x, weight)) < 1e-6
    for M in range(1, 21) if kernels != "torch alone" else ():
        assert torch.equal(cpu_linear_by_row(x[-M:], weight), every[-M:])
    assert cpu_linear_by_row(x.view(3, 7, K), weight).shape == (3, 7, 37)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_products(kernels: str, data: st.DataObject) -> None:
    format, asym = data.draw(st.sampled_from(FORMATS))
    group = data.draw(st.sampled_from([-1, 16, 32, 48, 64, 96, 128, 240, 256]))
    K = data.draw(st.integers(1, 300)) if group == -1 else group * data.draw(st.integers(1, 5))
    N, M = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 40))
    scales = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    rounding = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    weight = random_weight(format, asym, N, K, group, scales, rounding)
    x = torch.randn(M, K).to(dtype)
    y = cpu_linear(x, weight)
    assert (y.shape, y.dtype) == ((M, N), dtype)
    if M == 0:
        return
    wanted = cpu_linear_reference(x, weight)
    scale = (x.double().abs() @ reference_weight(weight).abs().T).amax().item()
    limit = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]
    assert (y.double() - wanted).abs().max() <= limit * scale


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group", [-1, 16, 32, 64, 96, 128])
@pytest.mark.parametrize(("format", "asym"), FORMATS)
def test_every_way_meets_the_same_weight(
    kernels: str, format: str, asym: bool, group: int, scales: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded as the checkpoint's scales say and to x's dtype; int8 inputs meet it unrounded."""
    compiled, rounds = kernels != "torch alone", CpuWeight.rounds
    weight = random_weight(format, asym, 24, 384, group, scales, scales)
    x = torch.randn(9, 384)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        wanted = cpu_linear_reference(x.to(dtype), weight)
        # the same numbers in float32, which rounds no output, while the weight knows the real dtype
        monkeypatch.setattr(CpuWeight, "rounds", lambda weight, _, dtype=dtype: rounds(weight, dtype))
        known = compiled and len(rounds(weight, dtype)) <= 1
        for way in ("gemv", "panel") if known else ("panel",):
            for M in (1, 2, 4, 9):
                assert relative(product(x[:M].to(dtype).float(), weight, way), wanted[:M]) < 1e-6
        monkeypatch.undo()
    if format.startswith("int"):
        codes = torch.randint(-128, 128, (9, 384), dtype=torch.int8)
        few = compiled and choose_int8(weight, 1, linear.machine()) == "gemv_int8"
        for way in ("gemv_int8", "panel") if few else ("panel",):
            got = product_int8(codes, torch.ones(9), weight, way)
            assert relative(got, codes.double() @ reference_weight(weight).T) < 1e-6


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_integer_sums_are_exact(kernels: str, data: st.DataObject) -> None:
    """Whole numbers below 2**24, extreme codes among them: equal, or a sum saturated or was rounded."""
    format, asym = data.draw(st.sampled_from(FORMATS[:4]))
    group = data.draw(st.sampled_from([-1, 32, 64, 128]))
    K = data.draw(st.integers(1, 250)) if group == -1 else group * data.draw(st.integers(1, 3))
    N, M = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 9))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    weight = random_weight(format, asym, N, K, group)
    weight.scale.fill_(1)
    x = torch.randint(-128, 128, (M, K), dtype=torch.int8)
    x[0] = data.draw(st.sampled_from([-128, 127]))
    got = cpu_linear_int8(x, torch.ones(M, 1), weight, torch.float32)
    assert torch.equal(got.double(), x.double() @ reference_weight(weight).T)
    scale = torch.rand(M, 1)  # one more rounding, and no other
    assert torch.equal(cpu_linear_int8(x, scale, weight, torch.float32), got * scale)


@pytest.mark.parametrize(("format", "asym"), FORMATS)
def test_tiles(kernels: str, format: str, asym: bool) -> None:
    """Rows, columns and tokens that fill no tile, every layout of groups; a token's sums are its own."""
    if not linear.machine().tiles:
        pytest.skip("no AMX in this build")
    groups = {-1: 300, 16: 80, 32: 96, 48: 144, 64: 192, 96: 288, 128: 384, 192: 576, 256: 512}
    for group, K in groups.items():
        for scales, rounding in (
            (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16),
            (torch.float8_e4m3fn, torch.float32),
        ):  # fmt: skip
            weight = random_weight(format, asym, 37, K, group, scales, rounding)
            x = torch.randn(130, K).bfloat16()
            wanted, every = cpu_linear_reference(x, weight), linear._tiles(x, weight, torch.float32)
            assert relative(every, wanted) < 1e-6
            for M in (1, 2, 3, 16, 17, 31, 32, 33, 40):
                some = linear._tiles(x[:M], weight, torch.float32)
                assert torch.equal(some, every[:M])
                assert torch.equal(product(x[:M], weight, "tiles"), some.bfloat16())


def test_tiles_in_many_parts(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More inputs than the second-level cache holds, more rows than a thread, columns than are decoded at a time."""
    if not linear.machine().tiles:
        pytest.skip("no AMX in this build")
    weight, x = random_weight("int4", True, 70, 8128, 32, torch.bfloat16), torch.randn(97, 8128).bfloat16()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    got = linear._tiles(x, weight, torch.float32)
    assert relative(got, cpu_linear_reference(x, weight)) < 1e-6
    assert torch.equal(linear._tiles(x[90:], weight, torch.float32), got[90:])


def test_saturation_where_it_would_show(kernels: str) -> None:
    """All the largest codes and inputs: pairs of products do not fit 16 bits."""
    for format, middle in (("int4", 0), ("int8", 0), ("int8", 255)):
        top = CODES[format] - 1
        codes = torch.full((3, 256), top if middle == 0 else 0, dtype=torch.uint8)
        weight = pack_cpu(codes, torch.ones(3, 2), format=format, group_size=128, middle=middle)  # type: ignore[arg-type]
        for value in (127, -128):
            x = torch.full((5, 256), value, dtype=torch.int8)
            got = cpu_linear_int8(x, torch.ones(5, 1), weight, torch.float32)
            assert torch.equal(got, torch.full((5, 3), float(value * (top if middle == 0 else -255) * 256)))


@pytest.mark.parametrize(("format", "asym"), FORMATS)
@pytest.mark.parametrize("rounding", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_decoded_weights_are_rounded_as_the_file_defines(
    kernels: str, format: str, asym: bool, rounding: torch.dtype
) -> None:
    weight = random_weight(format, asym, 37, 192, 48, rounding, rounding)
    wanted = reference_weight(weight).float().to(rounding)  # of the exact product: both factors are short
    for begin, end in ((0, 37), (5, 9)):
        got = decode_rows(weight, begin, end, torch.empty(end - begin, weight.padded))
        assert torch.equal(got, wanted[begin:end].float())
        halves = decode_rows(weight, begin, end, torch.empty(end - begin, weight.padded, dtype=torch.bfloat16))
        assert torch.equal(halves, wanted[begin:end].bfloat16())


def test_every_e4m3_scale_and_code(kernels: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(2, 1)
    codes[:, 127], codes[:, 255] = 0, 0
    weight = pack_cpu(codes, torch.ones(2, 16), format="fp8", group_size=16)
    decoded = decode_rows(weight, 0, 2, torch.empty(2, 256))
    assert torch.equal(decoded, codes.view(torch.float8_e4m3fn).float())
    scale = codes[:1, :].view(torch.float8_e4m3fn).view(4, 64).contiguous()
    ones = pack_cpu(torch.full((4, 1024), 9, dtype=torch.uint8), scale, format="int4", group_size=16, factor=0.5)
    decoded = decode_rows(ones, 0, 4, torch.empty(4, 1024))
    assert torch.equal(decoded, scale.float().repeat_interleave(16, 1) * 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("K", [64, 192, 100])
def test_dense_weights(kernels: str, dtype: torch.dtype, K: int) -> None:
    w_NK, x = torch.randn(33, K).to(dtype), torch.randn(2, 7, K)
    weight = dense_cpu(w_NK)
    assert relative(cpu_linear(x, weight), x.double() @ w_NK.double().T) < 1e-6
    assert (weight.codes.data_ptr() == w_NK.data_ptr()) == (K % 64 == 0)  # no second copy


@pytest.mark.parametrize("threads", [1, 3])
def test_many_rows_and_columns(kernels: str, threads: int) -> None:
    """More than one panel, block of x, tile of rows and thread."""
    weight, before = random_weight("int4", True, 1100, 2304, 128, torch.bfloat16), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for M in (1, 2, 3, 8, 33, 70):
            x = torch.randn(M, 2304)
            assert relative(cpu_linear(x, weight), cpu_linear_reference(x, weight)) < 1e-6
            codes = torch.randint(-128, 128, (M, 2304), dtype=torch.int8)
            wanted = cpu_linear_reference(codes, weight)
            assert relative(cpu_linear_int8(codes, torch.ones(M, 1), weight, torch.float32), wanted) < 1e-6
    finally:
        torch.set_num_threads(before)


class Recorder(TorchDispatchMode):
    """The operators that run, and their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.calls.append((func.overloadpacket.__name__, args))
        return func(*args, **kwargs or {})


OTHER_WEIGHT = {"_weight_int4pack_mm_for_cpu", "_weight_int8pack_mm"}  # codes times scales, not rounded
SLOW = {"_scaled_mm", "_dyn_quant_matmul_4bit", "_int_mm", "quantize_per_tensor", "linear_dynamic"}


@pytest.mark.parametrize("here", [PLAIN, SERVER], ids=["plain", "server"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("M", [1, 2, 4, 16, 64])
def test_torch_operators_are_used_where_they_are_fast(here: Machine, dtype: torch.dtype, M: int) -> None:
    """The measured traps of torch's CPU operators, as calls that must not be made."""
    for format, group in (("int4", 128), ("int4", 32), ("int8", -1), ("fp8", -1), ("fp4", 16)):
        weight = random_weight(format, False, 64, 256, group, torch.bfloat16)
        x = torch.randn(M, 256).to(dtype)
        with Recorder() as seen:
            y = product(x, weight, choose(weight, M, dtype, here))
        assert relative(y, cpu_linear_reference(x, weight)) < 1e-2
        for name, arguments in seen.calls:
            assert name not in SLOW | OTHER_WEIGHT
            floats = [a for a in arguments if isinstance(a, Tensor) and a.dtype == torch.float8_e4m3fn]
            assert not any(a.numel() > weight.scale.numel() for a in floats), "casts of float8 weights are slow"
            if name in ("mm", "addmm", "linear"):
                halves = [a for a in arguments if isinstance(a, Tensor) and a.dtype in (torch.bfloat16, torch.float16)]
                assert here.bf16 or not halves, "16-bit products without the instructions for them"


def test_float8_weights_are_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are kept: the second call must not decode again."""
    weight = random_weight("fp8", False, 64, 256, -1, torch.bfloat16)
    x = torch.randn(32, 256).bfloat16()
    monkeypatch.setattr(linear, "library", lambda: None)
    monkeypatch.setattr(weights, "library", lambda: None)
    first = product(x, weight, choose(weight, 32, x.dtype, SERVER))
    monkeypatch.setattr(linear, "decode_rows", None)
    assert torch.equal(product(x, weight, choose(weight, 32, x.dtype, SERVER)), first)


def test_qlinear_only_where_it_is_exact_and_fast() -> None:
    """oneDNN's product of bytes: wrong without VNNI, where pairs saturate; a reference kernel for signed inputs."""
    weight = random_weight("int8", False, 64, 256, -1)
    for M in (1, 4, 300):
        for compiled in (True, False):
            assert choose_int8(weight, M, Machine(compiled, bf16=False, vnni=False)) != "qlinear"
    assert choose_int8(weight, 4, SERVER) == "qlinear"
    assert choose_int8(random_weight("int8", True, 64, 256, -1), 4, SERVER) != "qlinear"  # it has no zero points
    weight.codes.view(torch.int8).clamp_(-60, 60)  # so small that no pair saturates, whatever this processor is
    x = torch.randint(-60, 61, (9, 256), dtype=torch.int8)
    with Recorder() as seen:
        y = product_int8(x, torch.full((9,), 0.5), weight, "qlinear")
    assert relative(y, 0.5 * (x.double() @ reference_weight(weight).T)) < 1e-6
    inputs = [arguments[0] for name, arguments in seen.calls if name == "qlinear_pointwise"]
    assert [i.dtype for i in inputs] == [torch.uint8]


def test_few_tokens_never_go_through_a_whole_panel() -> None:
    here = Machine(compiled=True, bf16=False, vnni=False)
    for format, asym in FORMATS:
        weight = random_weight(format, asym, 8, 256, 16)
        assert choose(weight, 1, torch.bfloat16, here) == "gemv"
        assert choose(weight, 4096, torch.bfloat16, here) == "panel"
    assert choose_int8(random_weight("int4", False, 8, 256, 128), 1, here) == "gemv_int8"
    assert choose_int8(random_weight("int4", False, 8, 256, 16), 1, here) == "panel"  # groups it has no sums for


def test_bad_input() -> None:
    codes, scale = torch.randint(0, 16, (8, 128), dtype=torch.uint8), torch.rand(8, 2)
    weight, few = pack_cpu(codes, scale, format="int4", group_size=64), codes[:, :2].contiguous()
    x = torch.rand(3, 128)
    bytes_ = torch.zeros(3, 128, dtype=torch.int8)
    cases: list[tuple[str, Any]] = [
        (r"wanted uint8 .* got int32 8x128", lambda: pack_cpu(codes.int(), scale, format="int4", group_size=64)),
        (r"not contiguous", lambda: pack_cpu(codes.T, scale, format="int4", group_size=64)),
        (r"group_size=96 does not divide 128", lambda: pack_cpu(codes, scale, format="int4", group_size=96)),
        (r"group size 24; supported: multiples of 16", lambda: pack_cpu(codes, scale, format="int4", group_size=24)),
        (r"scale: wanted .* \[8x1\]", lambda: pack_cpu(codes, scale, format="int4", group_size=128)),
        (r"up to 15, got 255", lambda: pack_cpu(codes | 240, scale, format="int4", group_size=64)),
        (r"floats have no zero", lambda: pack_cpu(codes, scale, few, format="fp4", group_size=64)),
        (r"takes int4, int8", lambda: pack_cpu(codes, scale, format="bf16", group_size=64)),
        (r"is empty", lambda: pack_cpu(codes[:0], scale[:0], format="int4", group_size=64)),
        (r"on meta", lambda: pack_cpu(codes.to("meta"), scale.to("meta"), format="int4", group_size=64)),
        (r"different devices", lambda: pack_cpu(codes, scale.to("meta"), format="int4", group_size=64)),
        (r"x is \(3, 64\), the weight is 8x128", lambda: cpu_linear(torch.rand(3, 64), weight)),
        (r"float64: wanted float32", lambda: cpu_linear(torch.rand(3, 128).double(), weight)),
        (r"on meta, the weight on the CPU", lambda: cpu_linear(torch.rand(3, 128, device="meta"), weight)),
        (r"wanted int8", lambda: cpu_linear_int8(x, torch.ones(3), weight, x.dtype)),
        (r"\(2,\) for 3 tokens", lambda: cpu_linear_int8(bytes_, torch.ones(2), weight, x.dtype)),
        (r"dense weight: wanted", lambda: dense_cpu(codes)),
    ]  # fmt: skip
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_strided_inputs_and_shapes(kernels: str) -> None:
    weight = random_weight("int4", False, 24, 128, 64)
    x = torch.randn(128, 6).T
    assert relative(cpu_linear(x, weight), cpu_linear_reference(x, weight)) < 1e-6
    assert cpu_linear(torch.randn(2, 3, 128), weight).shape == (2, 3, 24)
    assert cpu_linear(torch.randn(128), weight).shape == (24,)


def test_operators_and_compile() -> None:
    weight = random_weight("int4", True, 24, 128, 64, torch.bfloat16)
    x = torch.randn(3, 128)
    parts = linear._parts(weight)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.quantkit_kernels.cpu_linear.default, (x, *parts), test_utils=checks)
    codes = torch.randint(-9, 9, (3, 128), dtype=torch.int8)
    arguments = (codes, torch.rand(3), *parts)
    torch.library.opcheck(torch.ops.quantkit_kernels.cpu_linear_int8.default, arguments, test_utils=checks)
    compiled = torch.compile(lambda x: cpu_linear(x * 2, weight) + 1, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), cpu_linear(x * 2, weight) + 1)


def test_a_compiler_that_fails_costs_speed_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", ("-not-a-flag",))
    build.library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="without its compiled CPU kernels"):
            assert build.library() is None
        monkeypatch.setenv("QUANTKIT_COMPILE", "0")
        build.library.cache_clear()
        assert build.library() is None
        assert not list(tmp_path.rglob("*.so"))
    finally:
        build.library.cache_clear()


def test_a_library_that_computes_something_else_is_refused(lib: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        quantkit_gemv, quantkit_decode = lib.quantkit_gemv, lib.quantkit_decode

        def quantkit_gemv_int8(self, *arguments: Any) -> None:
            lib.quantkit_gemv_int8(*arguments[:-1], 1)  # the other tokens stay undone

    assert build.self_test(lib) is None
    assert "exact int4" in str(build.self_test(Wrong()))  # type: ignore[arg-type]
    monkeypatch.setattr(build, "self_test", lambda _: "wrong")
    build.library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="wrong"):
            assert build.library() is None
    finally:
        build.library.cache_clear()


def test_the_library_is_built_once(lib: ctypes.CDLL) -> None:
    before = build.build().stat()
    assert build.build().stat().st_mtime_ns == before.st_mtime_ns
    assert build.build().parent == build.cache_folder()


@pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("objdump") is None, reason="needs x86-64 and objdump"
)
def test_machine_code_for_processors_with_vnni(lib: ctypes.CDLL) -> None:
    """Not run here, but compiled: 512-bit products, the byte dot product, and no spilled loop of conversions."""
    path = build.build(("-march=icelake-server", "-O2"))
    code = subprocess.run(["objdump", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    assert "vpdpbusd" in code
    assert "vpmaddubsw" not in code
    assert code.count("vfmadd") > 100
    assert "zmm" in code
