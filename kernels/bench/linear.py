# ruff: noqa: E402, I001
"""Time the linears against bf16 cuBLAS (and torch._scaled_mm) at Llama shapes; each is checked before it is timed.

    python kernels/bench/linear.py --json out.json [--full] [--small]

--full: all eight shapes for every format, not only for int4. --small: tiny shapes, checked and not timed (any machine).
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch
from record import device_here, write
from torch import Tensor

from quantkit_kernels import w8a8, weight_only
from quantkit_kernels.fp4 import fp4_reference
from quantkit_kernels.layout import Format, PackedWeight
from quantkit_kernels.quantize_activations import quantize_activations
from quantkit_kernels.timing import copies_beyond_cache, copy_bandwidth, relative_error, time_calls
from quantkit_kernels.tune import random_weight
from quantkit_kernels.w4a16 import w4a16_reference
from quantkit_kernels.w8a16 import w8a16_reference

SHAPES = (  # N x K: Llama-3-8B, then Llama-2-70B
    (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336),
    (10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672),
)  # fmt: skip
FEW = ((4096, 14336), (8192, 8192))
TOKENS = (1, 16, 32, 64, 128, 256, 2048)
LIMIT = 8e-3  # of bfloat16 outputs; the interpreter truncates where a GPU rounds
REFERENCES = {"int4": w4a16_reference, "int8": w8a16_reference, "fp8": w8a16_reference, "fp4": fp4_reference}


def weight_bytes(weight: PackedWeight) -> int:
    """What the kernel reads of the weight."""
    parts = (weight.words, weight.scale, weight.zero, weight.row_scale)
    return sum(part.nbytes for part in parts if part is not None)


def finite(weight: PackedWeight) -> PackedWeight:
    """Random float8 words without the codes of NaN, which the layout refuses: exponents' top bits cleared."""
    if weight.format == "fp8":
        weight.words.bitwise_and_(~0x44004400)  # bit 6 of a half's two codes lies at 10 and at 14
    return weight


def bench_weight_only(
    format: Format, N: int, K: int, tokens: tuple[int, ...], device: torch.device, timed: bool
) -> list[dict]:
    """Rows for one format and shape."""
    rows = []
    weight = finite(random_weight(format, N, K, device))
    sets = copies_beyond_cache(weight_bytes(weight), device) if timed else 1
    weights = [weight, *(finite(random_weight(format, N, K, device)) for _ in range(sets - 1))]
    plain_sets = copies_beyond_cache(2 * N * K, device) if timed else 0
    plain = [torch.randn(N, K, device=device, dtype=torch.bfloat16) for _ in range(plain_sets)]
    for M in tokens:
        x = torch.randn(M, K, device=device, dtype=torch.bfloat16)
        y = torch.full((M, N), float("nan"), device=device, dtype=torch.bfloat16)
        error = relative_error(weight_only.launch(x, weight, y), REFERENCES[format](x, weight))
        assert error < LIMIT, f"{format} {N}x{K} M={M}: relative error {error}"
        row = {"kernel": format, "N": N, "K": K, "M": M, "error": error}
        if timed:
            y2 = torch.empty_like(y)
            times = time_calls({
                "ours": [lambda w=w: weight_only.launch(x, w, y) for w in weights],  # noqa: B023
                "cublas_bf16": [lambda w=w: torch.mm(x, w.T, out=y2) for w in plain],  # noqa: B023
            })  # fmt: skip
            ours, base = times["ours"], times["cublas_bf16"]
            row |= {
                "us": ours.median, "spread": ours.spread, "cublas_bf16_us": base.median,
                "speedup": base.median / ours.median, "weight_GBps": weight_bytes(weight) / ours.median / 1e3,
                "samples": ours.microseconds, "cublas_samples": base.microseconds,
            }  # fmt: skip
        rows.append(row)
        show(row)
    return rows


