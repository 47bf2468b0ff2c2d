"""Inputs of linears, and cached keys and values, rounded as an engine rounds them while it runs.

A scale is shared by all inputs (static), by a token, or by `group_size` features of a token (dynamic). With a the
largest magnitude among the numbers that share it:

    int      q = round(x / s) clamped to -2^(b-1) .. 2^(b-1) - 1,  s = a / (2^(b-1) - 1)
    int asym q = round(x / s) + z clamped to 0 .. 2^b - 1,         s = (max - min) / (2^b - 1), z = round(-min / s)
    fp8      q = e4m3(x / s clamped to +-448),                     s = a / 448
    e4m3     q = e2m1(x / s clamped to +-6),                       s = global * e4m3(a / (6 * global))   (NVFP4)
    e8m0     q = element(x / s clamped),                           s = 2^(floor(log2 a) - emax), emax = 2 or 8   (MX)

Halves round to even. The arithmetic is that of vLLM's CUDA kernels down to where they multiply by 1 / s instead of
dividing, and to the least scales of their fp8: 1 / (448 * 512) for a token, 1e-10 / 448 for a group. Only the
approximate reciprocals of its NVFP4 kernel are exact quotients here.

Sources: the int8 and fp8 quantization kernels of vLLM; OCP Microscaling Formats (MX) v1.0 for e8m0.

compressed-tensors 0.20, which transformers runs, differs in what follows; its fp8 equals this:
    int       its s is a / (2^b / 2 - 0.5), e.g. a / 127.5, and z is added before rounding, which turns halves the other
              way where z is odd
    int asym  its range always contains 0, that of a vLLM kernel is that of the token itself
    e4m3      a group whose scale rounds to 0 gets a scale of 1/8 instead of being 0
    e8m0      its exponent is one larger where a is 1.75 or more times a power of two

Shapes: K = features, G = groups of a token (the last may be cut short), g = features of a group.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.cache_spec import CacheSpec
from quantkit.errors import RunError, UserError
from quantkit.grids.elements import EMAX, round_float_
from quantkit.grids.packed_scales import packed_codes, packed_values
from quantkit.types import FP4_MAX, FP8_MAX, ActivationRange, ActivationSpec, KVSpec

TINY = torch.finfo(torch.float32).tiny
FP8_LEAST = {"token": 1 / (FP8_MAX * 512), "group": 1e-10 / FP8_MAX}  # scales of (nearly) zero inputs


def fake_quantize(x: Tensor, spec: ActivationSpec, static: ActivationRange | None = None) -> Tensor:
    """x [..., K] (bf16, fp16 or fp32) rounded as `spec` says, in x's dtype; computed in float32.

    static  the calibrated range, where the spec has one; its scale may have any shape that broadcasts with x
    Tokens and groups of zeros stay zero.
    """
    assert (static is not None) == spec.calibrated, f"{spec} and {static}"
    K = x.shape[-1]
    wide = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)  # rounded in place below
    if spec.dynamic and spec.group_size != -1:
        wide = torch.nn.functional.pad(wide, (0, -K % spec.group_size)).unflatten(-1, (-1, spec.group_size))
        return _round(wide, spec, static).flatten(-2)[..., :K].to(x.dtype)
    return _round(wide, spec, static).to(x.dtype)


def int_codes(x: Tensor, spec: ActivationSpec, static: ActivationRange | None = None) -> tuple[Tensor, Tensor]:
    """Symmetric integer codes of x [..., K] as whole float32 numbers, and the scales they are multiplied by [..., 1].

    fake_quantize is their product. One scale for a token (dynamic), or for all (static).
    """
    assert spec.element == "int"
    assert spec.symmetric
    assert spec.group_size == -1
    assert (static is not None) == spec.calibrated, f"{spec} and {static}"
    wide = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
    scale = None if static is None else static.scale.to(x.device, wide.dtype)
    return _symmetric_codes(wide, spec.bits, scale)


def static_range(low: float, high: float, spec: ActivationSpec) -> ActivationRange:
    """The scale and zero point of inputs that are clipped to low .. high; RunError where these are not finite.

    Of "e4m3" activations the scale is the global one: the least power of two with which no group scale exceeds 448.
    Asymmetric ranges are widened to contain 0, which is then a code.
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        raise RunError(f"the inputs range from {low} to {high}: they overflowed during calibration")
    amax = max(abs(low), abs(high))
    if spec.element == "int" and not spec.symmetric:
        top = 2**spec.bits - 1
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / top if high > low else 1.0
        return ActivationRange(_scale(scale), min(round(-low / scale), top))
    if amax == 0:
        return ActivationRange(_scale(1.0))
    if spec.scale_format == "e4m3":
        fraction, exponent = math.frexp(amax / (FP4_MAX * FP8_MAX))
        return ActivationRange(_scale(2.0 ** (exponent - (fraction == 0.5))))
    return ActivationRange(_scale(amax / (spec.top if spec.element == "float" else 2 ** (spec.bits - 1) - 1)))


