"""Seconds by stage, memory returned to the system, and worker threads."""

import ctypes
import resource
import sys
import time
from collections.abc import Sequence

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
PAUSE_SOFT = 1  # omp_pause_soft of OpenMP 5.0
LARGEST = 32 << 20  # bytes: the most glibc lets its heap serve; larger tensors are mapped one by one
KEPT = 512 << 20  # bytes at the heap's end that may stay with the process


HOLES = 2.5  # pages of the heap per byte in use at its fullest: measured, tensors of many sizes leave holes


class StageTimer:
    """Seconds by stage, and the process's peak resident memory."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}
        self.begin = self._last = time.perf_counter()

    def mark(self, stage: str) -> None:
        now = time.perf_counter()
        self.stages[stage] = self.stages.get(stage, 0.0) + now - self._last
        self._last = now

    @staticmethod
    def peak_bytes() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reuse_pages() -> None:
    """Make glibc serve tensors of up to 32 MiB from its heap; on other systems nothing happens.

    By default each of them is mapped separately and its pages faulted in: an element-wise operation then spends most
    of its time in the kernel. Measured on two cores, GPTQ of a 6M-parameter model: 40 s without, 18 s with it.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT)


def one_heap() -> None:
    """Make glibc serve all threads from one heap: what one has freed serves the next, 15 % less memory at the peak.

    For a process of quantkit's own: it cannot be undone, and threads that allocate much then wait for each other.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_ARENA_MAX, 1)


def resident_bytes(phases: Sequence[Sequence[float]]) -> float:
    """Most bytes of memory that tensors take, given the sizes of those alive in each of the phases between two trims.

    What the heap serves it keeps, holes between tensors included; larger tensors are mapped, and gone when they are.
    """
    heap = most = 0.0
    for sizes in phases:
        heap = max(heap, HOLES * sum(size for size in sizes if size < LARGEST))
        most = max(most, heap + sum(size for size in sizes if size >= LARGEST))
    return most


def return_pages() -> None:
    """Return unused heap memory to the system; called between blocks, so that memory does not grow with depth."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def end_worker_threads() -> None:
    """End the OpenMP workers of the calling thread; its next parallel operation starts them again, in microseconds.

    Each thread that computes has workers of its own. As soon as there are more of them than cores, sleeping ones
    included, GNU's OpenMP puts every worker to sleep between two operations, and waking it takes longer than a small
    operation. Measured with four halted threads on two cores: a range search took 3.5 times as long.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "omp_pause_resource_all"):
        libc.omp_pause_resource_all(PAUSE_SOFT)
