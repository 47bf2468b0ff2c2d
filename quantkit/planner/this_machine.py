"""What this machine has free and how fast it is: measured in about a fifth of a second, for estimates."""

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

SIDE = 1024  # rows and columns of the matrices that are multiplied
GEMM_SECONDS = 0.1
WRITTEN = 16 << 20  # bytes written to the disk


@dataclass(frozen=True, slots=True)
class Machine:
    """Free memory and disk in bytes, float32 matrix products in FLOP/s, writing to the disk in bytes/s."""

    cores: int
    free_memory: int
    free_disk: int
    flops: float
    disk_rate: float
    process: int  # bytes this process holds already: python, torch and transformers


def measure(folder: Path) -> Machine:
    """The machine as it is now; `folder` is on the disk that will be written to."""
    process = psutil.Process().memory_info().rss
    return Machine(
        torch.get_num_threads(),
        psutil.virtual_memory().available,
        shutil.disk_usage(folder).free,
        _flops(),
        _disk_rate(folder),
        process,
    )


def _flops() -> float:
    own = torch.Generator().manual_seed(0)  # the caller's random numbers go on as if nothing had been drawn
    a, b = torch.randn(2, SIDE, SIDE, generator=own, dtype=torch.float32)
    c = a @ b  # the first product starts the threads
    begin, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - begin) < GEMM_SECONDS or count < 2:
        torch.mm(a, b, out=c)
        count += 1
    return count * 2 * SIDE**3 / seconds


def _disk_rate(folder: Path) -> float:
    """Bytes per second of a synchronous write; the estimate goes without it where the folder cannot be written."""
    data = os.urandom(1 << 20)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            begin = time.perf_counter()
            for _ in range(WRITTEN >> 20):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
            return WRITTEN / (time.perf_counter() - begin)
    except OSError:
        return float("inf")
