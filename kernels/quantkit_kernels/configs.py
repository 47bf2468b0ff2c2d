"""Tile sizes: measured ones from configs/<device>.json where that device was tuned, else a small heuristic table.

Nothing is tuned at the first call. `python -m quantkit_kernels.tune` measures on the GPU at hand and writes the JSON:
{"device": ..., "triton": ..., "weight_only": {"int4/4096x4096": {"16": {"block_m": 16, ...}, ...}}}, the inner keys
being the largest M a config is for.
"""

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from quantkit_kernels.common import WORKSPACE_FLOATS, WORKSPACE_TILES, processors, shared_memory

FOLDER = Path(__file__).parent / "configs"
LARGE_SHARED = 160 * 1024  # A100, H100, B200; what has less has about 99 KiB
DEQUANTIZE_FROM = 192  # tokens from which decoding the weight once and cuBLAS win, until a device's JSON says otherwise


@dataclass(frozen=True, slots=True)
class WeightOnlyConfig:
    """Tile of the weight-only kernel; dequantize: decode the whole weight once and leave the product to cuBLAS."""

    block_m: int
    block_n: int
    splits: int
    num_warps: int
    num_stages: int
    dequantize: bool = False


@dataclass(frozen=True, slots=True)
class GemmConfig:
    """Tile of the W8A8 kernels."""

    block_m: int
    block_n: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int


def file_of(device: torch.device) -> Path:
    """Where the measured configs of this device's model lie."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return FOLDER / f"{re.sub('[^A-Za-z0-9]+', '_', name).strip('_')}.json"


@functools.cache
def measured(device: torch.device) -> dict:
    """The device's JSON; empty where it was never tuned."""
    path = file_of(device)
    return json.loads(path.read_text()) if path.is_file() else {}


def split_count(tiles: int, steps: int, wanted: int, floats_per_tile: int) -> int:
    """Into how many parts to split K so that about `wanted` programs run; no part is empty.

    Every part has at least two steps, and the parts fit the workspace. Equal parts are preferred: they need no masks.
    """
    if tiles > WORKSPACE_TILES:
        return 1
    room = min(wanted // tiles, steps // 2, WORKSPACE_FLOATS // (tiles * floats_per_tile))
    if room <= 1:
        return 1
    equal = max(s for s in range(1, room + 1) if steps % s == 0)
    return equal if equal > 0.6 * room else -(-steps // -(-steps // room))


@functools.lru_cache(maxsize=4096)
def weight_only_config(format: str, M: int, N: int, K: int, device: torch.device) -> WeightOnlyConfig:
    """The tile for y_MN = x_MK @ W_NK^T."""
    buckets = measured(device).get("weight_only", {}).get(f"{format}/{N}x{K}", {})
    for largest in sorted(map(int, buckets)):
        if largest >= M:
            return WeightOnlyConfig(**buckets[str(largest)])
    return weight_only_heuristic(M, N, K, processors(device), shared_memory(device))


def weight_only_heuristic(M: int, N: int, K: int, processors: int, shared: int) -> WeightOnlyConfig:
    """For a GPU nobody tuned: its processors, and the bytes of shared memory a program can have."""
    steps = -(-K // 256)
    if M >= DEQUANTIZE_FROM:
        return WeightOnlyConfig(64, 128, 1, 4, 3, dequantize=True)
    if M > 32:  # the tile of x fills shared memory: one program a processor, of eight warps
        tiles = -(-N // 128) * -(-M // 64)
        stages = 3 if shared >= LARGE_SHARED else 2
        return WeightOnlyConfig(64, 128, split_count(tiles, steps, processors, 64 * 128), 8, stages)
    block_m = 16 if M <= 16 else 32
    tiles = -(-N // 64)
    return WeightOnlyConfig(block_m, 64, split_count(tiles, steps, 4 * processors, block_m * 64), 4, 3)


@functools.lru_cache(maxsize=4096)
def gemm_config(kind: str, M: int, N: int, K: int, device: torch.device, decode: bool = False) -> GemmConfig:
    """The tile of a W8A8 product. decode: float8 codes become float16 in the kernel (GPUs without float8)."""
    buckets = measured(device).get("gemm", {}).get(f"{kind}/{N}x{K}", {})
    for largest in sorted(map(int, buckets)):
        if largest >= M:
            return GemmConfig(**buckets[str(largest)])
    return gemm_heuristic(kind, M, N, K, processors(device), shared_memory(device), decode)


def gemm_heuristic(kind: str, M: int, N: int, K: int, processors: int, shared: int, decode: bool = False) -> GemmConfig:
    """For a GPU nobody tuned. Few tokens split K, many take the largest tile; decoding needs twice the registers."""
    small = shared < LARGE_SHARED
    if decode and M > 32:
        return GemmConfig(64, 64, 128, 1, 8, 2 if small else 3)
    if M > 128:
        return GemmConfig(128, 128, 128, 1, 8, 3)
    block_m = 16 if M <= 16 else 32 if M <= 32 else 64
    block_n = 64 if kind == "fp8_block" or decode else 128
    tiles = -(-N // block_n) * -(-M // block_m)
    splits = split_count(tiles, -(-K // 128), 3 * processors, block_m * block_n)
    return GemmConfig(block_m, block_n, 128, splits, 4, 3 if small else 4)
