"""Write a checkpoint whose every byte has its place before the first tensor exists.

Headers and file sizes follow from names, dtypes and shapes alone, so shards are allocated up front, a tensor is written
where it belongs whenever it is ready, a killed run goes on in the same files, and the same tensors give the same bytes.
"""

import errno
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantkit.checkpoint.header import TensorLayout, build_header, read_header
from quantkit.checkpoint.output_folder import copy_side_files
from quantkit.checkpoint.rawio import read_into, write_at, write_bytes
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import DiskFullError, RunError

__all__ = ["ShardWriter", "TensorLayout", "copy_side_files"]

INDEX = "model.safetensors.index.json"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(slots=True)
class _Shard:
    path: Path
    header: bytes
    spans: dict[str, tuple[int, int]]
    size: int
    fd: int = -1
    touched: bool = False


class ShardWriter:
    """Safetensors files under `folder` for the tensors of all units, filled in any order.

    units           tensors that stay together in a shard (a module's), in file order
    max_shard_bytes tensor bytes a shard holds at most, unless one unit alone is larger
    created         names of the tensors whose shard did not exist yet: on resume no finished one may be here

    Shards found in the folder with the very header they should have are written on; any other content is a RunError.
    DiskFullError naming needed and free bytes where the disk is too small, before anything of it is left behind.
    """

    def __init__(self, folder: Path, units: list[list[TensorLayout]], max_shard_bytes: int) -> None:
        self.folder = folder
        self.layouts = {layout.name: layout for unit in units for layout in unit}
        assert len(self.layouts) == sum(map(len, units)), "a tensor name is laid out twice"
        self._shards = _make_shards(folder, units, max_shard_bytes)
        self._of = {name: shard for shard in self._shards for name in shard.spans}
        folder.mkdir(parents=True, exist_ok=True)
        self.created = self._allocate()

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(layout.nbytes for layout in self.layouts.values())

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor of the announced dtype and shape (any device, any strides) at its place."""
        layout, shard = self.layouts[name], self._of[name]
        if (tensor.dtype, tuple(tensor.shape)) != (layout.dtype, tuple(layout.shape)):
            got, expected = f"{tensor.dtype} {list(tensor.shape)}", f"{layout.dtype} {list(layout.shape)}"
            raise RunError(f"{name}: {got} was to be written where the layout has {expected}")
        shard.touched = True
        try:
            write_at(shard.fd, tensor.cpu().contiguous(), shard.spans[name][0])
        except OSError as error:
            raise self._explain(error, shard.path) from error

    def write_rows(self, name: str, start: int, rows: Tensor) -> None:
        """Put rows [start, start + len(rows)) of a tensor at their place: large ones come a part at a time."""
        layout, shard = self.layouts[name], self._of[name]
        got, expected = (rows.dtype, tuple(rows.shape[1:])), (layout.dtype, tuple(layout.shape[1:]))
        if got != expected or start + len(rows) > layout.shape[0]:
            raise RunError(f"{name}: rows {start} to {start + len(rows)} of {got} do not fit into {layout}")
        shard.touched = True
        row = layout.nbytes // max(1, layout.shape[0])
        try:
            write_at(shard.fd, rows.cpu().contiguous(), shard.spans[name][0] + start * row)
        except OSError as error:
            raise self._explain(error, shard.path) from error

    def copy_from(self, checkpoint: Checkpoint, source: str, name: str) -> None:
        """Copy a tensor's bytes from another checkpoint; dtype and shape must be the announced ones."""
        info, layout, shard = checkpoint.info(source), self.layouts[name], self._of[name]
        if (info.dtype, info.shape) != (layout.dtype, tuple(layout.shape)):
            got, expected = f"{info.dtype} {list(info.shape)}", f"{layout.dtype} {list(layout.shape)}"
            raise RunError(f"{name}: {source} is {got}, the layout has {expected}")
        shard.touched = True
        try:
            checkpoint.copy(source, shard.fd, shard.spans[name][0])
        except OSError as error:
            raise self._explain(error, shard.path) from error

    def read(self, name: str) -> Tensor:
        """A tensor written before (by this run or the one it goes on from), in memory of its own."""
        layout, shard = self.layouts[name], self._of[name]
        start, stop = shard.spans[name]
        raw = torch.empty(stop - start, dtype=torch.uint8)
        read_into(shard.fd, raw, start, shard.path)
        return raw.view(layout.dtype).reshape(layout.shape)

    def sync(self) -> None:
        """Return once everything written so far is on the disk."""
        for shard in self._shards:
            if shard.touched:
                shard.touched = False
                try:
                    os.fsync(shard.fd)
                except OSError as error:
                    raise self._explain(error, shard.path) from error

    def finish(self) -> None:
        """Sync, write the index (of several shards), read every header back and close."""
        self.sync()
        if len(self._shards) > 1:
            weight_map = {name: shard.path.name for name, shard in sorted(self._of.items())}
            index = {"metadata": {"total_size": self.data_bytes}, "weight_map": weight_map}
            _write_text(self.folder / INDEX, json.dumps(index, indent=2) + "\n")
        for shard in self._shards:
            found = {(name, i.tag, i.shape, i.start) for name, i in read_header(shard.path).items()}
            expected = {
                (name, self.layouts[name].tag, tuple(self.layouts[name].shape), span[0])
                for name, span in shard.spans.items()
            }
            if found != expected:
                raise RunError(
                    f"{shard.path}: the header changed under the run; something else writes into this folder"
                )
        self.close()

    def close(self) -> None:
        """Close the files; what was written stays."""
        for shard in self._shards:
            if shard.fd >= 0:
                os.close(shard.fd)
                shard.fd = -1

    def _allocate(self) -> frozenset[str]:
        missing = [shard for shard in self._shards if not self._reopen(shard)]
        needed, free = sum(shard.size for shard in missing), shutil.disk_usage(self.folder).free
        if needed > free:
            self.close()
            raise DiskFullError(_no_space(needed, free, self.folder))
        made: list[_Shard] = []
        try:
            for shard in missing:
                made.append(shard)
                shard.fd = os.open(shard.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
                _reserve(shard.fd, shard.size)
                # A header counts once its length word is there, so a kill in between leaves a file that is made again.
                write_bytes(shard.fd, memoryview(shard.header)[8:], 8)
                os.fsync(shard.fd)
                write_bytes(shard.fd, memoryview(shard.header)[:8], 0)
                os.fsync(shard.fd)
        except OSError as error:
            self.close()
            for shard in made:
                shard.path.unlink(missing_ok=True)
            free = shutil.disk_usage(self.folder).free
            if error.errno in FULL:
                raise DiskFullError(_no_space(needed, free, self.folder)) from error
            raise RunError(str(error)) from error
        return frozenset(name for shard in missing for name in shard.spans)

    def _reopen(self, shard: _Shard) -> bool:
        """Open a shard left by a run that was killed; False where there is none yet, or only the beginnings of one."""
        if not shard.path.exists():
            return False
        fd = os.open(shard.path, os.O_RDWR | os.O_CLOEXEC)
        found = os.pread(fd, len(shard.header), 0)
        if not found[:8].strip(b"\0"):
            os.close(fd)
            return False
        if found != shard.header or os.fstat(fd).st_size != shard.size:
            os.close(fd)
            self.close()
            raise RunError(f"{shard.path} exists and is not what this run would write; move it away or restart the run")
        shard.fd = fd
        return True

    def _explain(self, error: OSError, path: Path) -> RunError:
        if error.errno in FULL:
            return DiskFullError(_no_space(self.data_bytes, shutil.disk_usage(self.folder).free, self.folder))
        return RunError(f"{path}: {error.strerror}")


def _make_shards(folder: Path, units: list[list[TensorLayout]], max_shard_bytes: int) -> list[_Shard]:
    groups: list[list[TensorLayout]] = []
    room = 0
    for unit in units:
        size = sum(layout.nbytes for layout in unit)
        if not groups or size > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1] += unit
        room -= size
    shards = []
    for i, group in enumerate(groups, start=1):
        name = "model.safetensors" if len(groups) == 1 else f"model-{i:05}-of-{len(groups):05}.safetensors"
        header, spans = build_header(group)
        shards.append(
            _Shard(folder / name, header, spans, max((stop for _, stop in spans.values()), default=len(header)))
        )
    return shards


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


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
