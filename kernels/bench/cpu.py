# ruff: noqa: E402, I001
"""The CPU path against torch's own products, as ratios of times taken side by side. Each product is checked first.

    python kernels/bench/cpu.py [--json FILE] [--threads N] [--quick] [--small]

K1  never slower than bfloat16 F.linear: every format, shape and number of tokens (and what float32 F.linear takes)
K2  int4 g128, one token: against bfloat16 F.linear, against the best bfloat16; weight bytes / read bandwidth
K3  bfloat16, one token: weight bytes / read bandwidth
K4  W8A8 at 256 tokens, quantization included: operations / peak (only where the processor has VNNI)
K5  W8A8 against bfloat16 F.linear, 4 to 256 tokens
K6  decode attention: cache bytes / read bandwidth, and against scaled_dot_product_attention(enable_gqa=True)
K7  attention over an int8 cache against a bfloat16 one
K10 W4A8, one token: weight bytes / read bandwidth

--quick: one shape. --small: tiny shapes, checked and not timed. Windows in which other processes took more than 5 % of
the machine are thrown away (where /proc/stat tells).
"""

import argparse
import functools
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

import torch
from torch import Tensor
from torch.nn import functional

from quantkit_kernels.cpu.attention import cpu_decode_attention, cpu_decode_attention_reference
from quantkit_kernels.cpu.linear import choose, choose_int8, cpu_linear, cpu_linear_int8, cpu_linear_reference, machine
from quantkit_kernels.cpu.weight import CpuWeight, dense_cpu, pack_cpu

SHAPES = ((2048, 2048), (4096, 4096), (14336, 4096))  # N x K
TOKENS = (1, 2, 4, 8, 16, 32, 64, 256)
FORMATS = (  # name, format, group size, zero points, activations
    ("int4 g128", "int4", 128, False, "float"), ("int4 g32 asym", "int4", 32, True, "float"),
    ("int8 channel", "int8", -1, False, "float"), ("fp8 channel", "fp8", -1, False, "float"),
    ("fp8 g128", "fp8", 128, False, "float"), ("nvfp4", "fp4", 16, False, "float"),
    ("mxfp4", "fp4", 32, False, "float"), ("W8A8", "int8", -1, False, "int8"),
    ("W4A8 g128", "int4", 128, False, "int8"),
)  # fmt: skip
BEYOND_CACHE = 96 << 20  # bytes of weights that are rotated through
WINDOW, WINDOWS, TRIES = 0.05, 7, 25


