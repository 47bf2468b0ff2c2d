"""Write a checkpoint whose every byte has its place before the first tensor exists.

Headers and file sizes follow from names, dtypes and shapes alone, so shards are allocated up front, a tensor is written
where it belongs whenever it is ready, a killed run goes on in the same files, and the same tensors give the same bytes.
"""

import json
import os
from pathlib import Path

from torch import Tensor

from quantkit.checkpoint.header import TensorLayout, build_header, read_header
from quantkit.checkpoint.output_folder import copy_side_files
from quantkit.checkpoint.preallocation import PlannedFile, PreallocatedFiles, group_by_size
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import RunError

__all__ = ["ShardWriter", "TensorLayout", "copy_side_files"]

INDEX = "model.safetensors.index.json"


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
        self._files = PreallocatedFiles(folder, self._shards)
        self.created = self._files.created

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(layout.nbytes for layout in self.layouts.values())

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor of the announced dtype and shape (any device, any strides) at its place."""
        layout = self.layouts[name]
        if (tensor.dtype, tuple(tensor.shape)) != (layout.dtype, tuple(layout.shape)):
            got, expected = f"{tensor.dtype} {list(tensor.shape)}", f"{layout.dtype} {list(layout.shape)}"
            raise RunError(f"{name}: {got} was to be written where the layout has {expected}")
        self._files.write(name, tensor.cpu().contiguous())

    def write_rows(self, name: str, start: int, rows: Tensor) -> None:
        """Put rows [start, start + len(rows)) of a tensor at their place: large ones come a part at a time."""
        layout = self.layouts[name]
        got, expected = (rows.dtype, tuple(rows.shape[1:])), (layout.dtype, tuple(layout.shape[1:]))
        if got != expected or start + len(rows) > layout.shape[0]:
            raise RunError(f"{name}: rows {start} to {start + len(rows)} of {got} do not fit into {layout}")
        row = layout.nbytes // max(1, layout.shape[0])
        self._files.write(name, rows.cpu().contiguous(), start * row)

    def copy_from(self, checkpoint: Checkpoint, source: str, name: str) -> None:
        """Copy a tensor's bytes from another checkpoint; dtype and shape must be the announced ones."""
        info, layout = checkpoint.info(source), self.layouts[name]
        if (info.dtype, info.shape) != (layout.dtype, tuple(layout.shape)):
            got, expected = f"{info.dtype} {list(info.shape)}", f"{layout.dtype} {list(layout.shape)}"
            raise RunError(f"{name}: {source} is {got}, the layout has {expected}")
        file, start = self._files.where(name)
        try:
            checkpoint.copy(source, file.fd, start)
        except OSError as error:
            raise self._files.explain(error, file.path) from error

    def read(self, name: str) -> Tensor:
        """A tensor written before (by this run or the one it goes on from), in memory of its own."""
        layout = self.layouts[name]
        return self._files.read(name).view(layout.dtype).reshape(layout.shape)

    def sync(self) -> None:
        """Return once everything written so far is on the disk."""
        self._files.sync()

    def finish(self) -> None:
        """Sync, write the index (of several shards), read every header back and close."""
        self.sync()
        if len(self._shards) > 1:
            weight_map = {name: shard.path.name for shard in self._shards for name in shard.spans}
            index = {"metadata": {"total_size": self.data_bytes}, "weight_map": dict(sorted(weight_map.items()))}
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
        self._files.close()


def _make_shards(folder: Path, units: list[list[TensorLayout]], max_shard_bytes: int) -> list[PlannedFile]:
    groups = group_by_size([sum(layout.nbytes for layout in unit) for unit in units], max_shard_bytes)
    shards = []
    for i, group in enumerate(groups, start=1):
        name = "model.safetensors" if len(groups) == 1 else f"model-{i:05}-of-{len(groups):05}.safetensors"
        header, spans = build_header(layout for unit in group for layout in units[unit])
        size = max((stop for _, stop in spans.values()), default=len(header))
        shards.append(PlannedFile(folder / name, header, spans, size))
    return shards


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
