"""The kernel a quantized linear runs on, chosen once for a layer: from its scheme, its shape and where its inputs are.

    CPU   quantkit_kernels.cpu: codes stay packed; every scheme whose groups are whole multiples of 16 columns
    CUDA  the Triton kernels, for bfloat16 and float16 inputs: 8-bit inputs on 8-bit tensor cores where weights are int8
          or fp8 by channel or block, else the weight-only kernel where 16 bits hold the codes of both (groups of 128 or
          a channel) or inputs and weight themselves (NVFP4, MX)

Where no kernel takes a layer there is None, and its weight is dequantized at every call. What a kernel computes is
`runtime.definition`'s business: one that would round something else is not taken.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from quantkit_kernels.cpu.linear import cpu_linear, cpu_linear_by_row, cpu_linear_int8
from quantkit_kernels.cpu.weight import GROUP, CpuWeight, decode_rows, nibbles, pack_cpu
from torch import Tensor

from quantkit.grids.activations import fake_quantize, int_codes
from quantkit.runtime.definition import is_rounded
from quantkit.types import BLOCK, ActivationRange, ActivationSpec, QuantizedWeight, Scheme

HALVES = (torch.bfloat16, torch.float16)


class Kernel(NamedTuple):
    """A weight repacked for one device.

    run      x [..., K] -> x @ W^T [..., N] in x's dtype; x is quantized first where the scheme says so
    decode   () -> W [N, K]; in float32 where it is not rounded before it meets x
    codes    () -> the codes as a QuantizedWeight has them, uint8 [N, K]: repacking loses none
    device   where it lies
    name     of the kernel, human-readable
    """

    run: Callable[[Tensor], Tensor]
    decode: Callable[[], Tensor]
    codes: Callable[[], Tensor]
    device: torch.device
    name: str


def choose(q: QuantizedWeight, scheme: Scheme, device: torch.device, dtype: torch.dtype) -> Kernel | None:
    """The kernel for inputs of this device and dtype, or None."""
    if device.type == "cpu" and dtype in (torch.float32, *HALVES):
        return on_cpu(q, scheme)
    if device.type == "cuda" and dtype in HALVES:
        try:
            return on_gpu(q, scheme, dtype)
        except (ValueError, ImportError):  # a shape or group the kernels refuse; Triton is not installed
            return None
    return None


def on_cpu(q: QuantizedWeight, scheme: Scheme) -> Kernel | None:
    """The compiled CPU kernels, or what torch has where there is no compiler."""
    spec = q.spec
    if spec.group_size != -1 and spec.group_size % GROUP:
        return None
    integers = spec.element == "int"
    scale_NG, factor = _small_scale(q)
    weight = pack_cpu(
        q.codes_NK, scale_NG, q.zero_NG,
        format=("int" if integers else "fp") + ("4" if spec.bits <= 4 else "8"),  # type: ignore[arg-type]
        group_size=spec.group_size, middle=spec.levels // 2 if integers else 0, factor=factor,
        rounding=q.scale_NG.dtype if is_rounded(scheme) else torch.float32,
    )  # fmt: skip
    inputs, run = scheme.activations, partial(cpu_linear, weight=weight)
    summed = inputs is not None and inputs.element == "int" and inputs.symmetric and inputs.group_size == -1
    if inputs is not None and summed and integers and inputs.bits <= 8:
        run = partial(_run_codes, weight, inputs, q.input)
    elif not is_rounded(scheme):
        if inputs is not None:
            run = partial(_run_rounded, partial(cpu_linear_by_row, weight=weight), inputs, q.input)
        run = partial(_run_wide, run, weight.exact and _fit_bf16(inputs, q.input))
    decode = partial(_decode_cpu, weight, q.scale_NG.dtype if is_rounded(scheme) else torch.float32)
    codes = partial(_cpu_codes, weight, spec.levels // 2 if integers else 0)
    return Kernel(run, decode, codes, torch.device("cpu"), f"cpu {weight.format}")


def _fit_bf16(spec: ActivationSpec | None, static: ActivationRange | None) -> bool:
    """Whether bfloat16 inputs still are ones when they are rounded: to 4 bits, times a scale that has 4 or none."""
    if spec is None or spec.scale_format == "e8m0":
        return True
    return spec.scale_format == "e4m3" and static is not None and math.frexp(static.scale.item())[0] == 0.5


def _run_codes(weight: CpuWeight, spec: ActivationSpec, static: ActivationRange | None, x: Tensor) -> Tensor:
    """int8 codes of x times those of the weight, summed exactly."""
    codes, scale = int_codes(x, spec, static)
    return cpu_linear_int8(codes.to(torch.int8), scale.expand(*x.shape[:-1], 1), weight, x.dtype)


def _run_rounded(
    product: Callable[[Tensor], Tensor], spec: ActivationSpec, static: ActivationRange | None, x: Tensor
) -> Tensor:
    """Inputs as an engine would round them, times the weight."""
    return product(fake_quantize(x, spec, static))


def _run_wide(product: Callable[[Tensor], Tensor], exact: bool, x: Tensor) -> Tensor:
    """In float32, which rounds neither the weight nor inputs that are code * scale; exact: bfloat16 does not either."""
    return product(x) if exact and x.dtype == torch.bfloat16 else product(x.float()).to(x.dtype)


def _decode_cpu(weight: CpuWeight, dtype: torch.dtype) -> Tensor:
    out = torch.empty(weight.out_features, weight.padded)
    return decode_rows(weight, 0, weight.out_features, out).to(dtype)


def _cpu_codes(weight: CpuWeight, middle: int) -> Tensor:
    """What pack_cpu was given; middle: of the codes' range, which packing may have shifted."""
    codes = weight.codes
    if weight.format in ("int4", "fp4"):
        codes = nibbles(codes)
    elif weight.format == "int8":
        codes = codes ^ 128
    return codes[:, : weight.in_features] - (weight.middle - middle)


