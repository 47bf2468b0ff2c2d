"""Files whose every byte has its place before the first tensor exists: reserved, resumed, never half a header.

A file's size and header follow from names, types and shapes alone. So all files of a run are reserved up front (a full
disk shows before hours of work), tensors are written where they belong in any order, and a killed run goes on in them.
"""

import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from quantkit.checkpoint.rawio import fresh, read_into, write_at, write_bytes
from quantkit.errors import DiskFullError, RunError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(slots=True)
class PlannedFile:
    """One file to be: its header, its size, and the bytes [start, stop) of each tensor in it.

    seal  how many first bytes of the header only a finished file has; the rest of its first 8 stand for a whole header
    """

    path: Path
    header: bytes
    spans: dict[str, tuple[int, int]]
    size: int
    seal: int = 0
    fd: int = -1
    touched: bool = False


class PreallocatedFiles:
    """The files of one result, open for writing at any place.

    created  names of the tensors whose file did not exist yet: on resume no finished one may be here

    Files found in the folder with the very header they should have are written on; any other content is a RunError.
    DiskFullError naming needed and free bytes where the disk is too small, before anything of it is left behind.
    """

    def __init__(self, folder: Path, files: list[PlannedFile]) -> None:
        self.folder, self.files = folder, files
        self._of = {name: file for file in files for name in file.spans}
        folder.mkdir(parents=True, exist_ok=True)
        self.created = self._allocate()

    def where(self, name: str) -> tuple[PlannedFile, int]:
        """The file of a tensor, marked as written to, and the tensor's first byte in it."""
        file = self._of[name]
        file.touched = True
        return file, file.spans[name][0]

    def write(self, name: str, data: Tensor, start: int = 0) -> None:
        """Put a contiguous CPU tensor's bytes into a tensor's, from byte `start` of these on."""
        file, base = self.where(name)
        try:
            write_at(file.fd, data, base + start)
        except OSError as error:
            raise self.explain(error, file.path) from error

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Bytes [start, stop) of a tensor, written by this run or the one it goes on from: uint8, memory of its own."""
        file = self._of[name]
        begin, end = file.spans[name]
        raw = fresh((end - begin if stop is None else stop) - start)
        read_into(file.fd, raw, begin + start, file.path)
        return raw

    def sync(self) -> None:
        """Return once everything written so far is on the disk."""
        for file in self.files:
            if file.touched:
                file.touched = False
                try:
                    os.fsync(file.fd)
                except OSError as error:
                    raise self.explain(error, file.path) from error

    def seal(self) -> None:
        """Sync, then write the bytes that make each file a finished one."""
        self.sync()
        for file in self.files:
            if file.seal:
                try:
                    write_bytes(file.fd, memoryview(file.header)[: file.seal], 0)
                except OSError as error:
                    raise self.explain(error, file.path) from error
                file.touched = True
        self.sync()

    def close(self) -> None:
        """Close the files; what was written stays."""
        for file in self.files:
            if file.fd >= 0:
                os.close(file.fd)
                file.fd = -1

    def explain(self, error: OSError, path: Path) -> RunError:
        """What to raise where a write to `path` failed."""
        if error.errno in FULL:
            needed = sum(stop - start for file in self.files for start, stop in file.spans.values())
            return DiskFullError(_no_space(needed, shutil.disk_usage(self.folder).free, self.folder))
        return RunError(f"{path}: {error.strerror}")

    def _allocate(self) -> frozenset[str]:
        missing = [file for file in self.files if not self._reopen(file)]
        needed, free = sum(file.size for file in missing), shutil.disk_usage(self.folder).free
        if needed > free:
            self.close()
            raise DiskFullError(_no_space(needed, free, self.folder))
        made: list[PlannedFile] = []
        try:
            for file in missing:
                made.append(file)
                file.fd = os.open(file.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
                _reserve(file.fd, file.size)
                # A header counts once its first 8 bytes are there: a kill in between leaves a file that is made again.
                write_bytes(file.fd, memoryview(file.header)[8:], 8)
                os.fsync(file.fd)
                write_bytes(file.fd, memoryview(file.header)[file.seal : 8], file.seal)
                os.fsync(file.fd)
        except OSError as error:
            self.close()
            for file in made:
                file.path.unlink(missing_ok=True)
            if error.errno in FULL:
                free = shutil.disk_usage(self.folder).free
                raise DiskFullError(_no_space(needed, free, self.folder)) from error
            raise RunError(str(error)) from error
        return frozenset(name for file in missing for name in file.spans)

    def _reopen(self, file: PlannedFile) -> bool:
        """Open a file left by a run that was killed; False where there is none yet, or only the beginnings of one."""
        if not file.path.exists():
            return False
        fd = os.open(file.path, os.O_RDWR | os.O_CLOEXEC)
        found = os.pread(fd, len(file.header), 0)
        if not found[:8].strip(b"\0"):
            os.close(fd)
            return False
        sealed = found[: file.seal]
        right = found[file.seal :] == file.header[file.seal :] and sealed in (
            bytes(file.seal),
            file.header[: file.seal],
        )
        if not right or os.fstat(fd).st_size != file.size:
            os.close(fd)
            self.close()
            raise RunError(f"{file.path} exists and is not what this run would write; move it away or restart the run")
        file.fd = fd
        return True


def group_by_size(sizes: list[int], most: int) -> list[list[int]]:
    """Indices in order, cut into groups of at most `most` bytes; what is larger stands alone."""
    groups: list[list[int]] = []
    room = 0
    for i, size in enumerate(sizes):
        if not groups or size > room:
            groups.append([])
            room = most
        groups[-1].append(i)
        room -= size
    return groups


def _reserve(fd: int, size: int) -> None:
    """Give the file its size and its place on the disk, so that a full disk shows before hours of work."""
    try:
        os.posix_fallocate(fd, 0, size)
    except (AttributeError, OSError) as error:  # macOS has no such call, some network file systems refuse it
        if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        os.ftruncate(fd, size)


def _no_space(needed: int, free: int, folder: Path) -> str:
    return f"not enough disk space: needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB free at {folder}"
