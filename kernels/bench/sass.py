"""Compile a Triton kernel for a GPU that need not be there, and read what came out of its machine code."""

import collections
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
INTEGER = ("LOP3", "PRMT", "SHF", "I2F", "I2FP", "I2IP", "SGXT", "BMSK")  # on the integer pipe; IMAD.SHL is not
TENSOR = ("HGMMA", "QGMMA", "IGMMA", "HMMA", "QMMA", "IMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA")
POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float8_e4m3fn: "*fp8e4nv",
    torch.uint8: "*u8", torch.int8: "*i8", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """What one compilation gave. `loop`: instructions of the longest loop, by name; `whole`: of the kernel."""

    registers: int
    stack: int
    spills: int
    shared: int
    tensor: str
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
        usage = _run("-res-usage", file.name)
        sass = _run("-sass", file.name)
    return Compiled(
        registers=int(re.findall(r"REG:(\d+)", usage)[0]),
        stack=int(re.findall(r"STACK:(\d+)", usage)[0]),
        shared=compiled.metadata.shared,
        **_read(sass),
    )


def compile_for_amd(kernel, signature: dict[str, str], constants: dict, num_warps: int) -> bool:
    """Compile for an MI300 (gfx942); whether its matrix cores are used."""
    names = kernel.arg_names
    types = {name: signature.get(name, "constexpr") for name in names}
    source = ASTSource(kernel, types, {(names.index(name),): value for name, value in constants.items()}, {})
    options = {"num_warps": num_warps, "num_stages": 2}
    compiled = triton.compile(source, target=GPUTarget("hip", "gfx942", 64), options=options)
    return "mfma" in compiled.asm["amdgcn"]


def _run(option: str, path: str) -> str:
    return subprocess.run([TOOLS / "cuobjdump", option, path], capture_output=True, text=True, check=True).stdout


_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)([.\w]*)([^;]*);", re.M)


def _read(sass: str) -> dict:
    """Counts over the kernel and over its longest loop: the span from a backward branch's target to the branch."""
    lines = [(int(at, 16), name, rest) for at, name, _, rest in _LINE.findall(sass)]
    whole = collections.Counter(name for _, name, _ in lines)
    spans = []
    for at, name, rest in lines:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if name == "BRA" and target and int(target[1], 16) < at:
            spans.append((int(target[1], 16), at))
    start, stop = max(spans, key=lambda s: s[1] - s[0], default=(0, lines[-1][0]))
    loop = collections.Counter(name for at, name, _ in lines if start <= at <= stop)
    tensor = next((name for name in TENSOR if whole[name]), "none")
    return {"whole": whole, "loop": loop, "tensor": tensor, "spills": whole["STL"] + whole["LDL"]}