def _small_scale(q: QuantizedWeight) -> tuple[Tensor, float]:
    """Scales in the fewest bytes that hold them exactly, and what multiplies all of them."""
    if q.spec.scale_format == "e8m0":
        small = q.scale_NG.to(torch.bfloat16)
        return (small, 1.0) if torch.equal(small.float(), q.scale_NG) else (q.scale_NG, 1.0)
    if q.spec.scale_format == "e4m3" and q.global_scale:
        small = (q.scale_NG / q.global_scale).to(torch.float8_e4m3fn)
        if torch.equal(small.float() * q.global_scale, q.scale_NG):
            return small, q.global_scale
    return q.scale_NG, 1.0


def on_gpu(q: QuantizedWeight, scheme: Scheme, dtype: torch.dtype) -> Kernel | None:
    """The Triton kernels; ValueError where they refuse a shape, ImportError where Triton is absent."""
    from quantkit_kernels.weight_only import decode_weight, linear

    if q.input is not None:  # once: a copy at every call would keep CUDA graphs from being captured
        q = replace(q, input=replace(q.input, scale=q.input.scale.to(q.codes_NK.device)))
    tensor_cores = _eight_bits(q, scheme, dtype)
    if tensor_cores is not None:
        return tensor_cores
    inputs = scheme.activations
    summed = inputs is not None and _sums_codes(inputs, q)
    if inputs is not None and not summed and not (q.spec.scale_format != "float" and _fit_bf16(inputs, q.input)):
        return None  # 16 bits would round inputs, or the weight
    packed = _pack(q, dtype, summed)
    if packed is None:
        return None
    run = partial(linear, "QuantLinear", weight=packed)
    if inputs is not None:
        run = partial(_run_sums if summed else _run_rounded, run, inputs, q.input)
    codes = partial(_triton_codes, packed, q.spec.levels // 2, q.zero_NG is None)
    return Kernel(run, partial(decode_weight, packed), codes, q.codes_NK.device, f"triton {packed.format}")


def _triton_codes(packed: Any, middle: int, symmetric: bool) -> Tensor:
    """The codes `_pack` was given."""
    from quantkit_kernels.layout import unpack_words

    codes = unpack_words(packed.words, packed.format, packed.in_features)
    if packed.format == "int4" and symmetric:
        return codes - (8 - middle)
    return (codes.view(torch.int8).to(torch.int16) + middle).to(torch.uint8) if packed.format == "int8" else codes


def _sums_codes(inputs: ActivationSpec, q: QuantizedWeight) -> bool:
    """Whether codes of both sides are whole numbers that can be summed, and one number scales an input."""
    whole = inputs.element == "int" and inputs.symmetric and inputs.group_size == -1 and inputs.bits <= 8
    return whole and q.spec.element == "int"


def _run_sums(
    product: Callable[[Tensor], Tensor], spec: ActivationSpec, static: ActivationRange | None, x: Tensor
) -> Tensor:
    """16 bits hold the codes of x exactly; sums come in float32."""
    codes, scale = int_codes(x, spec, static)
    return product(codes.to(x.dtype)).mul_(scale).to(x.dtype)


def _pack(q: QuantizedWeight, dtype: torch.dtype, sums: bool) -> Any:
    """A quantkit_kernels.layout.PackedWeight, or None for what the kernels do not know. sums: inputs are codes."""
    from quantkit_kernels.fp4 import pack_mxfp4, pack_nvfp4
    from quantkit_kernels.w4a16 import pack_w4a16
    from quantkit_kernels.w8a16 import pack_w8a16

    spec, codes_NK, group_size = q.spec, q.codes_NK, q.spec.group_size
    if spec.element == "int" and spec.bits <= 4:
        if q.zero_NG is None:  # the kernel's own zero point is 8
            codes_NK = codes_NK + (8 - spec.levels // 2)
        return pack_w4a16(codes_NK, q.scale_NG, q.zero_NG, group_size=group_size, dtype=dtype, sums=sums)
    if spec.element == "int" and q.zero_NG is None:
        elements = (codes_NK.to(torch.int16) - spec.levels // 2).to(torch.int8)
        return pack_w8a16(elements, q.scale_NG, group_size=group_size, dtype=dtype, sums=sums)
    if spec.element == "float" and spec.bits == 8 and spec.scale_format == "float":
        elements = codes_NK.view(torch.float8_e4m3fn)
        if spec.scale_rows == BLOCK:
            return pack_w8a16(elements, q.scale_NG[::BLOCK].contiguous(), block=True, dtype=dtype)
        return pack_w8a16(elements, q.scale_NG, group_size=group_size, dtype=dtype)
    if spec.element == "float" and spec.bits == 4 and spec.scale_format == "e4m3":
        scale_NG, factor = _small_scale(q)
        return pack_nvfp4(codes_NK, scale_NG, factor, dtype=dtype) if scale_NG.dtype.itemsize == 1 else None
    if spec.element == "float" and spec.bits == 4 and spec.scale_format == "e8m0":
        exponents = torch.frexp(q.scale_NG).exponent + 126
        return pack_mxfp4(codes_NK, exponents.to(torch.uint8), dtype=dtype)
    return None


def _eight_bits(q: QuantizedWeight, scheme: Scheme, dtype: torch.dtype) -> Kernel | None:
    """8-bit tensor cores, for inputs quantized by token, by 128 features of a token, or to one fp8 range."""
    from quantkit_kernels.quantize_activations import quantize_activations
    from quantkit_kernels.w8a8 import w8a8

    spec, inputs = q.spec, scheme.activations
    if (
        inputs is None
        or inputs.bits != 8
        or spec.bits != 8
        or inputs.element != spec.element
        or spec.scale_format != "float"
    ):
        return None
    if not inputs.symmetric or not spec.symmetric or inputs.scale_format != "float":
        return None
    block = spec.scale_rows == BLOCK
    if inputs.group_size != (BLOCK if block else -1) or (not block and spec.group_size != -1):
        return None
    if spec.element == "int":
        kind, elements = "int8", (q.codes_NK ^ 128).view(torch.int8)
    else:
        kind, elements = "fp8_block" if block else "fp8", q.codes_NK.view(torch.float8_e4m3fn)
    scale = q.scale_NG[::BLOCK].float().contiguous() if block else q.scale_NG[:, 0].float().contiguous()
    elements = elements.contiguous()
    quantize = partial(quantize_activations, element="int8" if kind == "int8" else "fp8", group=BLOCK if block else -1)
    run = partial(_run_eight, quantize, w8a8, elements, scale, kind, inputs, q.input)
    decode = partial(_decode_eight, elements, scale, block)
    codes = partial(_eight_codes, elements)
    return Kernel(run, decode, codes, q.codes_NK.device, f"triton w8a8 {kind}")


def _eight_codes(elements: Tensor) -> Tensor:
    codes = elements.view(torch.uint8)
    return codes ^ 128 if elements.dtype == torch.int8 else codes


def _run_eight(
    quantize: Callable[..., tuple[Tensor, Tensor]], product: Callable[..., Tensor],
    elements: Tensor, scale: Tensor, kind: str, spec: ActivationSpec, static: ActivationRange | None, x: Tensor,
) -> Tensor:  # fmt: skip
    x_MK = x.reshape(-1, x.shape[-1]).contiguous()
    if static is None:
        codes, x_scale = quantize(x_MK)
    else:
        one = static.scale.float()
        if kind == "int8":
            codes = int_codes(x_MK, spec, static)[0].to(torch.int8)
        else:
            codes = (x_MK.float() * one.reciprocal()).clamp_(-448, 448).to(torch.float8_e4m3fn)
        x_scale = one.reshape(1).expand(len(x_MK)).contiguous()
    y = product(codes, x_scale, elements, scale, kind, dtype=x.dtype)
    return y.reshape(*x.shape[:-1], len(elements))


def _decode_eight(elements: Tensor, scale: Tensor, block: bool) -> Tensor:
    (N, K), wide = elements.shape, scale
    if block:
        wide = scale.repeat_interleave(BLOCK, 0)[:N].repeat_interleave(BLOCK, 1)[:, :K]
    return elements.float() * (wide if block else wide[:, None])
