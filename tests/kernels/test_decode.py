"""The inline PTX decoders, executed instruction by instruction on the CPU, against the layout's contract.

The interpreter cannot run inline PTX and a GPU may not be at hand, so the strings handed to Triton are read and run
here: an emulator of the eight instructions they use, over words that hold every code in every place.
"""

import re

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from quantkit_kernels import decode
from quantkit_kernels.fp4 import E2M1
from quantkit_kernels.layout import pack_words, unpack_words

U32 = np.uint32


def floats(bits: np.ndarray, kind: str) -> np.ndarray:
    """float64 values of the 16-bit patterns in a uint16 array."""
    dtype = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}[kind]
    return torch.from_numpy(bits.astype(np.int16)).view(dtype).double().numpy()


def bits_of(values: np.ndarray, kind: str) -> np.ndarray:
    """The 16-bit patterns of float64 values, rounded to nearest even (through float32: exact for these operands)."""
    dtype = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}[kind]
    return torch.from_numpy(values).to(dtype).view(torch.int16).numpy().astype(np.uint16)


def fma(kind: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    halves = []
    for shift in (0, 16):
        x, y, z = (floats(((r >> U32(shift)) & U32(0xFFFF)).astype(np.uint16), kind) for r in (a, b, c))
        halves.append(bits_of(x * y + z, kind).astype(U32) << U32(shift))
    return halves[0] | halves[1]


def prmt(a: np.ndarray, b: np.ndarray, selector: int) -> np.ndarray:
    both = [(r >> U32(8 * i)) & U32(0xFF) for r in (a, b) for i in range(4)]
    picked = [both[(selector >> (4 * i)) & 7] << U32(8 * i) for i in range(4)]
    return picked[0] | picked[1] | picked[2] | picked[3]


def lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    result = np.zeros_like(a)
    for index in range(8):
        if table >> index & 1:
            terms = [r if index >> place & 1 else ~r for r, place in ((a, 2), (b, 1), (c, 0))]
            result |= terms[0] & terms[1] & terms[2]
    return result


def run_ptx(text: str, inputs: dict[int, np.ndarray]) -> dict[str, np.ndarray]:
    """All registers after the block; inputs by operand number."""
    registers = {f"${i}": value for i, value in inputs.items()}

    def read(name: str) -> np.ndarray:
        if name in registers:
            return registers[name]
        return np.full_like(next(iter(inputs.values())), int(name, 0))

    for statement in text.strip("{} ").split(";"):
        words = statement.replace(",", " ").split()
        if not words or words[0] == ".reg":
            continue
        opcode, target, *names = words
        operands = [read(n) for n in names]
        name = opcode.split(".")[0]
        if name == "mov":
            registers[target] = operands[0]
        elif name == "and":
            registers[target] = operands[0] & operands[1]
        elif name in ("shl", "shr"):
            registers[target] = operands[0] << operands[1] if name == "shl" else operands[0] >> operands[1]
        elif name == "prmt":
            registers[target] = prmt(operands[0], operands[1], int(names[2], 0))
        elif name == "lop3":
            registers[target] = lop3(*operands[:3], int(names[3], 0))
        elif name == "fma":
            registers[target] = fma(opcode.split(".")[-1], *operands)
        else:
            raise AssertionError(f"the emulator does not know {opcode}")
    return registers


def decoded(text: str, words_BNP: torch.Tensor, kind: str) -> np.ndarray:
    """The planes [blocks, N, planes, P] of neighbouring words, as pack=2 pairs them."""
    flat = words_BNP.numpy().astype(np.int64).astype(U32).reshape(-1)
    planes = 8 if re.search(r"\$7\b", text) else 4
    registers = run_ptx(text, {planes: flat[0::2], planes + 1: flat[1::2]})
    outputs = []
    for i in range(planes):
        register = registers[f"${i}"]
        pair = np.stack([register & U32(0xFFFF), register >> U32(16)], 1).astype(np.uint16)
        outputs.append(floats(pair, kind).reshape(words_BNP.shape))
    return np.stack(outputs, 2)


def in_k_order(planes: np.ndarray) -> np.ndarray:
    return planes.transpose(1, 0, 2, 3).reshape(planes.shape[1], -1)


CASES = [
    ("INT4_BF16", "int4", "bf16x2", lambda c: c + 128.0),
    ("INT4_BF16_CENTRED", "int4", "bf16x2", lambda c: c - 8.0),
    ("INT4_F16", "int4", "f16x2", lambda c: c + 1024.0),
    ("INT4_F16_CENTRED", "int4", "f16x2", lambda c: c - 8.0),
    ("INT8_BF16", "int8", "bf16x2", lambda c: np.where(c > 127, c - 256.0, c)),
    ("INT8_F16", "int8", "f16x2", lambda c: np.where(c > 127, c - 256.0, c)),
    ("FP8_BF16", "fp8", "bf16x2", lambda c: torch.from_numpy(c).to(torch.uint8).view(torch.float8_e4m3fn).double()),
    ("FP4_BF16", "fp4", "bf16x2", lambda c: np.array(E2M1 + tuple(-v for v in E2M1))[c.astype(int)] * 2.0**-126),
]


@pytest.mark.parametrize(("name", "format", "kind", "value"), CASES, ids=[case[0] for case in CASES])
def test_ptx_decodes_every_code_in_every_place(name: str, format: str, kind: str, value) -> None:
    levels = 256 if format in ("int8", "fp8") else 16
    codes = torch.stack([torch.randperm(1024) for _ in range(12)]) % levels
    if format == "fp8":
        codes[codes % 128 == 127] = 0  # NaN is refused at load
    codes = codes.to(torch.uint8)
    words = pack_words(codes, format)
    assert torch.equal(unpack_words(words, format, 1024), codes)
    got = in_k_order(decoded(getattr(decode, name).value, words, kind))
    np.testing.assert_array_equal(got, np.asarray(value(codes.numpy().astype(np.float64))))


@pytest.mark.parametrize("kind", ["bf16x2", "f16x2"])
def test_ptx_subtracts_and_multiplies_in_pairs(kind: str) -> None:
    magic = 128 if kind == "bf16x2" else 1024
    code, zero = (np.random.default_rng(1).integers(0, 16, 512) + magic for _ in range(2))
    registers = [(bits_of(v.astype(np.float64), kind)) for v in (code, zero)]
    pairs = [r[0::2].astype(U32) | (r[1::2].astype(U32) << U32(16)) for r in registers]
    suffix = "BF16" if kind == "bf16x2" else "F16"
    result = run_ptx(getattr(decode, f"SUB_{suffix}").value, {1: pairs[0], 2: pairs[1]})["$0"]
    np.testing.assert_array_equal(floats((result & U32(0xFFFF)).astype(np.uint16), kind), (code - zero)[0::2])
    np.testing.assert_array_equal(floats((result >> U32(16)).astype(np.uint16), kind), (code - zero)[1::2])
    product = run_ptx(getattr(decode, f"MUL_{suffix}").value, {1: result, 2: pairs[0]})["$0"]
    wanted = bits_of(((code - zero) * code)[0::2].astype(np.float64), kind)
    np.testing.assert_array_equal((product & U32(0xFFFF)).astype(np.uint16) & 0x7FFF, wanted & 0x7FFF)


KV_CASES = [
    ("KV_INT4_BF16", lambda b: [b & 15, b >> 4]),
    ("KV_INT8_BF16", lambda b: [np.where(b > 127, b - 256, b)]),
    ("KV_FP8_BF16", lambda b: [torch.from_numpy(b).to(torch.uint8).view(torch.float8_e4m3fn).double().numpy()]),
]


@pytest.mark.parametrize(("name", "value"), KV_CASES, ids=[case[0] for case in KV_CASES])
def test_ptx_decodes_every_cached_byte(name: str, value) -> None:
    """Four neighbouring bytes to a register; the first two registers are one output, the next two another."""
    codes = np.random.default_rng(2).permutation(1024) % 256
    if "FP8" in name:
        codes[codes % 128 == 127] = 0  # no NaN is ever written
    words = np.sum(codes.reshape(-1, 4).astype(U32) << (U32(8) * np.arange(4, dtype=U32)), axis=1, dtype=U32)
    wanted = value(codes)
    registers = run_ptx(getattr(decode, name).value, {2 * len(wanted): words})
    for i, values in enumerate(wanted):
        pairs = [registers[f"${2 * i}"], registers[f"${2 * i + 1}"]]
        bits = np.stack([half for r in pairs for half in (r & U32(0xFFFF), r >> U32(16))], 1).astype(np.uint16)
        np.testing.assert_array_equal(floats(bits.reshape(-1), "bf16x2"), values.astype(np.float64))
