"""Arrays of calibration data: in memory while they are small, in unnamed files when they are not."""

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from quantkit.errors import RunError

STATES_LIMIT = 2 << 30  # bytes kept in memory, of one array of states or of all arguments of blocks


def allocate(shape: tuple[int, ...], dtype: torch.dtype, folder: Path, *, beside: int = 0) -> Tensor:
    """A zeroed array in memory, or in a memory-mapped file in `folder` where memory would hold over STATES_LIMIT.

    beside: bytes that are already kept and count for the limit. The file has no name from the start, so a killed run
    leaves nothing behind. RunError where the disk is full.
    """
    count = torch.Size(shape).numel()
    if beside + count * dtype.itemsize <= STATES_LIMIT:
        return torch.zeros(shape, dtype=dtype)
    handle, path = tempfile.mkstemp(suffix=".states", dir=folder)
    try:
        os.posix_fallocate(handle, 0, count * dtype.itemsize)
        return torch.from_file(path, shared=True, size=count, dtype=dtype).reshape(shape)
    except OSError as error:
        raise RunError(
            f"{folder}: no room for {count * dtype.itemsize / 2**30:.1f} GiB of calibration states"
        ) from error
    finally:
        os.close(handle)
        os.unlink(path)
