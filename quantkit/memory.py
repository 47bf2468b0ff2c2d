"""How the process gets its memory: freed pages are kept for the next tensor instead of being returned each time."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 32 << 20  # bytes: the most glibc lets its heap serve; larger tensors are mapped one by one
KEPT = 512 << 20  # bytes at the heap's end that may stay with the process


def reuse_pages() -> None:
    """Tell glibc to serve tensors of up to 32 MiB from its heap. Elsewhere nothing happens.

    By default each of them is mapped anew and every page of it faulted in: an element-wise operation then spends most
    of its time in the kernel. Measured on two cores, GPTQ of a 6M-parameter model: 40 s without, 18 s with it.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT)


def return_pages() -> None:
    """Give what the heap holds for nobody back to the system: between blocks, so that a run stays flat in depth."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
