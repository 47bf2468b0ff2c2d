"""The bytes of GGUF's blocks: packed from codes and scales, and read back.

A block is its fields one after the other. A field takes some bits of small unsigned numbers (the codes of the block,
or the integers of its sub-blocks) and lays them into bytes so that numbers `width` apart share a byte, the first in
its lowest bits; only Q4_K's and Q5_K's twelve bytes of 6-bit integers follow no such rule. Source of every layout: the
structs in ggml-common.h of llama.cpp.

Shapes: N = rows, K = columns, G = blocks of a row, S = sub-blocks of a row, M = N * G blocks, P = numbers of a field.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import RunError, UserError
from quantkit.ggml_types import GGML_TYPES
from quantkit.grids.block_types import BLOCK_TYPES, BlockType
from quantkit.grids.dequantize import dequantize
from quantkit.types import BlockScales, QuantizedWeight, TensorSpec, block_spec

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ROWS_AT_ONCE = 1 << 20  # weights decoded at a time: what this takes beside the result stays small


@dataclass(frozen=True, slots=True)
class Field:
    """`bits` from bit `shift` on of every number of `source`, numbers `width` apart in one byte; flip: exclusive or.

    source  "d" and "offset": float16 ("-offset": with the other sign); "codes"; "scale": the integers of sub-blocks,
            counted from the least; "scale+offset": those of the scales, then those of the offsets; "six": both, 6 bits
    """

    source: str
    bits: int = 8
    width: int = 1
    shift: int = 0
    flip: int = 0


_D, _DMIN, _M, _SIX = Field("d"), Field("offset"), Field("-offset"), Field("six")
_NIBBLES, _K_NIBBLES, _FIFTH = Field("codes", 4, 16), Field("codes", 4, 32), Field("codes", 1, 1, shift=4)
LAYOUTS: dict[str, tuple[Field, ...]] = {
    "Q4_0": (_D, _NIBBLES),
    "Q4_1": (_D, _M, _NIBBLES),
    "Q5_0": (_D, _FIFTH, _NIBBLES),
    "Q5_1": (_D, _M, _FIFTH, _NIBBLES),
    "Q8_0": (_D, Field("codes", flip=128)),  # as int8
    "Q2_K": (Field("scale+offset", 4, 16), Field("codes", 2, 32), _D, _DMIN),
    "Q3_K": (
        Field("codes", 1, 32, shift=2),
        Field("codes", 2, 32),
        Field("scale", 4, 8),
        Field("scale", 2, 4, shift=4),
        _D,
    ),
    "Q4_K": (_D, _DMIN, _SIX, _K_NIBBLES),
    "Q5_K": (_D, _DMIN, _SIX, Field("codes", 1, 32, shift=4), _K_NIBBLES),
    "Q6_K": (Field("codes", 4, 64), Field("codes", 2, 32, shift=4), Field("scale", flip=128), _D),
    "IQ4_NL": (_D, _NIBBLES),
    "IQ4_XS": (_D, Field("scale", 2, 1, shift=4), Field("scale", 4, 1), _NIBBLES),
}


def merged(numbers_MP: Tensor, field: Field) -> Tensor:
    """The bytes (uint8) of a field, [M, P * bits / 8], of numbers (uint8) [M, P]."""
    M, P = numbers_MP.shape
    parts = 8 // field.bits
    if parts == 1:
        return numbers_MP ^ field.flip
    kept = (numbers_MP >> field.shift) & ((1 << field.bits) - 1)
    kept = kept.reshape(M, P // (parts * field.width), parts, field.width)
    result = kept[:, :, 0].clone()
    for i in range(1, parts):
        result |= kept[:, :, i] << (i * field.bits)
    return result.reshape(M, -1)


def separated(bytes_MB: Tensor, field: Field) -> Tensor:
    """The inverse of `merged`: uint8 [M, P], zeros where the field has no bits."""
    if field.bits == 8:
        return bytes_MB ^ field.flip
    M, parts = len(bytes_MB), 8 // field.bits
    grouped = bytes_MB.reshape(M, -1, 1, field.width)
    shifts = torch.arange(parts, dtype=torch.uint8, device=grouped.device)[:, None] * field.bits
    return (((grouped >> shifts) & ((1 << field.bits) - 1)) << field.shift).reshape(M, -1)


def pack(q: QuantizedWeight) -> Tensor:
    """The bytes (uint8) [N, row bytes] of a weight of a GGUF type; RunError where a scale is NaN or Inf."""
    assert q.blocks is not None
    name, (N, G) = q.spec.block_type, q.scale_NG.shape
    type_ = BLOCK_TYPES[name]
    if not torch.isfinite(q.scale_NG.sum() + q.blocks.offset_NG.sum()):
        raise RunError(f"a {name} block's scale is NaN or Inf: the weight holds NaN or Inf")
    parts = []
    for field in LAYOUTS[name]:
        if field.source == "d":
            parts.append(_half_bytes(q.scale_NG.reshape(-1, 1)))
        elif field.source.endswith("offset") and "scale" not in field.source:
            sign = -1 if field.source == "-offset" else 1
            parts.append(_half_bytes(q.blocks.offset_NG.reshape(-1, 1) * sign))
        elif field.source == "codes":
            parts.append(merged(q.codes_NK.reshape(N * G, -1), field))
        else:
            scale_MP = (q.blocks.sub_scale_NS.reshape(N * G, -1) - type_.sub_scale[0]).to(torch.uint8)
            offset_MP = q.blocks.sub_offset_NS.reshape(N * G, -1).to(torch.uint8)
            if field.source == "six":
                parts.append(_six_bits(scale_MP, offset_MP))
            else:
                both = field.source == "scale+offset"
                parts.append(merged(torch.cat([scale_MP, offset_MP], 1) if both else scale_MP, field))
    return torch.cat(parts, 1).reshape(N, -1)


def unpack(data: Tensor, spec: TensorSpec, K: int) -> QuantizedWeight:
    """The weight [N, K] whose bytes (uint8) [N, row bytes] `pack` made; scales are float32."""
    name, N, S = spec.block_type, len(data), BLOCK_TYPES[spec.block_type].columns // BLOCK_TYPES[spec.block_type].span
    type_, G = BLOCK_TYPES[name], spec.groups(K)
    bytes_MB = data.reshape(N * G, GGML_TYPES[name].nbytes)
    codes_MP = torch.zeros(N * G, type_.columns, dtype=torch.uint8, device=data.device)
    scale_MS = torch.zeros(N * G, S, dtype=torch.uint8, device=data.device)
    d_M1, offset_M1 = (torch.zeros(N * G, 1, device=data.device) for _ in range(2))
    offset_MS, start = torch.ones_like(scale_MS), 0
    for field in LAYOUTS[name]:
        stop = start + _size(field, type_)
        part = bytes_MB[:, start:stop].contiguous()
        start = stop
        if field.source == "d":
            d_M1 = part.view(torch.float16).float()
        elif field.source in ("offset", "-offset"):
            offset_M1 = part.view(torch.float16).float() * (-1 if field.source == "-offset" else 1)
        elif field.source == "codes":
            codes_MP |= separated(part, field)
        elif field.source == "scale":
            scale_MS |= separated(part, field)
        elif field.source == "six":
            scale_MS, offset_MS = _from_six_bits(part)
        else:
            scale_MS, offset_MS = separated(part, field).split(S, 1)
    scale_MS = scale_MS.float() + type_.sub_scale[0]
    blocks = BlockScales(offset_M1.reshape(N, G), scale_MS.reshape(N, -1), offset_MS.float().reshape(N, -1))
    return QuantizedWeight(codes_MP.reshape(N, K), d_M1.reshape(N, G), None, spec, blocks=blocks)


def _size(field: Field, type_: BlockType) -> int:
    """Bytes of a field."""
    sub_blocks = type_.columns // type_.span
    if field.source in ("d", "offset", "-offset"):
        return 2
    numbers = {"codes": type_.columns, "scale": sub_blocks, "scale+offset": 2 * sub_blocks, "six": 12}[field.source]
    return numbers * field.bits // 8


def _half_bytes(t_M1: Tensor) -> Tensor:
    return t_M1.half().contiguous().view(torch.uint8)


def _six_bits(scale_M8: Tensor, offset_M8: Tensor) -> Tensor:
    """Twelve bytes: the first four scales, the first four offsets, the low halves of the others.

    The upper two bits of the others are in the upper two bits of the first eight.
    """
    first = [t[:, :4] | (t[:, 4:] >> 4 << 6) for t in (scale_M8, offset_M8)]
    return torch.cat([*first, (scale_M8[:, 4:] & 15) | (offset_M8[:, 4:] << 4)], 1)


def _from_six_bits(bytes_MB: Tensor) -> tuple[Tensor, Tensor]:
    scale, offset, low = bytes_MB.split(4, 1)
    scale_M8 = torch.cat([scale & 63, (low & 15) | (scale >> 6 << 4)], 1)
    return scale_M8, torch.cat([offset & 63, (low >> 4) | (offset >> 6 << 4)], 1)


# ---- floats, and types that are only read here


_TWICE_FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # e2m1 by its bits, doubled


def _e4m3_halves() -> list[float]:
    """Half of each scale of NVFP4 by its byte: e4m3 without its sign, where 127 counts as zero."""
    values = []
    for byte in range(256):
        exponent, fraction = (byte >> 3) & 15, byte & 7
        value = (1 + fraction / 8) * 2.0 ** (exponent - 7) if exponent else fraction * 2.0**-9
        values.append(0.0 if byte in (0, 127) else value / 2)
    return values


def float_bytes(w: Tensor, type_name: str) -> Tensor:
    """The bytes (uint8) of a tensor as F32, F16 or BF16, its last dimension in bytes.

    RunError where a number is beyond the range of F16.
    """
    stored = w.to(FLOATS[type_name])
    if type_name == "F16" and not torch.isfinite(stored.sum(dtype=torch.float32)) and torch.isfinite(w).all():
        raise RunError(f"{w.abs().max().item():g} is beyond the range of F16 (65504)\nhint: use BF16 or F32 instead")
    return stored.contiguous().view(torch.uint8)


def dequantize_bytes(data: Tensor, type_name: str, shape: Sequence[int]) -> Tensor:
    """The float32 tensor of this shape whose bytes (uint8, contiguous) these are; rows are its last dimension."""
    K = shape[-1]
    if type_name in FLOATS:
        return data.reshape(-1).view(FLOATS[type_name]).float().reshape(tuple(shape))
    type_ = GGML_TYPES[type_name]
    rows_NB = data.reshape(-1, type_.row_bytes(K))
    result_NK = torch.empty(len(rows_NB), K, device=data.device)
    step = max(1, ROWS_AT_ONCE // K)
    for start in range(0, len(rows_NB), step):
        part = rows_NB[start : start + step]
        result_NK[start : start + step] = _decoded(part, type_name, K)
    return result_NK.reshape(tuple(shape))


def _decoded(rows_NB: Tensor, type_name: str, K: int) -> Tensor:
    if type_name in BLOCK_TYPES:
        return dequantize(unpack(rows_NB, block_spec(type_name), K))
    if type_name == "MXFP4":
        scales, width = [2.0 ** (byte - 128) for byte in range(256)], 16
    elif type_name == "NVFP4":
        scales, width = _e4m3_halves(), 8
    else:
        raise UserError(f"tensors of the type {type_name} are not read")
    type_ = GGML_TYPES[type_name]
    bytes_MB = rows_NB.reshape(-1, type_.nbytes)
    count = type_.nbytes - type_.columns // 2  # scales come first
    scale_MS = torch.tensor(scales, device=rows_NB.device)[bytes_MB[:, :count].int()]
    codes_MP = separated(bytes_MB[:, count:].contiguous(), Field("codes", 4, width))
    twice_MP = torch.tensor(_TWICE_FP4, dtype=torch.float32, device=rows_NB.device)[codes_MP.int()]
    return (twice_MP.reshape(len(bytes_MB), count, -1) * scale_MS[..., None]).reshape(len(rows_NB), K)
