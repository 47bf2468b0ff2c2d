"""Compile a Triton kernel for a GPU that need not be there, and read what came out of its machine code."""

import collections
import itertools
import re
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(str(triton.__file__)).parent / "backends/nvidia/bin"
INTEGER = ("LOP3", "PRMT", "SHF", "I2F", "I2FP", "I2IP", "SGXT", "BMSK")  # on the integer pipe; IMAD.SHL is not
TENSOR = ("HGMMA", "QGMMA", "IGMMA", "HMMA", "QMMA", "IMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA")


@dataclass(frozen=True)
class Compiled:
    """What one compilation gave. shared: bytes; code: the kernel's machine code."""

    registers: int
    threads: int
    shared: int
    code: bytes


@dataclass(frozen=True)
class Instructions:
    """Counts by name. loop: of the longest loop; whole: of the kernel; tensor: the class of its products."""

    tensor: str
    spills: int
    whole: collections.Counter
    loop: collections.Counter

    def integer(self) -> int:
        """Integer instructions of the loop."""
        return sum(self.loop[name] for name in INTEGER)


def compile_kernel(
    kernel, signature: dict[str, str], constants: dict, arch: int, num_warps: int, num_stages: int
) -> Compiled:
    """`signature`: Triton types of the run-time arguments; pointers and int32 count as multiples of 16."""
    names = kernel.arg_names
    types = {name: signature.get(name, "constexpr") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in signature if name != "M"}
    source = ASTSource(kernel, types, values, aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
    return Compiled(
        registers=int(re.findall(r"REG:(\d+)", usage)[0]),
        threads=32 * compiled.metadata.num_warps,
        shared=compiled.metadata.shared,
        code=_code(compiled.asm["cubin"]),
    )


def compile_for_amd(kernel, signature: dict[str, str], constants: dict, num_warps: int) -> bool:
    """Compile for an MI300 (gfx942); whether its matrix cores are used."""
    names = kernel.arg_names
    types = {name: signature.get(name, "constexpr") for name in names}
    source = ASTSource(kernel, types, {(names.index(name),): value for name, value in constants.items()}, {})
    options = {"num_warps": num_warps, "num_stages": 2}
    compiled = triton.compile(source, target=GPUTarget("hip", "gfx942", 64), options=options)
    return "mfma" in compiled.asm["amdgcn"]


def disassemble(codes: list[bytes], arch: int) -> list[Instructions]:
    """What kernels are made of. The disassembler takes long to start, so it reads all of them at once."""
    if not codes:
        return []
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        listing = _run("nvdisasm", "--binary", f"SM{arch}", file.name)
    lines = [(int(at, 16), name, rest) for at, name, rest in _LINE.findall(listing)]
    stops = itertools.accumulate(len(code) for code in codes)
    return [
        _count([line for line in lines if stop - len(code) <= line[0] < stop])
        for code, stop in zip(codes, stops, strict=True)
    ]


def _run(tool: str, *options: str) -> str:
    return subprocess.run([TOOLS / tool, *options], capture_output=True, text=True, check=True).stdout


def _code(cubin: bytes) -> bytes:
    """The one .text section of a 64-bit ELF file (its header and section headers are those of elf(5))."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    text = [s for s in sections if cubin.startswith(b".text.", sections[names][4] + s[0])]
    assert len(text) == 1, "a kernel with functions beside it"
    offset, length = text[0][4:6]
    return cubin[offset : offset + length]


_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)[.\w]*([^;]*);", re.M)


def _count(lines: list[tuple[int, str, str]]) -> Instructions:
    """A loop is the span from a backward branch's target to the branch. `lines`: address, name, operands."""
    whole = collections.Counter(name for _, name, _ in lines)
    spans = []
    for at, name, rest in lines:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if name == "BRA" and target and int(target[1], 16) < at:
            spans.append((int(target[1], 16), at))
    start, stop = max(spans, key=lambda s: s[1] - s[0], default=(lines[0][0], lines[-1][0]))
    loop = collections.Counter(name for at, name, _ in lines if start <= at <= stop)
    tensor = next((name for name in TENSOR if whole[name]), "none")
    return Instructions(tensor, whole["STL"] + whole["LDL"], whole, loop)
