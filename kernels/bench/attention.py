# ruff: noqa: E402, I001
"""Time paged decode attention over each kind of KV cache; each is checked against float64 before it is timed.

    python kernels/bench/attention.py --json out.json [--small]

Baselines in the same rounds: our own bf16 cache, and a copy of as many bytes. --small: checked, not timed.
"""

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch
from record import device_here, write

from quantkit_kernels.kv_write import KINDS, Cache, allocate, kv_write
from quantkit_kernels.paged_attention import launch, paged_attention_reference
from quantkit_kernels.timing import copy_bandwidth, relative_error, time_calls

CASES = ((1, 131072), (16, 8192), (64, 2048))  # sequences, cached tokens of each
HEADS, REPEAT, D, BLOCK_SIZE = 8, 4, 128, 16


def cache_bytes(cache: Cache) -> int:
    """Codes and scales."""
    return cache.codes.nbytes + (cache.scale.nbytes if cache.scale is not None else 0)


def make(kind: str, sequences: int, length: int, device: torch.device) -> tuple[Cache, Cache, torch.Tensor]:
    """Caches written by the write kernel, blocks in random order."""
    per_sequence = -(-length // BLOCK_SIZE)
    total = per_sequence * sequences
    table = torch.randperm(total, device=device).reshape(sequences, -1).to(torch.int32)
    k, v = (
        allocate(kind, total, BLOCK_SIZE, HEADS, D, dtype=torch.bfloat16, device=device)  # type: ignore
        for _ in range(2)
    )
    for start in range(0, total * BLOCK_SIZE, 1 << 17):
        slots = torch.arange(start, min(start + (1 << 17), total * BLOCK_SIZE), device=device)
        new = torch.randn(2, len(slots), HEADS, D, device=device, dtype=torch.bfloat16)
        kv_write(new[0], new[1], slots, k, v)
    return k, v, table


def bench(sequences: int, length: int, device: torch.device, timed: bool) -> list[dict]:
    """Rows of all kinds for one case."""
    q = torch.randn(sequences, HEADS * REPEAT, D, device=device, dtype=torch.bfloat16)
    starts = torch.arange(sequences + 1, device=device, dtype=torch.int32)
    lengths = torch.full((sequences,), length, device=device, dtype=torch.int32)
    rows, candidates, sizes = [], {}, {}
    for kind in KINDS:
        k, v, table = make(kind, sequences, length, device)
        out = torch.full_like(q, float("nan"))

        def call(k: Cache = k, v: Cache = v, table: torch.Tensor = table, out: torch.Tensor = out) -> torch.Tensor:
            return launch(q, k, v, table, lengths, starts, out, scale=D**-0.5, window=0, most_queries=1)

        one = slice(0, 1)
        wanted = paged_attention_reference(q[one], k, v, table[one], lengths[one], starts[:2], D**-0.5)
        error = relative_error(call()[one], wanted)
        assert error < 1.5e-2, f"attention over {kind}, {sequences} x {length}: relative error {error}"
        assert bool(out.isfinite().all())
        candidates[kind], sizes[kind] = [call], cache_bytes(k) + cache_bytes(v)
        rows.append({"kind": kind, "sequences": sequences, "length": length, "error": error})
    if timed:
        times = time_calls(candidates, rounds=50)
        for row in rows:
            t = times[row["kind"]]
            row |= {
                "us": t.median, "spread": t.spread, "GBps": sizes[row["kind"]] / t.median / 1e3,
                "speedup_over_bf16_cache": times["16"].median / t.median, "samples": t.microseconds,
            }  # fmt: skip
    for row in rows:
        print({k: v for k, v in row.items() if k != "samples"}, flush=True)
    return rows


def main() -> None:
    """Check, time, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    device = device_here(options.small)
    cases = ((2, 20),) if options.small else CASES
    result: dict = {"rows": [row for case in cases for row in bench(*case, device, not options.small)]}
    if not options.small:
        result["copy_bytes_per_second"] = copy_bandwidth(device)
    write(options.json, result, device)


if __name__ == "__main__":
    main()
