"""QuantLinear on its kernels: the numbers of the dequantized weight, the file's tensors given back, clear errors."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from quantkit.algorithms.rtn import rtn
from quantkit.errors import RunError
from quantkit.formats.compressed_tensors import tensors as ct
from quantkit.grids import make_grid
from quantkit.grids.activations import static_range
from quantkit.grids.dequantize import dequantize
from quantkit.runtime import kernel_choice as kernels
from quantkit.runtime.definition import is_rounded, multiplied_weight, reference
from quantkit.runtime.quant_linear import QuantLinear
from quantkit.types import PRESETS, ActivationSpec, QuantizedWeight, Scheme, TensorSpec

SCHEMES = PRESETS | {
    "int2": Scheme(TensorSpec(2, 32)),
    "int3 asym": Scheme(TensorSpec(3, 64, symmetric=False)),
    "int5": Scheme(TensorSpec(5, 32)),
    "int8 asym channel": Scheme(TensorSpec(8, -1, symmetric=False)),
    "W8A8 static": Scheme(TensorSpec(8, -1), ActivationSpec(8, dynamic=False)),
    "W8A8 asym inputs": Scheme(TensorSpec(8, -1), ActivationSpec(8, symmetric=False)),
    "W4A8 g32": Scheme(TensorSpec(4, 32), ActivationSpec(8)),
}
N, K = 48, 256


def weight_of(scheme: Scheme, columns: int = K) -> QuantizedWeight:
    torch.manual_seed(3)
    q = rtn(torch.randn(N, columns), make_grid(scheme.weights, torch.float32, None, signed=False))
    if scheme.activations is None or not scheme.activations.calibrated:
        return q
    return QuantizedWeight(*(getattr(q, name) for name in ("codes_NK", "scale_NG", "zero_NG", "spec", "global_scale")),
                           static_range(-4.0, 4.0, scheme.activations))  # fmt: skip


def layer_of(scheme: Scheme, bias: Tensor | None = None) -> tuple[QuantLinear, QuantizedWeight]:
    q = weight_of(scheme)
    return QuantLinear(ct, ct.pack(q, scheme), scheme, bias), q


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("tokens", [1, 3, 100])
def test_every_scheme_on_the_cpu(name: str, tokens: int) -> None:
    scheme = SCHEMES[name]
    layer, q = layer_of(scheme, bias := torch.randn(N))
    x = torch.randn(2, tokens, K)
    assert relative(layer(x), reference(x, q, scheme) + bias) < 1e-6
    assert layer.kernel is not None
    assert layer.kernel.name in repr(layer)
    assert relative(layer(x.bfloat16()).float(), reference(x.bfloat16().float(), q, scheme) + bias) < 1e-2


@pytest.mark.parametrize("name", SCHEMES)
def test_the_weight_survives_repacking(name: str) -> None:
    layer, q = layer_of(SCHEMES[name])
    before = layer.weight
    layer(torch.randn(1, K))
    assert torch.equal(before, dequantize(q))
    assert torch.equal(layer.weight, before)
    assert layer.weight.dtype == before.dtype


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    same = (a.dtype, a.shape) == (b.dtype, b.shape)
    return same and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("name", SCHEMES)
def test_the_files_tensors_are_given_back(name: str) -> None:
    """Bit for bit and in their order, from a kernel's form as before it."""
    scheme = SCHEMES[name]
    layer, q = layer_of(scheme)
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    layer(torch.randn(1, K))
    assert layer.kernel is not None
    assert not list(layer.buffers())
    after = layer.state_dict()
    assert list(after) == list(before)
    for key, tensor in after.items():
        assert same_bits(tensor, before[key]), key
    assert torch.equal(layer.quantized().codes_NK, q.codes_NK)


@pytest.mark.parametrize("name", SCHEMES)
def test_moving_and_casting_leave_the_bits_alone(name: str) -> None:
    layer, q = layer_of(SCHEMES[name])
    x = torch.randn(3, K)
    y, before = layer(x), layer.state_dict()
    assert torch.equal(layer.half().bfloat16().to(torch.device("cpu"))(x), y)
    layer.double()
    assert all(same_bits(tensor, before[key]) for key, tensor in layer.state_dict().items())
    assert torch.equal(layer.quantized().codes_NK, q.codes_NK)


def test_the_meta_device_keeps_nothing() -> None:
    layer, _ = layer_of(PRESETS["W4A16"])
    layer(torch.randn(1, K))
    layer.to("meta")
    with pytest.raises(RunError, match=r"meta device.*load the model again"):
        layer.quantized()


