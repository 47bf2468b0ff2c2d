"""y = x W^T on a CPU: for each product the fastest of the ways this machine has. All compute the same W (see `weight`).

    few tokens    `gemv`: weights decoded in registers, float32 sums. With int8 activations `gemv_int8`: exact int32
                  sums of codes, one dpbusd (VNNI) or maddubs (AVX2) for 32 weights
    bfloat16      `tiles`: where the processor has AMX, weights decoded to bfloat16 in the first-level cache, for any
                  number of tokens; a token's sums do not depend on the others
    more          `panel`: rows are decoded into a few MB that stay in the cache, and multiplied by torch
                  `qlinear`: oneDNN's u8 x s8 product, where VNNI makes it exact

Without a compiler (see `build`) torch's own operators serve: a `panel` decoded by torch, or `kept`: where the machine
multiplies bfloat16 fast, the weight is decoded once to bfloat16 and kept, at that much memory.

torch's weight-only products of int4 and int8 are not used: they multiply by codes and scales, which is another weight
than the checkpoint's rounded one.

Measured traps this avoids: oneDNN's qlinear with signed
activations (a reference kernel) or without VNNI (pairs of products saturate: wrong results), float8 products and casts
on a CPU, bfloat16 products where the CPU has no instruction for them.
"""

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quantkit_kernels.cpu.build import address, library
from quantkit_kernels.cpu.weight import CHUNK, DENSE, CpuWeight, decode_rows, pack_cpu, reference_weight

Way = Literal["gemv", "tiles", "panel", "kept", "gemv_int8", "qlinear"]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PANEL_BYTES = 2 << 20
MAX_SUM = 65536  # columns of a group: 255 * 127 times as many still fit 32 bits


@dataclass(frozen=True, slots=True)
class Machine:
    """What decides: whether our library is there, and which products the processor has instructions for."""

    compiled: bool
    bf16: bool
    vnni: bool
    tiles: bool = False


@functools.cache
def machine() -> Machine:
    """This one."""
    lib, bf16 = library(), torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    vnni = torch.cpu._is_vnni_supported() and qlinear_is_exact()
    return Machine(lib is not None, bf16, vnni, lib is not None and bool(lib.quantkit_has_tiles()))


def qlinear_is_exact() -> bool:
    """Tried out, because oneDNN may be told (ONEDNN_MAX_CPU_ISA) not to use what the processor has."""
    weight = pack_cpu(torch.full((64, 256), 255, dtype=torch.uint8), torch.ones(64, 1), format="int8", group_size=-1)
    x = torch.full((4, 256), 127, dtype=torch.int8)
    return bool((_qlinear(x, weight) == 127 * 127 * 256).all())


def few_tokens(weight: CpuWeight, here: Machine, eight: bool = False) -> int:
    """Up to how many tokens the compiled kernels are faster than a panel; eight: int8 activations.

    Measured with AVX2. Where bfloat16 is multiplied natively a panel is worth it sooner; those numbers follow from the
    two rates, not from a measurement.
    """
    if eight and not here.bf16:
        return 128 if weight.format == "int8" else 64
    tokens = 32 if weight.group_size % CHUNK == 0 else 16 if weight.group_size % 32 == 0 else 8
    return min(tokens, 8) if here.bf16 else tokens


def choose(weight: CpuWeight, M: int, dtype: torch.dtype, here: Machine) -> Way:
    """The way for M tokens of this dtype."""
    if here.tiles and dtype == torch.bfloat16 and weight.format not in DENSE.values():
        return "tiles"
    if here.compiled:
        most = 0 if weight.format in DENSE.values() else 1  # roundings that `gemv` knows
        return "gemv" if few_tokens(weight, here) >= M and len(weight.rounds(dtype)) <= most else "panel"
    return "kept" if here.bf16 and dtype == torch.bfloat16 else "panel"


def choose_int8(weight: CpuWeight, M: int, here: Machine) -> Way:
    """The way for M tokens of int8 activations."""
    grouped = weight.group_size == 32 or weight.group_size % CHUNK == 0
    integers = weight.format in ("int4", "int8") and grouped and weight.group_size <= MAX_SUM
    channel = weight.format == "int8" and weight.scale.shape[1] == 1 and weight.zero is None and weight.middle == 128
    if channel and here.vnni and M >= 4:
        return "qlinear"
    few = integers and here.compiled and few_tokens(weight, here, eight=True) >= M
    return "gemv_int8" if few else "panel"


def cpu_linear(x: Tensor, weight: CpuWeight) -> Tensor:
    """x [..., K] (float32, bfloat16, float16) -> [..., N] in x's dtype; sums in float32.

    ValueError where x does not fit the weight.
    """
    x_MK = _rows(x, FLOATS, weight)
    if torch.compiler.is_compiling():
        y = cpu_linear_op(x_MK, *_parts(weight))
    else:
        y = product(x_MK, weight, choose(weight, len(x_MK), x.dtype, machine()))
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.out_features)