def busy() -> float | None:
    """CPU seconds the whole machine has worked, None where nothing says."""
    try:
        numbers = [int(n) for n in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except OSError:
        return None
    return (sum(numbers) - numbers[3] - numbers[4]) / os.sysconf("SC_CLK_TCK")


def window(calls: Sequence[Callable[[], object]], start: int) -> tuple[float, int, float]:
    """(seconds a call, where to go on, share of the machine that other processes took)."""
    foreign, own, began, count = busy(), time.process_time(), time.perf_counter(), 0
    while count == 0 or time.perf_counter() - began < WINDOW:
        calls[(start + count) % len(calls)]()
        count += 1
    seconds = time.perf_counter() - began
    ours = time.process_time() - own
    after = busy()
    others = 0.0 if foreign is None or after is None else max(0.0, after - foreign - ours - 0.02)
    return seconds / count, start + count, others / (seconds * (os.cpu_count() or 1))


def race(candidates: dict[str, Sequence[Callable[[], object]]]) -> dict[str, list[float]]:
    """Milliseconds of each candidate's windows, in turns; each candidate is a list of calls with different weights."""
    for calls in candidates.values():
        calls[0]()
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    turn = dict.fromkeys(candidates, 0)
    for attempt in range(TRIES):
        for name, calls in candidates.items():
            seconds, turn[name], others = window(calls, turn[name])
            if others <= 0.05 or attempt >= TRIES - 3:
                taken[name].append(seconds * 1e3)
        if min(map(len, taken.values())) >= WINDOWS:
            break
    return taken


def ratio(taken: dict[str, list[float]], ours: str, theirs: str) -> float:
    """Median time of `ours` / median time of `theirs`."""
    return statistics.median(taken[ours]) / statistics.median(taken[theirs])


def random_weight(format: str, N: int, K: int, group: int, zero: bool) -> CpuWeight:
    """Random codes (of floats those that are finite) and scales."""
    codes = torch.randint(0, {"int4": 16, "int8": 256, "fp8": 127, "fp4": 16}[format], (N, K), dtype=torch.uint8)
    scale = (torch.rand(N, 1 if group == -1 else K // group) * 0.01 + 0.005).bfloat16()
    zeros = torch.randint(0, 16, scale.shape, dtype=torch.uint8) if zero else None
    return pack_cpu(codes, scale, zeros, format=format, group_size=group, rounding=scale.dtype)  # type: ignore


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and a scale for each token."""
    scale = x.abs().amax(-1, keepdim=True).float() / 127
    return (x / scale).round_().to(torch.int8), scale


def w8a8(x: Tensor, weight: CpuWeight) -> Tensor:
    """The product with the quantization of its input."""
    return cpu_linear_int8(*quantize_tokens(x), weight, x.dtype)


def check_product(product: Callable[[Tensor, CpuWeight], Tensor], x: Tensor, weight: CpuWeight, eight: bool) -> None:
    """AssertionError where some rows are not what float64 says."""
    codes, scale = quantize_tokens(x)
    wanted = cpu_linear_reference(codes, weight) * scale if eight else cpu_linear_reference(x, weight)
    got = product(x, weight)
    error = ((got - wanted).norm() / wanted.norm()).item()
    assert error < 4e-3, f"{weight.format} g{weight.group_size} {tuple(x.shape)}: relative error {error}"


def bench_linear(shapes: Sequence[tuple[int, int]], tokens: Sequence[int], read: float, timed: bool) -> list[dict]:
    """A row for each format, shape and number of tokens."""
    rows = []
    for N, K in shapes:
        dense = [torch.randn(N, K).bfloat16() for _ in range(max(2, BEYOND_CACHE // (2 * N * K)) if timed else 1)]
        single = dense[0].float()
        for name, format, group, zero, activations in FORMATS:
            product = w8a8 if activations == "int8" else cpu_linear
            first = random_weight(format, N, K, group, zero)
            weights = [
                first,
                *(
                    random_weight(format, N, K, group, zero)
                    for _ in range(BEYOND_CACHE // first.nbytes if timed else 0)
                ),
            ]
            for M in tokens:
                x = torch.randn(M, K).bfloat16()
                if N * M <= 4096 * 64:
                    check_product(product, x, first, activations == "int8")
                here = machine()
                way = choose_int8(first, M, here) if activations == "int8" else choose(first, M, x.dtype, here)
                row: dict = {"format": name, "N": N, "K": K, "M": M, "way": way}
                if timed:
                    x32 = x.float()
                    taken = race({
                        "ours": [functools.partial(product, x, w) for w in weights],
                        "bf16": [functools.partial(functional.linear, x, w) for w in dense],
                        "fp32": [functools.partial(functional.linear, x32, single)],
                    })  # fmt: skip
                    median = statistics.median(taken["ours"])
                    row |= {
                        "ms": median, "of_bf16": ratio(taken, "ours", "bf16"), "of_fp32": ratio(taken, "ours", "fp32"),
                        "of_read": first.nbytes / median / 1e6 / read, "GOPs": 2 * M * N * K / median / 1e6,
                        "samples": taken,
                    }  # fmt: skip
                rows.append(row)
                show(row)
    return rows


def bench_one_token(shapes: Sequence[tuple[int, int]], read: float, timed: bool) -> list[dict]:
    """bfloat16 weights, and int4 ones with int8 activations whose codes are at hand."""
    rows = []
    for N, K in shapes:
        dense = [torch.randn(N, K).bfloat16() for _ in range(max(2, BEYOND_CACHE // (2 * N * K)) if timed else 1)]
        x = torch.randn(1, K).bfloat16()
        packed = [dense_cpu(w) for w in dense]
        four = [random_weight("int4", N, K, 128, False) for _ in range(2 * BEYOND_CACHE // (N * K) if timed else 1)]
        check_product(cpu_linear, x, packed[0], False)
        check_product(w8a8, x, four[0], True)
        codes, scale = quantize_tokens(x)
        calls = {
            "bf16": ([functools.partial(cpu_linear, x, w) for w in packed], packed[0].nbytes),
            "W4A8": ([functools.partial(cpu_linear_int8, codes, scale, w, x.dtype) for w in four], four[0].nbytes),
        }
        taken = race({
            **{name: call for name, (call, _) in calls.items()},
            "linear": [functools.partial(functional.linear, x, w) for w in dense],
        }) if timed else {}  # fmt: skip
        for name, (_, size) in calls.items():
            row: dict = {"format": name, "N": N, "K": K, "M": 1}
            if timed:
                median = statistics.median(taken[name])
                row |= {"ms": median, "of_bf16": ratio(taken, name, "linear"), "of_read": size / median / 1e6 / read}
                row |= {"samples": {way: taken[way] for way in (name, "linear")}}
            rows.append(row)
            show(row)
    return rows


def bench_attention(lengths: Sequence[int], read: float, timed: bool) -> list[dict]:
    """32 query heads over 8 key/value heads of 128 features, one sequence."""
    rows = []
    for L in lengths:
        H, D = 8, 128
        query, length = torch.randn(1, 32, D).bfloat16(), torch.tensor([L])
        copies = max(2, BEYOND_CACHE // (4 * H * L * D)) if timed else 1
        plain = [torch.randn(2, 1, H, L, D).bfloat16() for _ in range(copies)]
        eight = [torch.randint(-127, 128, (2, 1, H, L, D), dtype=torch.int8) for _ in range(2 * copies)]
        scale = torch.rand(1, H, L) * 0.02
        bf16 = [functools.partial(cpu_decode_attention, query, k, v, length) for k, v in plain]
        int8 = [
            functools.partial(cpu_decode_attention, query, k, v, length, k_scale=scale, v_scale=scale) for k, v in eight
        ]
        for call in (bf16[0], int8[0]):
            wanted = cpu_decode_attention_reference(*call.args, **call.keywords)
            error = ((call() - wanted).norm() / wanted.norm()).item()
            assert error < 4e-3, f"attention over {L} tokens of {call.args[1].dtype}: relative error {error}"
        row: dict = {"format": "attention", "L": L}
        if timed:
            sdpa = functional.scaled_dot_product_attention
            taken = race({
                "bf16": bf16, "int8": int8,
                "sdpa": [functools.partial(sdpa, query[:, :, None], k, v, enable_gqa=True) for k, v in plain],
            })  # fmt: skip
            median = statistics.median(taken["bf16"])
            row |= {"ms": median, "of_read": plain[0].nbytes / median / 1e6 / read, "samples": taken}
            row |= {"sdpa": 1 / ratio(taken, "bf16", "sdpa"), "int8_speedup": 1 / ratio(taken, "int8", "bf16")}
        rows.append(row)
        show(row)
    return rows


def read_bandwidth() -> float:
    """GB/s of summing 256 MB, the best of some windows."""
    big = torch.ones(64 << 20)
    return big.nbytes / min(race({"read": [big.sum]})["read"]) / 1e6


def processor() -> str:
    """Its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def show(row: dict) -> None:
    """One line, without the raw samples."""
    text = (f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items() if k != "samples")
    print(" ".join(text), flush=True)


def summary(linear: list[dict], one: list[dict], attention: list[dict]) -> dict[str, str]:
    """The targets and what was measured."""
    worst = max(linear, key=lambda row: row["of_bf16"])
    slower = [row for row in linear if row["of_bf16"] > 1]
    first = [row for row in linear if row["M"] == 1]
    int4 = [row for row in first if row["format"] == "int4 g128"]
    bf16, w4a8 = ([row for row in one if row["format"] == name] for name in ("bf16", "W4A8"))
    dense = {(row["N"], row["K"]): row for row in bf16}
    spread = lambda numbers: f"{min(numbers):.2f} to {max(numbers):.2f}"  # noqa: E731
    eight = [1 / row["of_bf16"] for row in linear if row["format"] == "W8A8" and row["M"] >= 4]
    best = [
        dense[row["N"], row["K"]]["ms"] * min(1, 1 / dense[row["N"], row["K"]]["of_bf16"]) / row["ms"] for row in int4
    ]
    found = {
        "K1 largest time / bf16 F.linear (<= 1)": f"{worst['of_bf16']:.2f} ({worst['format']} {worst['N']}x{worst['K']}"
        f" M={worst['M']}); slower in {len(slower)} of {len(linear)}",
        "K2 int4 M=1: times bf16 F.linear (>= 3.8)": spread([1 / row["of_bf16"] for row in int4]),
        "K2 int4 M=1: times the best bf16 (>= 1.5)": spread(best),
        "K2 int4 M=1: of read bandwidth (>= .45)": spread([row["of_read"] for row in int4]),
        "K3 bf16 M=1: of read bandwidth (>= .95)": spread([row["of_read"] for row in bf16]),
        "K5 W8A8 M=4..256: times bf16 F.linear (>= 1.8)": spread(eight),
        "K6 attention: of read bandwidth (>= .55)": spread([row["of_read"] for row in attention]),
        "K6 attention: times SDPA enable_gqa (>= 15)": spread([row["sdpa"] for row in attention]),
        "K7 int8 cache: times bf16 cache (>= 1.2)": spread([row["int8_speedup"] for row in attention]),
        "K10 W4A8 M=1: of read bandwidth (>= .8)": spread([row["of_read"] for row in w4a8]),
    }
    if not machine().vnni:
        found["K4 W8A8 of VNNI peak"] = "this processor has no VNNI"
    return found


def main() -> None:
    """Check, time, print, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    timed = not options.small
    shapes = SHAPES[1:2] if options.quick else SHAPES
    shapes, tokens, lengths = (shapes, TOKENS, (1024, 4096)) if timed else (((96, 256),), (1, 3, 40), (70,))
    read = read_bandwidth() if timed else 1.0
    head = {
        "cpu": processor(),
        "capability": torch.backends.cpu.get_cpu_capability(), "machine": str(machine()), "threads": options.threads,
        "torch": torch.__version__, "python": platform.python_version(), "command": shlex.join(["python", *sys.argv]),
        "read_GBps": read,
    }  # fmt: skip
    print(head)
    one = bench_one_token(shapes, read, timed)
    attention = bench_attention(lengths, read, timed)
    linear = bench_linear(shapes, tokens, read, timed)
    result = head | {"linear": linear, "one_token": one, "attention": attention}
    if timed:
        result["summary"] = summary(linear, one, attention)
        for name, value in result["summary"].items():
            print(f"{name}: {value}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
