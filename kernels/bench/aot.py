# ruff: noqa: E402, I001
"""Compile every kernel and config for GPUs that need not be here, and print what their machine code is made of.

    python kernels/bench/aot.py [--arch 90] [--match int4] [--json FILE] [--amd]

int/el: integer instructions of the main loop for each weight (or cached element) a thread decodes. Exit code 1 where
something does not compile or a limit is broken: spills, registers, shared memory (227 KiB on sm_90), and on sm_90 the
tensor-core class and integer work. As many processes compile as there are processors.
"""

import argparse
import functools
import gc
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # otherwise Triton 3.9 warns of 3.10's default at each compile
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import triton
import triton.language as tl
from sass import Compiled, Instructions, compile_for_amd, compile_kernel, disassemble

from quantkit_kernels.configs import GemmConfig, WeightOnlyConfig, gemm_heuristic, weight_only_heuristic
from quantkit_kernels.layout import Format
from quantkit_kernels.kv_write import KINDS, Kind, kv_write_kernel
from quantkit_kernels.paged_attention import combine_kernel, paged_attention_kernel, specialization
from quantkit_kernels.quantize_activations import quantize_kernel
from quantkit_kernels.w8a8 import order, w8a8_kernel
from quantkit_kernels.weight_only import decode_kernel, weight_only_kernel

ARCHES = (80, 89, 90, 100)
# The ptxas of older Tritons (torch 2.13 asks for 3.7.1) spills where that of 3.9 does not: 70 words at most, on sm_100.
OLD_PTXAS = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
LONG = 16384  # columns of the weights: enough turns of the loop that it is not unrolled away
SHARED = {80: 163, 89: 99, 90: 227, 100: 227}  # KiB a program can have
REGISTERS = 65536  # of a processor; a program's threads hold a multiple of 8 each, at most 255
PROCESSORS = 132
CDT = {"bf16": tl.bfloat16, "fp16": tl.float16}
KINDS_W8A8 = ("int8", "fp8", "fp8_block")


@dataclass(frozen=True)
class Case:
    """One kernel with its constants. elements: what a thread decodes in one turn of the loop, 0 where none."""

    name: str
    kernel: object
    signature: dict[str, str]
    constants: dict
    num_warps: int
    num_stages: int
    elements: float = 0
    limit: float = 0
    tensor: str = "none"