def _scale(value: float) -> Tensor:
    return torch.tensor(max(value, TINY), dtype=torch.float32)


def _round(x: Tensor, spec: ActivationSpec, static: ActivationRange | None) -> Tensor:
    """x (overwritten) with each row of its last dimension rounded; a dynamic scale is shared by one row."""
    scale = None if static is None else static.scale.to(x.device, x.dtype)
    if spec.element == "int":
        if spec.symmetric:
            return _round_symmetric(x, spec.bits, scale)
        return _round_asymmetric(x, spec.bits, scale, static.zero if static is not None else None)
    if spec.scale_format == "e8m0":
        scale = _power_of_two(x, spec.bits)
    elif spec.scale_format == "e4m3":
        assert scale is not None
        in_scales = x.abs().amax(-1, keepdim=True).div_(FP4_MAX).div_(scale)
        scale = round_float_(in_scales, 8).mul_(scale)
    elif scale is not None:
        return round_float_(x.mul_(scale.reciprocal()), spec.bits).mul_(scale)
    else:
        least = FP8_LEAST["token" if spec.group_size == -1 else "group"]
        scale = x.abs().amax(-1, keepdim=True).div_(spec.top).clamp_(min=least)
    steps = x.div_(torch.where(scale == 0, torch.inf, scale))  # a group scale that rounds to zero makes its group zero
    return round_float_(steps, spec.bits).mul_(scale)


def _round_symmetric(x: Tensor, bits: int, static: Tensor | None) -> Tensor:
    codes, scale = _symmetric_codes(x, bits, static)
    return codes.mul_(scale)


