"""What every Triton kernel's wrapper needs: the device's properties and the split-K workspace."""

import functools
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
WORKSPACE_FLOATS = 16 << 20  # 64 MiB of partial sums
WORKSPACE_TILES = 1 << 16

TL_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; (0, 0) for what is not an NVIDIA GPU (AMD, and the CPU of the interpreter)."""
    if device.type != "cuda" or torch.version.hip is not None:
        return (0, 0)
    return torch.cuda.get_device_capability(device)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device; 4 in the interpreter, so that tests split K."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory one program can have; an H100's where it cannot be asked."""
    if device.type != "cuda":
        return 227 * 1024
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)


def compute_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype a kernel multiplies in. The interpreter computes bfloat16 arithmetic wrongly, so it gets float32."""
    return tl.float32 if INTERPRET else TL_DTYPES[dtype]


def use_asm(device: torch.device) -> bool:
    """Whether the inline PTX decoders run: NVIDIA from sm_80 on. Elsewhere their plain Triton twins do."""
    return not INTERPRET and capability(device) >= (8, 0)


def native_fp8(device: torch.device) -> bool:
    """Whether tensor cores and conversions take float8 e4m3: NVIDIA from sm_89 on."""
    return not INTERPRET and capability(device) >= (8, 9)


def check_gpu(name: str, tensor: Tensor) -> None:
    """ValueError where Triton cannot run: tensors in the CPU's memory outside the interpreter."""
    if tensor.device.type == "cpu" and not INTERPRET:
        raise ValueError(f"{name} runs on a GPU, its input of shape {tuple(tensor.shape)} is on the CPU")


_workspaces: dict[torch.device, tuple[Tensor, Tensor]] = {}


def workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    """(float32 partial sums, int32 counters that are zero between launches), made once per device.

    Kernels that share it must not run at the same time: launch them on one stream, as a model does. RuntimeError when
    it would be made during CUDA graph capture: run the model once before.
    """
    if device not in _workspaces:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"call common.workspace({device}) (or run the model once) before capturing a CUDA graph")
        partial = torch.empty(WORKSPACE_FLOATS, device=device)
        _workspaces[device] = partial, torch.zeros(WORKSPACE_TILES, dtype=torch.int32, device=device)
    return _workspaces[device]


@triton.jit
def reduce_splits(
    acc, partial_ptr, count_ptr, tile, split, SPLITS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Sum of a tile's `acc` [ROWS, COLS] over all splits, in their order, and whether this program holds it.

    Elements are int32 or float32; the workspace holds their bits. Every program leaves its part in the workspace and
    counts itself; the one that counts last adds all parts up (so the order, and with it the result, never depends on
    which one that is) and sets the counter back to zero.
    """
    offsets = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    base = partial_ptr + tile.to(tl.int64) * (SPLITS * ROWS * COLS)
    tl.store(base + split * (ROWS * COLS) + offsets, acc.to(tl.float32, bitcast=True), cache_modifier=".cg")
    tl.debug_barrier()  # all of the program's stores come before its count
    arrived = tl.atomic_add(count_ptr + tile, 1, sem="acq_rel")
    last = arrived == SPLITS - 1
    if last:
        tl.debug_barrier()
        total = tl.load(base + offsets, cache_modifier=".cg").to(acc.dtype, bitcast=True)
        for other in tl.static_range(1, SPLITS):
            part = tl.load(base + other * (ROWS * COLS) + offsets, cache_modifier=".cg")
            total += part.to(acc.dtype, bitcast=True)
        acc = total
        tl.store(count_ptr + tile, 0)
    return acc, last
