"""A quantized weight as the CPU kernels read it: rows of chunks of 64 columns, decoded in registers.

Four-bit codes: byte j of a chunk's 32 holds column j in its low half and column 32 + j in its high half, so that a
vector of bytes is two vectors of neighbouring columns. Eight-bit integers lie as two's complement of code - 128. Rows
are padded to whole chunks, whose columns meet zeros.

The definition, which every product keeps for any number of tokens, on any processor, compiled or not:

    x is float    y = x W^T with W = (code - zero) * scale, rounded to `rounding` (the dtype of the checkpoint's
                  scales), then to x's dtype; sums in float32
    x is int8     y = x_scale * sum over groups of scale * (exact sum of x * (code - zero)); W is never rounded

`reference_weight` is W in float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from torch import Tensor

from quantkit_kernels.checks import check, check_same_device, check_tensor
from quantkit_kernels.cpu.build import FORMATS, SCALES, address, library

Format = Literal["int4", "int8", "fp8", "fp4", "bf16", "fp16", "fp32"]
CHUNK = 64
DENSE = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
BYTES = {"int4": 32, "int8": 64, "fp8": 64, "fp4": 32, "bf16": 128, "fp16": 128, "fp32": 256}  # of a chunk
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
GROUP = 16  # group sizes are multiples of it
THREAD_BYTES = 1 << 16  # of codes times tokens: less is done before another thread has begun


@dataclass(slots=True)
class CpuWeight:
    """A weight [N, K].

    codes       uint8 [N, bytes of a row]
    scale       [N, G] bfloat16, float16, float32 or float8 e4m3
    zero        uint8 [N, G], or None: `middle` is every zero point (0 for floats)
    factor      multiplies all scales
    group_size  columns that share a scale; all of a row's (K rounded up to chunks) where G is 1
    rounding    what the weight is rounded to before x's dtype: float32 (not at all), bfloat16 or float16
    exact       no product of a code and its scale needs more than bfloat16's 8 bits: W is its own rounding
    kept        what torch's own operators made of it and keep, by operator (see `linear`)
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    middle: int
    factor: float
    format: Format
    in_features: int
    group_size: int
    rounding: torch.dtype
    exact: bool = False
    kept: dict[str, Tensor] = field(default_factory=dict)

    @property
    def out_features(self) -> int:
        """N."""
        return self.codes.shape[0]

    @property
    def padded(self) -> int:
        """K rounded up to whole chunks."""
        return self.codes.shape[1] // BYTES[self.format] * CHUNK

    @property
    def nbytes(self) -> int:
        """Of codes, scales and zero points."""
        return self.codes.nbytes + self.scale.nbytes + (0 if self.zero is None else self.zero.nbytes)

    def __reduce__(self) -> tuple:
        """A copy keeps nothing: it is made again when it is needed, and oneDNN's tensors cannot be copied."""
        return CpuWeight, tuple(getattr(self, each.name) for each in fields(self) if each.name != "kept")

    def rounds(self, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
        """What W is rounded to, one after the other, for inputs of this dtype; nothing where that changes nothing."""
        if self.exact or self.rounding == dtype == torch.float32:
            return ()
        steps = dict.fromkeys((self.rounding, dtype))
        return tuple(step for step in steps if step != torch.float32)

    def head(self, tokens: int, rounds: Sequence[torch.dtype] = ()) -> tuple:
        """The arguments that every compiled function begins with; valid while this weight lives."""
        first, second = [*map(SCALES.__getitem__, rounds), 0, 0][:2]
        threads = min(torch.get_num_threads(), 1 + tokens * self.codes.numel() // THREAD_BYTES)
        return (
            FORMATS[self.format], address(self.codes), address(self.scale), SCALES[self.scale.dtype],
            address(self.zero), self.middle, first, second, self.factor, self.out_features, self.padded,
            self.group_size, threads,
        )  # fmt: skip


def pack_cpu(
    codes_NK: Tensor,
    scale_NG: Tensor,
    zero_NG: Tensor | None = None,
    *,
    format: Format,
    group_size: int,
    middle: int | None = None,
    factor: float = 1.0,
    rounding: torch.dtype = torch.float32,
) -> CpuWeight:
    """Repack plain codes once, at load.

    codes_NK    uint8 [N, K]: integers from 0, or the bit patterns of e4m3 / e2m1 numbers that are no NaN
    scale_NG    bfloat16, float16, float32, or float8 e4m3; kept as it is
    zero_NG     uint8 [N, G] for integers, None where all are `middle`
    middle      of the codes' range: 8 or 128 unless given
    rounding    what the weight is rounded to, usually the dtype its scales have in the checkpoint
    group_size  a multiple of 16 that divides K, or -1 (channel); the last group of fp8 may be cut short
    ValueError where shapes, dtypes or the group size are not supported.
    """
    name = f"{format} weight"
    check(format in BYTES and format not in DENSE.values(), f"{name}: pack_cpu takes int4, int8, fp8 or fp4")
    check_tensor(f"{name} codes", codes_NK, (torch.uint8,), (None, None))
    N, K = codes_NK.shape
    check(N > 0 and K > 0, f"{name} of shape {N}x{K} is empty")
    channel = group_size in (-1, K) and scale_NG.shape[1:] == (1,)
    check(
        channel or (group_size > 0 and group_size % GROUP == 0),
        f"{name}: group size {group_size}; supported: multiples of {GROUP} and -1 (channel)",
    )
    whole = channel or K % group_size == 0 or format == "fp8"  # blocks may be cut short
    check(whole, f"{name} of shape {N}x{K}: {group_size=} does not divide {K}")
    G = 1 if channel else -(-K // group_size)
    check_tensor(f"{name} scale", scale_NG, tuple(SCALES), (N, G))
    integers = format in ("int4", "int8")
    check(integers or (zero_NG is None and not middle), f"{name}: floats have no zero points")
    if zero_NG is not None:
        check_tensor(f"{name} zero", zero_NG, (torch.uint8,), (N, G))
    check(rounding in DENSE, f"{name}: weights cannot be rounded to {rounding}")
    check_same_device(codes=codes_NK, scale=scale_NG, zero=zero_NG)
    check(codes_NK.device.type == "cpu", f"{name} is on {codes_NK.device}: these kernels read the CPU's memory")
    four = BYTES[format] == 32
    most = max(int(t.max()) for t in (codes_NK, zero_NG) if t is not None)
    check(not four or most < 16, f"{name} of shape {N}x{K}: codes and zero points are up to 15, got {most}")
    if middle is None:
        middle = {"int4": 8, "int8": 128}.get(format, 0)

    if format == "int8" and middle < 128 and most + 128 - middle < 256:
        # few bits: centered where 8 bits are, or sums would be differences of large numbers
        codes_NK, zero_NG = codes_NK + (128 - middle), None if zero_NG is None else zero_NG + (128 - middle)
        middle = 128
    codes = torch.nn.functional.pad(codes_NK, (0, -K % CHUNK))
    padded = codes.shape[1]
    if four:
        low, high = codes.view(N, -1, 2, 32).unbind(2)
        codes = low | (high << 4)
    elif format == "int8":
        codes = codes ^ 128
    if not channel:  # a group for every column that padding added
        more = -(-padded // group_size) - G
        raw = scale_NG.view(torch.uint8).view(N, G, -1)  # torch cannot pad float8
        scale_NG = torch.nn.functional.pad(raw, (0, 0, 0, more)).view(N, -1).view(scale_NG.dtype)
        zero_NG = None if zero_NG is None else torch.nn.functional.pad(zero_NG, (0, more))
    return CpuWeight(
        codes.reshape(N, -1), scale_NG.contiguous(), zero_NG, middle, factor, format, K,
        padded if channel else group_size, rounding, _is_exact(scale_NG, factor, format),
    )  # fmt: skip


def _is_exact(scale_NG: Tensor, factor: float, format: Format) -> bool:
    """Whether 8 bits hold every code times its scale; codes have 8 (int8) or 4, scales 4 or none (powers of two)."""
    if math.frexp(factor)[0] != 0.5:
        return False
    if scale_NG.dtype == torch.float8_e4m3fn:
        return format != "int8"
    fraction = torch.frexp(scale_NG.float()).mantissa.abs()
    return bool(((fraction == 0.5) | (fraction == 0)).all())


def dense_cpu(w_NK: Tensor) -> CpuWeight:
    """A weight that is not quantized (bfloat16, float16 or float32 [N, K]), read where it lies if K is whole chunks."""
    check_tensor("dense weight", w_NK, tuple(DENSE), (None, None))
    N, K = w_NK.shape
    check(N > 0 and K > 0, f"dense weight of shape {N}x{K} is empty")
    padded_NK = torch.nn.functional.pad(w_NK, (0, -K % CHUNK)) if K % CHUNK else w_NK
    format, padded = DENSE[w_NK.dtype], padded_NK.shape[1]
    codes, exact = padded_NK.view(torch.uint8), format == "bf16"
    return CpuWeight(codes, torch.ones(N, 1), None, 0, 1.0, format, K, padded, torch.float32, exact)  # type: ignore


def decode_rows(
    weight: CpuWeight, begin: int, end: int, out: Tensor, rounds: Sequence[torch.dtype] | None = None
) -> Tensor:
    """Rows begin:end as float32 or bfloat16 into out [end - begin, padded]; returned without the padding.

    rounds  what they are rounded to, one after the other, at most two; None: `rounding`
    """
    rounds, lib = weight.rounds(torch.float32) if rounds is None else rounds, library()
    if lib is not None:
        lib.quantkit_decode(*weight.head(1 << 20, rounds), begin, end, address(out), int(out.dtype == torch.bfloat16))
    else:
        out.copy_(_decode_rows(weight, begin, end, rounds))
    return out[:, : weight.in_features]


def nibbles(codes: Tensor) -> Tensor:
    """The four-bit codes of rows of chunks, uint8 [rows, padded]."""
    chunks = codes.view(len(codes), -1, 1, 32)
    return torch.cat([chunks & 15, chunks >> 4], 2).view(len(codes), -1)


def reference_weight(weight: CpuWeight, dtype: torch.dtype | None = None) -> Tensor:
    """W in float64 [N, K], as inputs of this dtype meet it; None: as int8 inputs do, not rounded."""
    rows = slice(0, weight.out_features)
    w_NK = _values(weight, rows, torch.float64).mul_(_scales(weight, rows, torch.float64))[:, : weight.in_features]
    for rounding in () if dtype is None else weight.rounds(dtype):
        w_NK = w_NK.float().to(rounding).double()
    return w_NK


def _decode_rows(weight: CpuWeight, begin: int, end: int, rounds: Sequence[torch.dtype]) -> Tensor:
    """By torch's operators: [rows, padded] float32, or what was rounded to last."""
    rows = slice(begin, end)
    values = _values(weight, rows, torch.float32).mul_(_scales(weight, rows, torch.float32))
    for rounding in rounds:
        values = values.to(rounding)
    return values


def _values(weight: CpuWeight, rows: slice, dtype: torch.dtype) -> Tensor:
    """code - zero, [rows, padded]."""
    codes = weight.codes[rows]
    if weight.format in DENSE.values():
        return codes.view(next(d for d, name in DENSE.items() if name == weight.format)).to(dtype)
    if weight.format == "fp8":
        bits = (codes.view(torch.int8).to(torch.int16) << 7).bitwise_and_(-0x4001)
        return bits.view(torch.float16).to(dtype).mul_(256)  # e4m3's bits in float16's places
    codes = nibbles(codes) if BYTES[weight.format] == 32 else codes ^ 128
    if weight.format == "fp4":
        return torch.tensor(E2M1, dtype=dtype)[codes.int()]
    zero = weight.middle if weight.zero is None else _spread(weight.zero[rows].to(dtype), weight)
    return codes.to(dtype).sub_(zero)


def _scales(weight: CpuWeight, rows: slice, dtype: torch.dtype) -> Tensor:
    return _spread(weight.scale[rows].to(dtype).mul_(weight.factor), weight)


def _spread(values: Tensor, weight: CpuWeight) -> Tensor:
    """[rows, G] -> [rows, padded] or [rows, 1]."""
    return values if values.shape[1] == 1 else values.repeat_interleave(weight.group_size, 1)[:, : weight.padded]
