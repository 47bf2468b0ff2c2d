"""Measure tile sizes on the GPU at hand and keep the fastest: `python -m quantkit_kernels.tune --shapes 4096x4096`.

Writes configs/<device>.json inside the package, which configs.py reads from then on. Seconds to minutes for each
shape; never run by a kernel itself.
"""

import argparse
import itertools
import json
from dataclasses import asdict

import torch
import triton

from quantkit_kernels import configs, w8a8, weight_only
from quantkit_kernels.common import processors
from quantkit_kernels.layout import BITS, BLOCK_K, Format, PackedWeight, blocks
from quantkit_kernels.timing import copies_beyond_cache, time_calls

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
GROUPS: dict[Format, int] = {"int4": 128, "int8": 0, "fp8": 0, "fp4": 16}


def random_weight(format: Format, N: int, K: int, device: torch.device) -> PackedWeight:
    """A weight of random words: what a kernel does takes no longer for other values."""
    words = torch.randint(-(2**31), 2**31 - 1, (blocks(K), N, 16 if BITS[format] == 4 else 32), device=device)
    group = GROUPS[format]
    shape, row_scale = (blocks(K) // 2, N, 256 // group) if group else (N,), None
    scale = (torch.rand(shape, device=device) * 0.01 + 0.001).bfloat16()
    if format == "fp4":
        row_scale = torch.rand(N, device=device) * 0.01 + 0.001
    return PackedWeight(words.to(torch.int32), scale, None, row_scale, format, K, group, torch.bfloat16)


def candidates(M: int, N: int, K: int, device: torch.device) -> list[configs.WeightOnlyConfig]:
    """Tiles worth a measurement."""
    steps = -(-K // 256)
    found = [configs.WeightOnlyConfig(64, 128, 1, 4, 3, dequantize=True)] if M >= 64 else []
    smallest = 16 if M <= 16 else 32 if M <= 32 else 64
    for block_m, block_n, stages in itertools.product({smallest, 64}, (64, 128), (2, 3, 4)):
        tiles = -(-N // block_n) * -(-M // block_m)
        warps = 8 if block_m * block_n >= 8192 else 4
        room = configs.split_count(tiles, steps, 8 * processors(device), block_m * block_n)
        for splits in sorted({s for s in (1, 2, 4, 8, 16, room) if s == room or (s < room and steps % s == 0)}):
            found.append(configs.WeightOnlyConfig(block_m, block_n, splits, warps, stages))
    return found


def tune_weight_only(format: Format, N: int, K: int, buckets: tuple[int, ...], device: torch.device) -> dict:
    """The fastest config for each largest M."""
    weight = random_weight(format, N, K, device)
    count = copies_beyond_cache(weight.words.nbytes, device)
    copies = [random_weight(format, N, K, device) for _ in range(count)]
    best = {}
    for M in buckets:
        x = torch.randn(M, K, device=device, dtype=torch.bfloat16)
        y = torch.empty(M, N, device=device, dtype=torch.bfloat16)
        times = {}
        for config in candidates(M, N, K, device):
            calls = [lambda w=w, c=config: weight_only.launch(x, w, y, c) for w in copies]  # noqa: B023
            try:
                times[config] = time_calls({"": calls}, rounds=10)[""].median
            except triton.runtime.errors.OutOfResources:
                continue  # too much shared memory for this GPU
        config = min(times, key=lambda c: times[c])
        best[str(M)] = asdict(config)
        print(f"{format} {N}x{K} M={M}: {times[config]:.1f} us with {config}", flush=True)
    return best


def tune_gemm(kind: str, N: int, K: int, buckets: tuple[int, ...], device: torch.device) -> dict:
    """The fastest W8A8 config for each largest M."""
    element = w8a8.ELEMENTS[kind]
    count = copies_beyond_cache(N * K, device)
    weights = [torch.randint(-100, 100, (N, K), dtype=torch.int8, device=device).view(element) for _ in range(count)]
    block = kind == "fp8_block"
    best = {}
    for M in buckets:
        x = torch.randint(-100, 100, (M, K), dtype=torch.int8, device=device).view(element)
        y = torch.empty(M, N, device=device, dtype=torch.bfloat16)
        groups = -(-K // BLOCK_K)
        x_scale = torch.rand(groups, M, device=device).T if block else torch.rand(M, device=device)
        w_scale = torch.rand(-(-N // BLOCK_K), groups, device=device) if block else torch.rand(N, device=device)
        times = {}
        for block_m, block_n, stages in itertools.product((16, 32, 64, 128), (64, 128), (3, 4)):
            if block_m > max(16, triton.next_power_of_2(M)):
                continue
            tiles = -(-N // block_n) * -(-M // block_m)
            room = configs.split_count(tiles, groups, 3 * processors(device), block_m * block_n)
            for splits in {1, room}:
                warps = 8 if block_m * block_n >= 16384 else 4
                config = configs.GemmConfig(block_m, block_n, 128, splits, warps, stages)
                calls = [lambda w=w, c=config: w8a8.launch(x, x_scale, w, w_scale, kind, y, c) for w in weights]  # noqa: B023
                try:
                    times[config] = time_calls({"": calls}, rounds=10)[""].median
                except triton.runtime.errors.OutOfResources:
                    continue
        config = min(times, key=lambda c: times[c])
        best[str(M)] = asdict(config)
        print(f"{kind} {N}x{K} M={M}: {times[config]:.1f} us with {config}", flush=True)
    return best


def main() -> None:
    """Tune what the command line names and merge it into the device's JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", required=True, help="NxK: out x in features")
    parser.add_argument(
        "--formats", nargs="+", default=["int4"], choices=[*GROUPS, *(f"w8a8_{k}" for k in w8a8.ELEMENTS)]
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=list(BUCKETS))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tuning measures on a GPU, and there is none here")
    device = torch.device("cuda", torch.cuda.current_device())
    path = configs.file_of(device)
    known = json.loads(path.read_text()) if path.is_file() else {}
    known |= {"device": torch.cuda.get_device_name(device), "triton": triton.__version__, "torch": torch.__version__}
    for format, shape in itertools.product(options.formats, options.shapes):
        N, K = map(int, shape.split("x"))
        buckets = tuple(sorted(options.tokens))
        kind = format.removeprefix("w8a8_")
        if kind == format:
            known.setdefault("weight_only", {})[f"{format}/{N}x{K}"] = tune_weight_only(format, N, K, buckets, device)
        else:
            known.setdefault("gemm", {})[f"{kind}/{N}x{K}"] = tune_gemm(kind, N, K, buckets, device)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(known, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