def test_copies_and_casts_after_repacking() -> None:
    layer, _ = layer_of(PRESETS["FP8_DYNAMIC"], torch.randn(N))
    x = torch.randn(3, K)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_gradients_reach_the_input() -> None:
    for repacked in (False, True):
        layer, q = layer_of(PRESETS["W4A16"])
        if repacked:
            layer(torch.randn(1, K))
        x = torch.randn(2, K, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad is not None
        assert torch.allclose(x.grad, dequantize(q).sum(0).expand(2, K), atol=1e-4)


@pytest.mark.parametrize("spec", [TensorSpec(4, 8), TensorSpec(4, 24)], ids=str)
def test_groups_no_kernel_takes_are_dequantized(spec: TensorSpec) -> None:
    scheme = Scheme(spec)
    q = weight_of(scheme, columns=240)
    layer, x = QuantLinear(ct, ct.pack(q, scheme), scheme), torch.randn(2, 240)
    assert relative(layer(x), reference(x, q, scheme)) < 1e-6
    assert layer.kernel is None
    assert list(layer.buffers())


def test_blocks_cut_short() -> None:
    scheme = PRESETS["FP8_BLOCK"]
    q = weight_of(scheme, columns=200)
    layer, x = QuantLinear(ct, ct.pack(q, scheme), scheme), torch.randn(5, 200)
    assert relative(layer(x), reference(x, q, scheme)) < 1e-6
    assert layer.kernel is not None


def test_scales_of_floats_lie_in_few_bytes() -> None:
    small, factor = kernels._small_scale(weight_of(PRESETS["NVFP4"]))
    assert small.dtype == torch.float8_e4m3fn
    assert torch.equal(small.float() * factor, weight_of(PRESETS["NVFP4"]).scale_NG)
    assert kernels._small_scale(weight_of(PRESETS["MXFP4"]))[0].dtype == torch.bfloat16


def test_bad_input() -> None:
    layer, _ = layer_of(PRESETS["W4A16"])
    short = torch.rand(2, 255)
    cases: list[tuple[str, Callable[[], object]]] = [
        (r"x is torch.float32 \(2, 255\); .*in_features=256.* takes floating \[\.\.\., 256\]", lambda: layer(short)),
        (r"x is torch.int64", lambda: layer(torch.ones(2, K, dtype=torch.int64))),
        (r"x is torch.float32 \(\)", lambda: layer(torch.tensor(1.0))),
    ]  # fmt: skip
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
    layer(torch.rand(2, K))
    with pytest.raises(ValueError, match="x is on meta, this layer was repacked for cpu"):
        layer(torch.rand(2, K, device="meta"))


UNKNOWN = ("MXFP8", "int8 asym channel", "W8A8 asym inputs")  # to the GPU's kernels, as are sums of small groups
GPU = {name: scheme for name, scheme in SCHEMES.items() if name not in (*UNKNOWN, "W4A8 g32")}


@pytest.mark.parametrize("name", GPU)
def test_every_scheme_on_the_gpu_kernels(name: str) -> None:
    """On the GPU where there is one, else in Triton's interpreter."""
    pytest.importorskip("triton")
    scheme, device = SCHEMES[name], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    q = weight_of(scheme)
    moved = QuantizedWeight(
        q.codes_NK.to(device), q.scale_NG.to(device), None if q.zero_NG is None else q.zero_NG.to(device), q.spec,
        q.global_scale, q.input,
    )  # fmt: skip
    kernel = kernels.on_gpu(moved, scheme, torch.bfloat16)
    assert kernel is not None
    for tokens in (1, 40, 200):
        x = torch.randn(tokens, K).bfloat16()
        limit = 4e-3 if torch.cuda.is_available() else 7e-3  # of rounding y; the interpreter truncates
        assert relative(kernel.run(x.to(device)).cpu().float(), reference(x, q, scheme)) < limit
    w_NK, decoded = multiplied_weight(q, scheme), kernel.decode().cpu()
    assert torch.equal(decoded, w_NK.to(decoded.dtype))
    exact = not is_rounded(scheme) and scheme.weights.scale_format == "float"  # bfloat16 holds the others
    assert decoded.dtype == (torch.float32 if exact else torch.bfloat16)
    eight = name in ("W8A8", "W8A8 static", "FP8", "FP8_DYNAMIC", "FP8_BLOCK")
    assert ("w8a8" in kernel.name) == eight


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_the_gpu_kernels_do_not_know(name: str) -> None:
    pytest.importorskip("triton")
    assert kernels.on_gpu(weight_of(SCHEMES[name]), SCHEMES[name], torch.bfloat16) is None


def test_sums_of_small_groups_are_left_to_the_dequantized_weight() -> None:
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="sums of groups of 32"):
        kernels.on_gpu(weight_of(SCHEMES["W4A8 g32"]), SCHEMES["W4A8 g32"], torch.bfloat16)


def test_a_linear_of_float32_on_a_gpu_is_dequantized() -> None:
    q = weight_of(PRESETS["W4A16"])
    assert kernels.choose(q, PRESETS["W4A16"], torch.device("cuda"), torch.float32) is None
    assert kernels.choose(q, PRESETS["W4A16"], torch.device("meta"), torch.bfloat16) is None
    assert isinstance(nn.Module.__repr__(layer_of(PRESETS["W4A16"])[0]), str)


def test_the_speed_script() -> None:
    """Both ways give the same numbers; nothing of the time is judged."""
    script = Path(__file__).parents[2] / "eval/speed.py"
    command = [sys.executable, str(script), "--random", "tiny", "--tokens", "256", "--decode", "2", "--repeat", "1"]
    result = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["layers"], found["kernels"]) == (14, ["cpu int4"])
    assert found["difference"] < 1e-4
    assert found["decoding"]["ratio"] > 0