def cpu_linear_by_row(x: Tensor, weight: CpuWeight) -> Tensor:
    """The same; of fp8 codes with a scale for 64 columns or more, a row of y does not depend on how many there are.

    For inputs that are rounded to few bits: they are made of sums like these, and where a last bit differs, a rounded
    input now and then differs by a whole step. One way serves all: 256 rows take 1.4 (AVX-512) to 1.6 times (AVX2) as
    long. Without a compiler, and in a compiled graph, it is `cpu_linear`.
    """
    compiled = machine().compiled and not torch.compiler.is_compiling()
    if not compiled or weight.format != "fp8" or weight.group_size % CHUNK or weight.rounds(x.dtype):
        return cpu_linear(x, weight)
    y = product(_rows(x, FLOATS, weight), weight, "gemv")
    return y.view(*x.shape[:-1], weight.out_features)


def cpu_linear_int8(codes: Tensor, scale: Tensor, weight: CpuWeight, dtype: torch.dtype) -> Tensor:
    """The product of int8 activations: codes int8 [..., K] times scale float32 [..., 1] -> [..., N] in dtype.

    ValueError where they do not fit the weight.
    """
    x_MK = _rows(codes, (torch.int8,), weight)
    if scale.numel() != len(x_MK):
        raise ValueError(f"scale: {tuple(scale.shape)} for {len(x_MK)} tokens")
    scale_M = scale.reshape(-1).float().contiguous()
    if torch.compiler.is_compiling():
        y = cpu_linear_int8_op(x_MK, scale_M, *_parts(weight))
    else:
        y = product_int8(x_MK, scale_M, weight, choose_int8(weight, len(x_MK), machine()))
    return y.to(dtype).reshape(*codes.shape[:-1], weight.out_features)


def product(x_MK: Tensor, weight: CpuWeight, way: Way) -> Tensor:
    """[M, N] in x's dtype, by this way; nothing is checked."""
    if len(x_MK) == 0:
        return x_MK.new_empty(0, weight.out_features)
    if way == "gemv":
        y = _gemv(x_MK, weight)
    elif way == "tiles":
        y = _tiles(x_MK, weight)
    elif way == "kept":
        if "weight" not in weight.kept:
            weight.kept["weight"] = _decode(weight, torch.bfloat16)
        y = torch.nn.functional.linear(x_MK, weight.kept["weight"])
    else:
        dtype = torch.bfloat16 if machine().bf16 and x_MK.dtype == torch.bfloat16 else torch.float32
        y = _panel(x_MK.to(dtype), weight, weight.rounds(x_MK.dtype))
    return y.to(x_MK.dtype)


def product_int8(x_MK: Tensor, scale_M: Tensor, weight: CpuWeight, way: Way) -> Tensor:
    """float32 [M, N], by this way; nothing is checked."""
    if len(x_MK) == 0:
        return scale_M.new_empty(0, weight.out_features)
    if way == "qlinear":
        return _qlinear(x_MK, weight).mul_(scale_M[:, None])
    if way == "gemv_int8":
        lib = library()
        assert lib is not None
        x_MK = _padded(x_MK, weight)
        y = torch.empty(len(x_MK), weight.out_features)
        lib.quantkit_gemv_int8(*weight.head(len(x_MK)), address(x_MK), address(scale_M), address(y), len(x_MK))
        return y
    return _panel(x_MK.float(), weight, ()).mul_(scale_M[:, None])


@torch.library.custom_op("quantkit_kernels::cpu_linear", mutates_args=())
def cpu_linear_op(
    x_MK: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, middle: int, factor: float, format: str,
    in_features: int, group_size: int, rounding: torch.dtype, exact: bool,
) -> Tensor:  # fmt: skip
    """The operator torch.compile and export see; `cpu_linear` is its checked front."""
    weight = CpuWeight(codes, scale, zero, middle, factor, format, in_features, group_size, rounding, exact)  # type: ignore
    way = choose(weight, len(x_MK), x_MK.dtype, machine())
    return product(x_MK, weight, "panel" if way == "kept" else way)  # nothing can be kept here


@cpu_linear_op.register_fake
def _(x_MK, codes, scale, zero, middle, factor, format, in_features, group_size, rounding, exact):
    return x_MK.new_empty(x_MK.shape[0], codes.shape[0])


@torch.library.custom_op("quantkit_kernels::cpu_linear_int8", mutates_args=())
def cpu_linear_int8_op(
    x_MK: Tensor, scale_M: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, middle: int, factor: float,
    format: str, in_features: int, group_size: int, rounding: torch.dtype, exact: bool,
) -> Tensor:  # fmt: skip
    """The same for `cpu_linear_int8`."""
    weight = CpuWeight(codes, scale, zero, middle, factor, format, in_features, group_size, rounding, exact)  # type: ignore
    way = choose_int8(weight, len(x_MK), machine())
    return product_int8(x_MK, scale_M, weight, way if way in ("gemv_int8", "panel") else "panel")


