"""Every scheme at 1 to 300 tokens against its definition in float64: what `test_one_definition` runs in processes that
believe they have another processor.

    python one_definition.py [FLAGS of the compiler] [--bf16] [--vnni]

Prints JSON: {case: [error to the definition, error to the same token alone]}, the largest over all numbers of tokens.
With FLAGS, the CPU kernels are built with them ("-": there are none), and the dispatcher sees a processor that has what
--bf16 and --vnni say; without, everything is as it is found.
"""

import ctypes
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from quantkit_kernels.cpu import build, linear
from quantkit_kernels.cpu import weight as weights
from torch import Tensor

from quantkit.formats import FORMATS
from quantkit.runtime.definition import reference
from quantkit.runtime.quant_linear import QuantLinear
from quantkit.types import PRESETS, ActivationRange, ActivationSpec, QuantizedWeight, Scheme, TensorSpec

TOKENS = (1, 2, 7, 8, 9, 31, 33, 64, 65, 129, 300)
N, K = 80, 768  # columns of many group sizes, rows of no whole block
_INT8, _FP8 = ActivationSpec(8), ActivationSpec(8, element="float")
SCHEMES = PRESETS | {
    "MXFP4A16": Scheme(TensorSpec(4, 32, element="float", scale_format="e8m0")),
    "FP8 weights": Scheme(TensorSpec(8, -1, element="float")),
    "FP8 weights g32": Scheme(TensorSpec(8, 32, element="float")),
    "int4 channel": Scheme(TensorSpec(4, -1)),
    "int4 g16 asym": Scheme(TensorSpec(4, 16, symmetric=False)),
    "int4 g24": Scheme(TensorSpec(4, 24)),  # no kernel takes it
    "int4 g32 asym": Scheme(TensorSpec(4, 32, symmetric=False)),
    "int4 g96": Scheme(TensorSpec(4, 96)),
    "int4 g192 asym": Scheme(TensorSpec(4, 192, symmetric=False)),
    "int2 g32": Scheme(TensorSpec(2, 32)),
    "int3 g64 asym": Scheme(TensorSpec(3, 64, symmetric=False)),
    "int5 g32": Scheme(TensorSpec(5, 32)),
    "int8 g32 asym": Scheme(TensorSpec(8, 32, symmetric=False)),
    "int8 asym channel": Scheme(TensorSpec(8, -1, symmetric=False)),
    "W8A8 static": Scheme(TensorSpec(8, -1), ActivationSpec(8, dynamic=False)),
    "W8A8 asym inputs": Scheme(TensorSpec(8, -1), ActivationSpec(8, symmetric=False)),
    "W8A8 static asym inputs": Scheme(TensorSpec(8, -1), ActivationSpec(8, symmetric=False, dynamic=False)),
    "W8A8 asym weights": Scheme(TensorSpec(8, -1, symmetric=False), _INT8),
    "W4A8 g16": Scheme(TensorSpec(4, 16), _INT8),
    "W4A8 g24": Scheme(TensorSpec(4, 24), _INT8),
    "W4A8 g32 asym": Scheme(TensorSpec(4, 32, symmetric=False), _INT8),
    "W4A8 g96": Scheme(TensorSpec(4, 96), _INT8),
    "W4A8 channel": Scheme(TensorSpec(4, -1), _INT8),
    "W4A8 static": Scheme(TensorSpec(4, 128), ActivationSpec(8, dynamic=False)),
    "W4A4": Scheme(TensorSpec(4, 64), ActivationSpec(4)),
    "W4AFP8": Scheme(TensorSpec(4, 128), _FP8),
}  # fmt: skip


