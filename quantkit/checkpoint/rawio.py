"""Bytes between files and tensors' own memory: no maps, no copies in between, any size.

torch is imported by the functions that make tensors: what only reads headers does without it.
"""

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1 << 20  # bytes of one write: single calls of 64 MiB took ten times the processor time on ext4
LARGE = 4 << 20  # bytes from which huge pages pay


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor to read from; UserError when the file cannot be opened any more."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; the file must stay readable while the run goes on") from error
    try:
        yield fd
    finally:
        os.close(fd)


def fresh(size: int) -> "Tensor":
    """An uninitialised uint8 tensor [size] to read into.

    Large ones ask for huge pages: faulting in 4 KiB at a time costs more than the reading itself.
    """
    import torch

    if size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def as_bytes(tensor: "Tensor") -> memoryview:
    """The memory of a contiguous CPU tensor of any dtype, writable, without a copy."""
    import torch

    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def read_into(fd: int, raw: "Tensor", offset: int, path: Path) -> None:
    """Fill a contiguous uint8 tensor from `offset` of the file; UserError when the file ends before that."""
    fill(fd, as_bytes(raw), offset, path)


def fill(fd: int, view: memoryview, offset: int, path: Path) -> None:
    """Fill all of view from `offset` of the file; UserError when the file ends before that."""
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            raise UserError(f"{path}: ended at byte {offset + done} while being read; it changed after the run began")
        done += count


def write_at(fd: int, tensor: "Tensor", offset: int) -> None:
    """Write a contiguous CPU tensor's bytes at `offset`; OSError as the system gives it."""
    write_bytes(fd, as_bytes(tensor), offset)


def write_bytes(fd: int, view: memoryview, offset: int) -> None:
    """Write all of view at `offset`."""
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done : done + CHUNK], offset + done)


def copy_range(source: int, start: int, target: int, offset: int, length: int, path: Path) -> None:
    """Copy `length` bytes between open files, inside the kernel where it can; `path` names the source in errors."""
    done = 0
    while done < length and hasattr(os, "copy_file_range"):
        try:
            count = os.copy_file_range(source, target, min(length - done, 1 << 30), start + done, offset + done)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                raise
            break
        if count == 0:
            break  # some file systems answer 0 instead of refusing; the loop below tells a short file apart
        done += count
    buffer = memoryview(bytearray(min(CHUNK, length - done)))
    while done < length:
        part = buffer[: min(CHUNK, length - done)]
        fill(source, part, start + done, path)
        write_bytes(target, part, offset + done)
        done += len(part)