@cpu_linear_int8_op.register_fake
def _(x_MK, scale_M, codes, scale, zero, middle, factor, format, in_features, group_size, rounding, exact):
    return scale_M.new_empty(x_MK.shape[0], codes.shape[0])


def _parts(weight: CpuWeight) -> tuple:
    return (
        weight.codes, weight.scale, weight.zero, weight.middle, weight.factor, weight.format, weight.in_features,
        weight.group_size, weight.rounding, weight.exact,
    )  # fmt: skip


def cpu_linear_reference(x: Tensor, weight: CpuWeight) -> Tensor:
    """The definition, in float64; of int8 inputs, before their scales."""
    return x.double() @ reference_weight(weight, x.dtype if x.is_floating_point() else None).T


def _rows(x: Tensor, dtypes: tuple[torch.dtype, ...], weight: CpuWeight) -> Tensor:
    """x as [M, K], checked; what fits costs a microsecond."""
    N, K = weight.out_features, weight.in_features
    if x.device.type != "cpu":
        raise ValueError(f"x of shape {tuple(x.shape)} is on {x.device}, the weight on the CPU")
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"x is {tuple(x.shape)}, the weight is {N}x{K}: wanted [..., {K}]")
    if x.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"x of shape {tuple(x.shape)} is {x.dtype}: wanted {wanted}")
    return x if x.dim() == 2 else x.reshape(-1, K)


def _padded(x_MK: Tensor, weight: CpuWeight) -> Tensor:
    """Contiguous, with zeros up to whole chunks."""
    more = weight.padded - weight.in_features
    return (torch.nn.functional.pad(x_MK, (0, more)) if more else x_MK).contiguous()


def _gemv(x_MK: Tensor, weight: CpuWeight) -> Tensor:
    lib, rounds = library(), weight.rounds(x_MK.dtype)
    assert lib is not None
    x_MK = _padded(x_MK.float(), weight)
    y = torch.empty(len(x_MK), weight.out_features)
    lib.quantkit_gemv(*weight.head(len(x_MK), rounds), address(x_MK), address(y), len(x_MK))
    return y


def _tiles(x_MK: Tensor, weight: CpuWeight, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[M, N] in bfloat16 or float32, from bfloat16 inputs."""
    lib, (M, K), rounds = library(), x_MK.shape, weight.rounds(torch.bfloat16)
    assert lib is not None
    x_MK, y, wide = x_MK.contiguous(), torch.empty(M, weight.out_features, dtype=dtype), dtype == torch.float32
    lib.quantkit_gemm_tiles(*weight.head(M, rounds), address(x_MK), K, address(y), wide, M)
    return y


_local = threading.local()


def _panel(x_MK: Tensor, weight: CpuWeight, rounds: Sequence[torch.dtype]) -> Tensor:
    """A panel of decoded rows at a time, in x's dtype, in memory of this thread that is used again and again."""
    N, width, dtype = weight.out_features, weight.padded, x_MK.dtype
    rows = min(N, max(CHUNK, PANEL_BYTES // (width * dtype.itemsize)))
    memory = getattr(_local, "memory", None)
    if memory is None or memory.nbytes < rows * width * dtype.itemsize:
        memory = _local.memory = torch.empty(rows * width * dtype.itemsize, dtype=torch.uint8)
    panel = memory[: rows * width * dtype.itemsize].view(dtype).view(rows, width)
    if rows == N:
        return torch.nn.functional.linear(x_MK, decode_rows(weight, 0, N, panel, rounds))
    y = torch.empty(len(x_MK), N, dtype=dtype)
    for begin in range(0, N, rows):
        end = min(begin + rows, N)
        part = decode_rows(weight, begin, end, panel[: end - begin], rounds)
        y[:, begin:end] = torch.nn.functional.linear(x_MK, part)
    return y


def _decode(weight: CpuWeight, dtype: torch.dtype) -> Tensor:
    out = torch.empty(weight.out_features, weight.padded, dtype=dtype)
    return decode_rows(weight, 0, weight.out_features, out, weight.rounds(dtype)).contiguous()


def _qlinear(x_MK: Tensor, weight: CpuWeight) -> Tensor:
    """float32 [M, N] before the tokens' scales; activations become unsigned, which is the fast kernel's kind."""
    if "qlinear" not in weight.kept:
        codes = weight.codes.view(torch.int8)[:, : weight.in_features].contiguous()
        weight.kept["qlinear"] = torch.ops.onednn.qlinear_prepack(codes, None)
        weight.kept["scale"] = weight.scale[:, 0].float() * weight.factor
        weight.kept["zero"] = torch.zeros(weight.out_features, dtype=torch.int64)
    unsigned = (x_MK.to(torch.int16) + 128).to(torch.uint8)
    return torch.ops.onednn.qlinear_pointwise(
        unsigned, 1.0, 128, weight.kept["qlinear"], weight.kept["scale"], weight.kept["zero"], None, 1.0, 0,
        torch.float32, "none", [], "",
    )  # fmt: skip