def w8a8_operands(kind: str, M: int, N: int, K: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """bf16 activations, and a quantized weight."""
    x = torch.randn(M, K, device=device, dtype=torch.bfloat16)
    element = w8a8.ELEMENTS[kind]
    if kind == "int8":
        w = torch.randint(-127, 128, (N, K), dtype=torch.int8, device=device)
    else:
        w = (torch.randn(N, K, device=device) * 50).clamp(-448, 448).to(element)
    shape = (-(-N // 128), -(-K // 128)) if kind == "fp8_block" else (N,)
    return x, w, torch.rand(shape, device=device) * 0.01 + 0.001


def bench_w8a8(kind: str, N: int, K: int, tokens: tuple[int, ...], device: torch.device, timed: bool) -> list[dict]:
    """Rows for one kind and shape: the product alone, and with the quantization of the activations."""
    rows = []
    sets = copies_beyond_cache(N * K, device) if timed else 1
    for M in tokens:
        x, w, w_scale = w8a8_operands(kind, M, N, K, device)
        options: dict = {"element": "int8" if kind == "int8" else "fp8", "group": 128 if kind == "fp8_block" else -1}
        codes, scale = quantize_activations(x, **options)
        y = torch.full((M, N), float("nan"), device=device, dtype=torch.bfloat16)
        wanted = w8a8.w8a8_reference(codes, scale, w, w_scale, kind)
        error = relative_error(w8a8.launch(codes, scale, w, w_scale, kind, y), wanted)
        assert error < LIMIT, f"w8a8 {kind} {N}x{K} M={M}: relative error {error}"
        row = {"kernel": f"w8a8_{kind}", "N": N, "K": K, "M": M, "error": error}
        if timed:
            weights = [w, *(w.clone() for _ in range(sets - 1))]
            plain = [torch.randn(N, K, device=device, dtype=torch.bfloat16) for _ in range(max(2, sets // 2))]
            y2 = torch.empty_like(y)

            def with_quantization(
                w: Tensor, x: Tensor = x, s: Tensor = w_scale, y: Tensor = y, o: dict = options
            ) -> None:
                w8a8.launch(*quantize_activations(x, **o), w, s, kind, y)

            candidates: dict[str, Sequence[Callable[[], object]]] = {
                "ours": [lambda w=w: w8a8.launch(codes, scale, w, w_scale, kind, y) for w in weights],  # noqa: B023
                "ours_with_quantization": [lambda w=w, f=with_quantization: f(w) for w in weights],
                "cublas_bf16": [lambda w=w: torch.mm(x, w.T, out=y2) for w in plain],  # noqa: B023
            }
            if kind == "fp8":
                a, b = scale[:, None], w_scale[None, :]
                candidates["scaled_mm"] = [
                    lambda w=w: torch.ops.aten._scaled_mm(codes, w.T, a, b, out_dtype=torch.bfloat16)  # noqa: B023
                    for w in weights
                ]
            times = time_calls(candidates, rounds=30)
            row |= {f"{name}_us": t.median for name, t in times.items()}
            row |= {
                "spread": times["ours"].spread, "TFLOPs": 2 * M * N * K / times["ours"].median / 1e6,
                "speedup": times["cublas_bf16"].median / times["ours"].median,
                "speedup_with_quantization": times["cublas_bf16"].median / times["ours_with_quantization"].median,
                "samples": {name: t.microseconds for name, t in times.items()},
            }  # fmt: skip
        rows.append(row)
        show(row)
    return rows


def show(row: dict) -> None:
    """One line, without the raw samples."""
    text = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items() if "samples" not in k)
    print(" ".join(text), flush=True)


def main() -> None:
    """Check, time, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    device = device_here(options.small)
    shapes, few, tokens = (((64, 256),),) * 2 + ((1, 200),) if options.small else (SHAPES, FEW, TOKENS)
    few = shapes if options.full else few
    rows = []
    for N, K in shapes:
        rows += bench_weight_only("int4", N, K, tokens, device, not options.small)
    for N, K in few:
        for format in ("int8", "fp8", "fp4"):
            rows += bench_weight_only(format, N, K, tokens[:4], device, not options.small)
        for kind in w8a8.ELEMENTS:
            rows += bench_w8a8(kind, N, K, tokens[1::2] + (() if options.small else (4096,)), device, not options.small)
    result: dict = {"rows": rows}
    if not options.small:
        result["copy_bytes_per_second"] = copy_bandwidth(device)
        for M in TOKENS:
            ratios = [r["speedup"] for r in rows if r["kernel"] == "int4" and r["M"] == M]
            result[f"int4_geomean_speedup_M{M}"] = statistics.geometric_mean(ratios)
            print(f"int4 g128, M={M}: {statistics.geometric_mean(ratios):.2f} times bf16 cuBLAS (geometric mean)")
    write(options.json, result, device)


if __name__ == "__main__":
    main()
