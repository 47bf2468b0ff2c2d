"""Codes of other formats as the blocks of a GGUF type, unchanged: what stands in a folder stands in the file.

    int4, groups of 32, symmetric   Q4_0   d (code - 8)        d is the group's scale, exactly
    int8, groups of 32, symmetric   Q8_0   d (code - 128)      as signed bytes
    MXFP4                           MXFP4  2^(e - 127) e2m1    e is the exponent as OCP's format has it
    NVFP4                           NVFP4  e4m3 e2m1           the global scales lie in tensors of their own

Shapes: N = out features, K = in features, G = groups of a row.
"""

import torch
from torch import Tensor

from quantkit.errors import UserError
from quantkit.types import QuantizedWeight, TensorSpec

HALF_BLOCK = {"Q4_0": 16, "MXFP4": 16, "NVFP4": 8}  # nibbles: elements i and i + half share a byte


def carried_type(spec: TensorSpec) -> str | None:
    """The GGUF type that holds a weight format's codes and scales as they are; None where there is none."""
    if spec.element == "int" and spec.symmetric and spec.group_size == 32 and spec.scale_format == "float":
        return {4: "Q4_0", 8: "Q8_0"}.get(spec.bits)
    if spec.element == "float" and spec.bits == 4:
        return {("e8m0", 32): "MXFP4", ("e4m3", 16): "NVFP4"}.get((spec.scale_format, spec.group_size))
    return None


def carried_bytes(q: QuantizedWeight) -> Tensor:
    """uint8 [N, bytes of a row]: the blocks of `carried_type(q.spec)`, with q's codes and scales.

    A group of zeros alone has no scale to keep. UserError where a scale is no number that a block can hold: how many,
    and one of them. NVFP4's global scale is not in the blocks; its rows are multiples of 64 columns.
    """
    type_ = carried_type(q.spec)
    assert type_ is not None, f"{q.spec} has no GGUF type"
    (N, K), G = q.codes_NK.shape, q.scale_NG.shape[1]
    if type_ == "Q8_0":
        codes = q.codes_NK.bitwise_xor(0x80).reshape(N, G, 32)
    else:
        half = HALF_BLOCK[type_]
        codes_NBch = q.codes_NK.reshape(N, K // (2 * half), 2, half)
        codes = codes_NBch[:, :, 0] | codes_NBch[:, :, 1] << 4
    scales = {"Q4_0": _halves, "Q8_0": _halves, "MXFP4": _exponents, "NVFP4": _e4m3}[type_](q)
    if type_ == "NVFP4":  # four scales, then the four groups they are for
        scales, codes = scales.reshape(N, G // 4, 4), codes.reshape(N, G // 4, 32)
    return torch.cat([scales, codes], dim=2).reshape(N, -1)


def _halves(q: QuantizedWeight) -> Tensor:
    """The scales as bytes of float16 [N, G, 2]."""
    idle_NG = (q.codes_NK == q.spec.levels // 2).reshape(*q.scale_NG.shape, -1).all(-1)
    d_NG = q.scale_NG.masked_fill(idle_NG, 0).half()
    _refuse(q.scale_NG, (d_NG.float() != q.scale_NG.float()) & ~idle_NG, "float16")
    return d_NG[..., None].view(torch.uint8)


def _exponents(q: QuantizedWeight) -> Tensor:
    """The scales' exponents as bytes [N, G, 1]."""
    mantissa_NG, exponent_NG = torch.frexp(q.scale_NG.float())
    biased_NG = exponent_NG + 126
    _refuse(q.scale_NG, (mantissa_NG != 0.5) | (biased_NG < 0) | (biased_NG > 254), "powers of two")
    return biased_NG.to(torch.uint8)[..., None]


def _e4m3(q: QuantizedWeight) -> Tensor:
    """The group scales under the global one, as bytes [N, G, 1]."""
    assert q.global_scale is not None, "e4m3 scales have a global one"
    whole = torch.tensor(q.global_scale, dtype=torch.float32)
    scale_NG = (q.scale_NG.float() / whole).to(torch.float8_e4m3fn)
    changed_NG = (scale_NG.float() * whole != q.scale_NG.float()) | (q.scale_NG < 0)
    _refuse(q.scale_NG, changed_NG, "non-negative e4m3 numbers times the global scale")
    return (scale_NG.view(torch.uint8) & 127)[..., None]


def _refuse(scale_NG: Tensor, changed_NG: Tensor, kind: str) -> None:
    if count := int(changed_NG.sum()):
        first = float(scale_NG[changed_NG][0])
        raise UserError(f"{count} of {scale_NG.numel()} scales are not exact as {kind} (one is {first:.9g})")