def _symmetric_codes(x: Tensor, bits: int, static: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes in x's memory, and their scale: the static one, or [..., 1] of each row."""
    top = 2 ** (bits - 1) - 1
    if static is not None:
        return x.div_(static).round_().clamp_(-top - 1, top), static
    amax = x.abs().amax(-1, keepdim=True)
    scale = amax / top
    inverse = (top / amax).masked_fill_(scale < TINY, 0)  # zero, or so small that its reciprocal is infinite
    return x.mul_(inverse).round_().clamp_(-top - 1, top), scale


def _round_asymmetric(x: Tensor, bits: int, static: Tensor | None, zero: int | None) -> Tensor:
    top = 2**bits - 1
    if static is not None:
        assert zero is not None
        return x.mul_(static.reciprocal()).round_().add_(zero).clamp_(0, top).sub_(zero).mul_(static)
    low, high = x.aminmax(dim=-1, keepdim=True)
    flat = (high - low) / top < TINY  # a range of one number would have the scale 0: reach for zero
    low, high = torch.where(flat, low.clamp(max=0), low), torch.where(flat, high.clamp(min=0), high)
    scale = ((high - low) / top).clamp_(min=TINY)
    shift = (-low / scale).round_()
    return x.mul_(scale.reciprocal()).round_().add_(shift).clamp_(0, top).sub_(shift).mul_(scale)


def _power_of_two(x: Tensor, bits: int) -> Tensor:
    """The e8m0 scale of each row: 2^(floor(log2 amax) - emax) with the exponent held to -127 .. 127."""
    exponent = torch.frexp(x.abs().amax(-1, keepdim=True)).exponent - 1 - EMAX[bits]
    return torch.ldexp(torch.ones_like(exponent, dtype=x.dtype), exponent.clamp_(-127, 127))


class KVRange(NamedTuple):
    """What calibration found for a layer's keys and for its values, as `quantize_kv` takes it; None: they need none."""

    k_scale: Tensor | None
    v_scale: Tensor | None


UNCALIBRATED = KVRange(None, None)


def stored_scale(tensor: Tensor) -> Tensor:
    """A scale of cached keys or values as `quantize_kv` takes it, from its tensor in a checkpoint of any shape."""
    channels = tensor.dim() == 3 and tensor.shape[-1] > 1  # [H, 1, 1] are those of heads
    return tensor.float() if channels else tensor.float().reshape(-1).squeeze()


def quantize_kv(x_BHTD: Tensor, spec: KVSpec, scale: Tensor | None = None) -> Tensor:
    """Keys or values [B, H, T, D] rounded as `spec` says, in their dtype.

    scale  where the spec is calibrated, float32: [] or [H], static scales; [2, H, D], offsets and scales of channels.
           UserError where H is not the number of heads or D not that of features
    """
    assert (scale is not None) == spec.calibrated, f"{spec} and {scale}"
    if scale is not None:
        _check_scale(scale, x_BHTD)
    if spec.channels:
        assert scale is not None
        wide_BHTD = x_BHTD.to(torch.promote_types(x_BHTD.dtype, torch.float32))
        offset_HTD, scale_HTD = scale.to(wide_BHTD.device, wide_BHTD.dtype)[:, :, None]
        rounded_BHTD = quantize_kv((wide_BHTD - offset_HTD) / scale_HTD, replace(spec, channels=False))
        return (rounded_BHTD * scale_HTD + offset_HTD).to(x_BHTD.dtype)
    if spec.packed:
        return packed_values(*packed_codes(x_BHTD, spec), spec).to(x_BHTD.dtype)
    if spec.per == "token":
        return fake_quantize(x_BHTD, ActivationSpec(spec.bits, spec.group_size, spec.symmetric, spec.element))
    assert scale is not None
    if scale.dim():
        scale = scale[:, None, None]
    if spec.element == "float":
        wide_BHTD = x_BHTD.to(torch.promote_types(x_BHTD.dtype, torch.float32))
        scale = scale.to(wide_BHTD.device, wide_BHTD.dtype)
        return round_float_(wide_BHTD / scale, spec.bits).mul_(scale).to(x_BHTD.dtype)
    return fake_quantize(x_BHTD, _static(spec), ActivationRange(scale))


def _check_scale(scale: Tensor, x_BHTD: Tensor) -> None:
    """UserError unless `scale`, of a whole tensor, of heads or of channels, is for as many heads and features."""
    H, D = x_BHTD.shape[1], x_BHTD.shape[-1]
    heads = scale.shape[-2] if scale.dim() == 3 else scale.shape[0] if scale.dim() else H
    if heads != H:
        raise UserError(f"{heads} scales of cached keys or values for {H} heads: they are another model's")
    if scale.dim() == 3 and scale.shape[-1] != D:
        raise UserError(f"{scale.shape[-1]} scales of cached features for heads of {D}: they are another model's")


def quantize_cache(
    keys_BHTD: Tensor, values_BHTD: Tensor, spec: CacheSpec, found: KVRange = UNCALIBRATED
) -> tuple[Tensor, Tensor]:
    """Keys and values, each rounded as its side of `spec` says; found: what calibration found for them."""
    keys, values = (
        x if side is None else quantize_kv(x, side, scale)
        for x, side, scale in zip((keys_BHTD, values_BHTD), (spec.keys, spec.values), found, strict=True)
    )
    return keys, values


def _static(spec: KVSpec) -> ActivationSpec:
    return ActivationSpec(spec.bits, element=spec.element, dynamic=False)