class Held:
    """A format of tensors whose weight is made already."""

    weights: dict[int, QuantizedWeight] = {}  # noqa: RUF012

    @staticmethod
    def check_tensors(tensors: dict[str, Tensor], scheme: Scheme) -> tuple[int, int]:
        return N, K

    @staticmethod
    def unpack(tensors: dict[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        return Held.weights[int(tensors["index"])]


def weight_of(scheme: Scheme, scales: torch.dtype, odd: bool) -> QuantizedWeight:
    """Random codes; half of the integers' scales are negative. odd: global scales that are no power of two."""
    spec = scheme.weights
    codes = torch.randint(0, spec.levels if spec.element == "int" else 2**spec.bits, (N, K), dtype=torch.uint8)
    if spec.element == "float" and spec.bits == 8:
        codes[codes & 127 == 127] = 0
    G, common = spec.groups(K), 0.0023 if odd else 2.0**-9
    scale, zero, factor = torch.rand(N, G) * 0.02 + 0.002, None, None
    if spec.scale_format == "e8m0":
        scale = torch.exp2(torch.randint(-9, -3, (N, G)).float())
    elif spec.scale_format == "e4m3":
        scale, factor = (scale * 440).to(torch.float8_e4m3fn).float() * common, common
    else:
        if spec.scale_rows != 1:
            rows = N if spec.scale_rows == -1 else spec.scale_rows
            scale = scale[::rows].repeat_interleave(rows, 0)[:N].contiguous()
        if spec.element == "int":
            scale[::2] *= -1
        scale = scale.to(scales)
    if not spec.symmetric:
        zero = torch.randint(0, spec.levels, (N, G), dtype=torch.uint8)
    inputs, acts = None, scheme.activations
    if acts is not None and acts.calibrated:
        value = common if acts.scale_format == "e4m3" else 0.021
        inputs = ActivationRange(torch.tensor(value), 111 if acts.element == "int" and not acts.symmetric else None)
    return QuantizedWeight(codes, scale, zero, spec, factor, inputs)


def cases() -> Iterator[tuple[str, Scheme, QuantizedWeight]]:
    for name, scheme in SCHEMES.items():
        plain = scheme.weights.scale_format == "float"
        for scales in (torch.bfloat16, torch.float16, torch.float32) if plain else (torch.float32,):
            yield f"{name}, scales {str(scales)[6:]}", scheme, weight_of(scheme, scales, False)
        if scheme.weights.scale_format == "e4m3":
            yield f"{name}, odd global scale", scheme, weight_of(scheme, torch.float32, True)


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def errors(scheme: Scheme, q: QuantizedWeight, dtype: torch.dtype) -> list[float]:
    """The largest errors of the layer, which each number of tokens goes through; y's own rounding is no error."""
    Held.weights[0] = q
    layer = QuantLinear(Held, {"index": torch.tensor(0)}, scheme)
    x = torch.randn(max(TOKENS), K).mul_(torch.rand(max(TOKENS), 1) + 0.2).to(dtype)
    wanted = reference(x, q, scheme).to(dtype if dtype != torch.float32 else torch.float64)
    before = layer._dequantized(x)
    alone = layer(x[:1])
    ways = [layer(x[:count]) for count in TOKENS] + [layer._dequantized(x)]
    gradient = layer(x[:9].clone().requires_grad_())
    found = [[error(y, wanted[: len(y)]), error(y[:1], alone)] for y in (before, *ways, gradient.detach())]
    return [max(column) for column in zip(*found, strict=True)]


def force(flags: list[str], bf16: bool, vnni: bool) -> None:
    """Kernels built with these flags, in place of this processor's; "-": none."""
    lib = None if flags == ["-"] else build.declare(ctypes.CDLL(str(build.build(tuple(flags)))))
    for module in (linear, weights):
        setattr(module, "library", lambda: lib)  # noqa: B010
    linear.machine = lambda: linear.Machine(lib is not None, bf16, vnni)


def run() -> dict[str, Any]:
    FORMATS["held"] = Held
    torch.manual_seed(11)
    found = {}
    for name, scheme, q in cases():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            found[f"{name}, x {str(dtype)[6:]}"] = errors(scheme, replace(q), dtype)
    return found


if __name__ == "__main__":
    options = {"--bf16", "--vnni"}
    if flags := [argument for argument in sys.argv[1:] if argument not in options]:
        force(flags, "--bf16" in sys.argv, "--vnni" in sys.argv)
    print(json.dumps(run()))