def weight_only(
    arch: int, format: Format, group: int, M: int, *, zero: bool = False, dtype: str = "bf16", N: int = 4096,
    K: int = LONG, scales: str | None = None, sums: bool = False,
) -> Case:  # fmt: skip
    """The product of a weight-only format; group 0: one scale a row. scales: their dtype, if not the activations'."""
    config = weight_only_heuristic(M, N, K, PROCESSORS, SHARED[arch] * 1024)
    data = "*" + dtype
    signature = {
        "x_ptr": data, "words_ptr": "*i32", "scale_ptr": "*fp32" if sums else "*" + (scales or dtype),
        "zero_ptr": data if zero else "*i32", "row_scale_ptr": "*fp32", "y_ptr": "*fp32" if sums else data,
        "partial_ptr": "*fp32",
        "count_ptr": "*i32", "M": "i32", "N": "i32", "stride_x": "i32",
    }  # fmt: skip
    constants = {
        "K": K, "STEPS": -(-K // 256), "SPLITS": config.splits, "FORMAT": format, "GROUP": group or 128,
        "SCALE": not sums or group > 0, "CHANNEL": not group and not sums, "ZERO": zero,
        "ROW_SCALE": format == "fp4" or (sums and not group), "SCALE_SUMS": sums and group > 0,
        "EVEN_N": N % config.block_n == 0, "ASM": True, "CDT": CDT[dtype], "DT": CDT[dtype],
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
    }  # fmt: skip
    elements = config.block_n * 256 / (32 * config.num_warps)
    limit = {"int4": 1.3, "int8": 1.6, "fp8": 1.6, "fp4": 1.6}[format]
    limit += 2 * bool(scales)  # these are multiplied in float32 and converted back
    size = f"g{group}" if group else "channel"
    name = f"{format} {size}{' asym' if zero else ''} {dtype} M{M}" + (f" N{N}" if N != 4096 else "")
    name += (f" K{K}" if K != LONG else "") + (f" {scales} scales" if scales else "") + (" sums" if sums else "")
    return Case(
        name, weight_only_kernel, signature, constants, config.num_warps, config.num_stages, elements, limit, "HGMMA"
    )


def decode(format: str, group: int, *, zero: bool = False) -> Case:
    """The kernel that decodes a whole weight; group 0: one scale a row."""
    signature = {
        "words_ptr": "*i32", "scale_ptr": "*bf16", "zero_ptr": "*bf16" if zero else "*i32",
        "row_scale_ptr": "*fp32", "w_ptr": "*bf16", "N": "i32",
    }  # fmt: skip
    constants = {
        "K": 4096, "FORMAT": format, "GROUP": group or 128, "SCALE": True, "CHANNEL": not group, "ZERO": zero,
        "ROW_SCALE": format == "fp4", "ASM": True, "CDT": tl.bfloat16, "DT": tl.bfloat16, "BLOCK_N": 32,
    }  # fmt: skip
    name = f"decode {format} {f'g{group}' if group else 'channel'}{' asym' if zero else ''}"
    return Case(name, decode_kernel, signature, constants, 4, 3)


def decodes_fp8(kind: str, arch: int) -> bool:
    """Whether a W8A8 product decodes its operands: they are float8 and the GPU has none."""
    return kind != "int8" and arch < 89


def w8a8(kind: str, M: int, arch: int, *, N: int = 4096) -> Case:
    """A W8A8 product."""
    soft = decodes_fp8(kind, arch)
    config = gemm_heuristic(kind, M, N, 4096, PROCESSORS, SHARED[arch] * 1024, soft)
    element = "*i8" if kind == "int8" else "*u8" if soft else "*fp8e4nv"
    signature = {
        "x_ptr": element, "w_ptr": element, "x_scale_ptr": "*fp32", "w_scale_ptr": "*fp32", "y_ptr": "*bf16",
        "partial_ptr": "*fp32", "count_ptr": "*i32", "M": "i32", "N": "i32", "stride_sm": "i32", "stride_sg": "i32",
    }  # fmt: skip
    constants = {
        "K": 4096, "KIND": kind, "DECODE": soft, "CDT": tl.float16, "SPLITS": config.splits,
        "EVEN_N": N % config.block_n == 0, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k, **order(kind, config, soft),
    }  # fmt: skip
    tensor = "IGMMA" if kind == "int8" else "QGMMA"
    name = f"w8a8 {kind} M{M}" + (f" N{N}" if N != 4096 else "")
    return Case(name, w8a8_kernel, signature, constants, config.num_warps, config.num_stages, tensor=tensor)


def quantize(fuse: str, element: str, group: int, arch: int) -> Case:
    """Activations of 4096 features."""
    native = arch >= 89
    code = "*i8" if element == "int8" else "*fp8e4nv" if native else "*u8"
    signature = {
        "x_ptr": "*bf16", "norm_weight_ptr": "*bf16", "codes_ptr": code, "scale_ptr": "*fp32", "stride_x": "i32",
        "stride_sm": "i32", "stride_sg": "i32", "eps": "fp32",
    }  # fmt: skip
    constants = {
        "K": 4096, "FUSE": fuse, "INT8": element == "int8", "NATIVE": native, "GROUPS": 1 if group == -1 else 32,
        "BLOCK": 4096,
    }  # fmt: skip
    name = f"quantize {element} {'row' if group == -1 else 'g128'} {fuse}"
    return Case(name, quantize_kernel, signature, constants, 4, 3)


def attention(k_kind: Kind, v_kind: Kind, head_size: int, *, prefill: bool = False) -> Case:
    """32 query heads over 8 KV heads, blocks of 16."""
    pointer = {"16": "*bf16", "fp8": "*u8", "int8": "*u8", "int4": "*u8"}
    scale = {"16": "*bf16", "fp8": "*fp32", "int8": "*fp32", "int4": "*fp16"}
    signature = {
        "q_ptr": "*bf16", "k_ptr": pointer[k_kind], "k_scale_ptr": scale[k_kind], "v_ptr": pointer[v_kind],
        "v_scale_ptr": scale[v_kind], "table_ptr": "*i32", "lengths_ptr": "*i32", "starts_ptr": "*i32",
        "out_ptr": "*bf16", "partial_ptr": "*fp32", "sequences": "i32", "stride_q": "i32", "stride_table": "i32",
        "scale_log2": "fp32", "window": "i32",
    }  # fmt: skip
    constants = specialization(k_kind, v_kind, 8, 4, head_size, 16, 1 if prefill else 8, not prefill) | {
        "ASM": True, "CDT": tl.bfloat16, "ROWS": 64 if prefill else 16,
    }  # fmt: skip
    elements = 2 * constants["TOKENS"] * head_size / 128
    padded = 2 * constants["BLOCK_H"] / head_size  # head sizes that are no power of 2 decode more than is there
    kind = k_kind if k_kind == v_kind else f"{k_kind}/{v_kind}"
    name = f"{'prefill' if prefill else 'decode attention'} {kind} d{head_size}"
    return Case(
        name,
        paged_attention_kernel,
        signature,
        constants,
        4,
        2,
        elements,
        (4.0 if prefill else 3.0) * padded,
        "HGMMA" if prefill else "HMMA",
    )


def kv_write(kind: str) -> Case:
    """Both caches of one kind."""
    code = "*bf16" if kind == "16" else "*u8"
    scale = {"16": "*bf16", "fp8": "*fp32", "int8": "*fp32", "int4": "*fp16"}[kind]
    signature = {
        "k_ptr": "*bf16", "v_ptr": "*bf16", "slot_ptr": "*i64", "k_codes_ptr": code, "k_scale_ptr": scale,
        "v_codes_ptr": code, "v_scale_ptr": scale, "stride_k": "i32", "stride_v": "i32", "HEADS": "i32",
    }  # fmt: skip
    return Case(
        f"kv write {kind}", kv_write_kernel, signature, {"K_KIND": kind, "V_KIND": kind, "HALF": 64, "BLOCK": 64}, 1, 1
    )


def combine() -> Case:
    """The reduction of decode attention."""
    signature = {"partial_ptr": "*fp32", "out_ptr": "*bf16"}
    constants = {"D": 128, "SPLITS": 8, "BLOCK_D": 128, "BLOCK_S": 8}
    return Case("combine d128", combine_kernel, signature, constants, 2, 1)


def of_ones(case: Case, *names: str) -> Case:
    """The same where these arguments are 1, which Triton compiles as constants."""
    signature = {name: kind for name, kind in case.signature.items() if name not in names}
    constants = case.constants | dict.fromkeys(names, 1)
    return replace(case, name=f"{case.name} ones", signature=signature, constants=constants)


def least_tokens(table: Callable[[int], WeightOnlyConfig | GemmConfig]) -> list[int]:
    """The least M of each tile a heuristic table has; how K is split does not tell tiles apart."""
    least = {}
    for M in range(1, 4097):
        least.setdefault(replace(table(M), splits=1), M)
    return [M for config, M in least.items() if not getattr(config, "dequantize", False)]


@functools.cache
def cases(arch: int) -> list[Case]:
    """Everything that is shipped, with every tile of the heuristic tables."""
    shared = SHARED[arch] * 1024
    few, *more = least_tokens(lambda M: weight_only_heuristic(M, 4096, LONG, PROCESSORS, shared))
    gemm = {
        kind: least_tokens(
            lambda M, kind=kind: gemm_heuristic(kind, M, 4096, 4096, PROCESSORS, shared, decodes_fp8(kind, arch))
        )
        for kind in KINDS_W8A8
    }
    most = more[-1]
    variants = [
        *(weight_only(arch, "int4", group, few) for group in (0, 32, 64)),
        *(weight_only(arch, "int4", group, few, zero=True) for group in (0, 32, 128)),
        weight_only(arch, "int4", 128, most, zero=True),
        weight_only(arch, "int4", 128, few, zero=True, dtype="fp16"),
        weight_only(arch, "int4", 128, most, dtype="fp16"),
        weight_only(arch, "int4", 128, few, K=4032),
        weight_only(arch, "int4", 128, few, scales="fp32"),
        weight_only(arch, "int8", 0, few, scales="fp16"),
        *(weight_only(arch, "int4", group, M, sums=True) for group in (0, 128) for M in (few, most)),
        weight_only(arch, "int4", 128, few, N=65537),
        weight_only(arch, "int8", 128, few, dtype="fp16"),
        weight_only(arch, "fp8", 128, few),
        weight_only(arch, "fp4", 32, few),
        decode("int4", 128, zero=True),
        w8a8("fp8", 1, arch, N=4097),
        attention("int8", "int4", 64),
        attention("int4", "int4", 80),
        attention("fp8", "fp8", 96),
        attention("16", "16", 256),
        *(attention(kind, kind, 128, prefill=True) for kind in ("fp8", "int8")),
        of_ones(weight_only(arch, "int4", 128, 1), "M", "N", "stride_x"),
        of_ones(decode("int4", 128), "N"),
        of_ones(w8a8("fp8_block", 1, arch), "M", "N", "stride_sm", "stride_sg"),
        of_ones(attention("int4", "int4", 128, prefill=True), "sequences", "stride_table", "window"),
        of_ones(attention("int8", "int8", 128), "sequences", "stride_table", "window"),
        of_ones(kv_write("int4"), "HEADS", "stride_k"),
    ]
    return [
        *(weight_only(arch, "int4", 128, M) for M in (few, *more)),
        *(weight_only(arch, "int8", 0, M) for M in (few, *more)),
        *(weight_only(arch, "fp8", 0, M) for M in (few, *more)),
        *(weight_only(arch, "fp4", 16, M) for M in (few, *more)),
        decode("int4", 128),
        decode("int8", 0),
        decode("fp8", 0),
        decode("fp4", 16),
        *(w8a8(kind, M, arch) for kind in KINDS_W8A8 for M in gemm[kind]),
        *(quantize(fuse, "fp8", -1, arch) for fuse in ("none", "rmsnorm", "silu_mul")),
        quantize("none", "fp8", 128, arch),
        quantize("rmsnorm", "int8", -1, arch),
        *(attention(kind, kind, 128) for kind in KINDS),
        attention("int4", "int4", 256),
        *(attention(kind, kind, 128, prefill=True) for kind in ("16", "int4")),
        combine(),
        *(kv_write(kind) for kind in KINDS),
        *variants,
    ]


def build(arch: int, index: int) -> Compiled | str:
    """One of the cases compiled; what went wrong where it does not compile."""
    case = cases(arch)[index]
    try:
        return compile_kernel(case.kernel, case.signature, case.constants, arch, case.num_warps, case.num_stages)
    except Exception as error:  # whatever the compiler raises is a row of the table
        return f"{type(error).__name__}: {error}"


def faults(case: Case, got: Compiled, made_of: Instructions, arch: int) -> list[str]:
    """Which limits are broken."""
    found = []
    if made_of.spills > (80 if OLD_PTXAS else 0 if arch == 90 else 16):  # elsewhere a few words beside the loop pass
        found.append(f"{made_of.spills} spills")
    if got.registers > 255 or -(-got.registers // 8) * 8 * got.threads > REGISTERS:
        found.append(f"{got.registers} registers of {got.threads} threads")
    if got.shared > SHARED[arch] * 1024:
        found.append(f"shared memory {got.shared}")
    if arch == 90 and made_of.tensor != case.tensor:
        found.append(f"{made_of.tensor}, wanted {case.tensor}")
    if arch == 90 and case.elements and made_of.integer() / case.elements > case.limit:
        found.append(f"{made_of.integer() / case.elements:.2f} integer instructions an element, limit {case.limit}")
    return found


def row_of(case: Case, got: Compiled | str, made_of: Instructions | None, arch: int) -> dict:
    """A row of the table."""
    row = {"arch": arch, "kernel": case.name}
    if isinstance(got, str) or made_of is None:
        return row | {"faults": [f"does not compile: {got}"]}
    return row | {
        "tensor": made_of.tensor, "registers": got.registers, "spills": made_of.spills, "shared": got.shared,
        "int_per_element": f"{made_of.integer() / case.elements:.2f}" if case.elements else None,
        "faults": faults(case, got, made_of, arch),
    }  # fmt: skip


def show(row: dict) -> None:
    """Print a row; what did not compile has no numbers."""
    tensor, registers, spills, shared, work = (
        "" if row.get(key) is None else row[key]
        for key in ("tensor", "registers", "spills", "shared", "int_per_element")
    )
    line = f"sm_{row['arch']:<4}{row['kernel']:36} {tensor:8} {registers:>4} {spills:>6} {shared:>7} {work:>6}"
    print(f"{line}  {', '.join(row['faults'])}".rstrip(), flush=True)


def amd(match: str) -> int:
    """Compile what AMD GPUs run, the plain Triton twins, for gfx942; 1 where a product misses the matrix cores."""
    missing = 0
    for case in cases(80):  # no float8 in Triton's types there
        if match not in case.name:
            continue
        constants = case.constants | ({"ASM": False} if "ASM" in case.constants else {})
        matrix = compile_for_amd(case.kernel, case.signature, constants, case.num_warps)
        missing += case.tensor != "none" and not matrix
        print(f"gfx942 {case.name:36} {'mfma' if matrix else 'none'}", flush=True)
    return 1 if missing else 0


def main() -> int:
    """Print the table; 1 where a limit is broken."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", type=int, action="append", choices=ARCHES)
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--amd", action="store_true", help="compile for an AMD MI300 instead")
    options = parser.parse_args()
    if options.amd:
        return amd(options.match)
    chosen = {
        arch: [i for i, case in enumerate(cases(arch)) if options.match in case.name] for arch in options.arch or ARCHES
    }
    if not any(chosen.values()):
        parser.error(f"no case's name contains {options.match!r}")
    rows = []
    print(f"triton {triton.__version__}")
    print(f"{'arch':7}{'kernel':36} {'tensor':8} {'regs':>4} {'spills':>6} {'shared':>7} {'int/el':>6}  faults")
    # children are forked with triton imported; what it holds is no work for their garbage collectors
    forked = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=forked, initializer=gc.freeze) as pool:
        built = {arch: [pool.submit(build, arch, i) for i in chosen[arch]] for arch in chosen}
        for arch, futures in built.items():
            done = [future.result() for future in futures]
            made_of = iter(disassemble([got.code for got in done if isinstance(got, Compiled)], arch))
            for i, got in zip(chosen[arch], done, strict=True):
                counted = next(made_of) if isinstance(got, Compiled) else None
                rows.append(row_of(cases(arch)[i], got, counted, arch))
                show(rows[-1])
    if options.json:
        options.json.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n")
    return 1 if any(row["faults"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
