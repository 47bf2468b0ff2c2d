"""A run's GGUF file, written and read back under the checkpoint's names, as a ShardWriter is.

Here the tensors of the two differ: rows of queries and keys are in another order, some norms are stored one higher,
experts lie in one tensor, and everything has another type.
"""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from quantkit.checkpoint.gguf_writer import GgufWriter, KeyValue
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import RunError
from quantkit.formats.gguf.block_bytes import FLOATS, unpack
from quantkit.formats.gguf.tensor_names import Place, row_order
from quantkit.ggml_types import GGML_TYPES, QUANTIZED
from quantkit.grids.dequantize import dequantize
from quantkit.quantization.gguf_layout import GgufPlan
from quantkit.types import block_spec

CHUNK = 64 << 20  # bytes of a tensor that are copied at a time


class GgufOutput:
    """The file `plan` describes, in `folder`. Tensors are named as in the checkpoint; `created` too."""

    def __init__(self, folder: Path, plan: GgufPlan, metadata: Mapping[str, KeyValue], max_shard_bytes: int) -> None:
        self.plan = plan
        self.writer = GgufWriter(folder, metadata, plan.layouts(), max_shard_bytes)
        self.created = self.writer.created

    @property
    def data_bytes(self) -> int:
        return self.writer.data_bytes

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a whole tensor at its place: blocks (uint8 [N, bytes of a row]) where its type is quantized."""
        place = self.plan.places[name]
        data = tensor if place.heads is None else tensor[torch.from_numpy(row_order(len(tensor), place.heads))]
        self._put(place, 0, data)

    def write_rows(self, name: str, start: int, rows: Tensor) -> None:
        """Put rows [start, start + len(rows)) at their place; not of queries and keys, whose rows move."""
        place = self.plan.places[name]
        assert place.heads is None
        self._put(place, start, rows)

    def write_extra(self) -> None:
        """Write what no checkpoint tensor stands for."""
        for name, values in self.plan.extra.items():
            self.writer.write_at(name, 0, torch.from_numpy(values).contiguous().view(torch.uint8).flatten())

    def copy_from(self, checkpoint: Checkpoint, source: str, name: str) -> None:
        """Write a float tensor of the checkpoint, as its type here; nothing where the file has no place for it."""
        place = self.plan.places.get(name)
        if place is None:
            return
        info = checkpoint.info(source)
        if place.heads is not None or len(info.shape) < 2:
            self.write(name, checkpoint.read(source))
            return
        step = max(1, CHUNK // max(1, info.nbytes // info.shape[0]))
        for start in range(0, info.shape[0], step):
            index = torch.arange(start, min(start + step, info.shape[0]))
            self._put(place, start, checkpoint.rows(source, index))

    def read(self, name: str) -> Tensor:
        """A tensor written before: blocks as they were given, or floats in the type they are stored as."""
        place = self.plan.places[name]
        shape, kind = self._shape(place), self.plan.types[place.tensor]
        start = self._start(place, 0)
        data = self.writer.read_at(place.tensor, start, start + self._row_bytes(place) * _rows(shape))
        rows = data.view(_rows(shape), -1)
        if kind in FLOATS:
            rows = data.view(FLOATS[kind]).view(shape)
            rows = rows - 1 if place.plus_one else rows
        return rows if place.heads is None else rows[torch.argsort(torch.from_numpy(row_order(len(rows), place.heads)))]

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Rows (int64 index) of a written table, decoded to float32."""
        place = self.plan.places[name]
        kind, size = self.plan.types[place.tensor], self._row_bytes(place)
        wanted, back = torch.unique(index.reshape(-1), return_inverse=True)
        data = torch.empty(len(wanted), size, dtype=torch.uint8)
        breaks = [0, *(torch.nonzero(wanted.diff() != 1).flatten() + 1).tolist(), len(wanted)]
        for begin, end in itertools.pairwise(breaks):
            if end > begin:
                start, stop = int(wanted[begin]) * size, (int(wanted[end - 1]) + 1) * size
                data[begin:end] = self.writer.read_at(place.tensor, start, stop).view(end - begin, size)
        if kind in FLOATS:
            return data.view(FLOATS[kind]).float()[back]
        K = size // GGML_TYPES[kind].nbytes * GGML_TYPES[kind].columns
        return dequantize(unpack(data, block_spec(kind), K))[back]

    def sync(self) -> None:
        self.writer.sync()

    def finish(self) -> None:
        self.writer.finish()

    def close(self) -> None:
        self.writer.close()

    def _put(self, place: Place, start: int, rows: Tensor) -> None:
        kind = self.plan.types[place.tensor]
        if kind in QUANTIZED:
            if rows.dtype != torch.uint8 or rows.shape[-1] != self._row_bytes(place):
                raise RunError(f"{place.tensor}: {rows.dtype} {list(rows.shape)} was to be written as {kind}")
            data = rows
        else:
            data = ((rows.float() + 1) if place.plus_one else rows).to(FLOATS[kind])
        flat = data.cpu().contiguous().view(torch.uint8).flatten()
        self.writer.write_at(place.tensor, self._start(place, start), flat)

    def _shape(self, place: Place) -> tuple[int, ...]:
        shape = self.plan.shapes[place.tensor]
        return shape if place.expert is None else shape[1:]

    def _row_bytes(self, place: Place) -> int:
        """Bytes of a row; of one number where the tensor is a vector."""
        shape, kind = self._shape(place), GGML_TYPES[self.plan.types[place.tensor]]
        return kind.nbytes if len(shape) == 1 else kind.row_bytes(shape[-1])

    def _start(self, place: Place, row: int) -> int:
        before = (place.expert or 0) * _rows(self._shape(place))
        return (before + row) * self._row_bytes(place)


def _rows(shape: tuple[int, ...]) -> int:
    return math.prod(shape if len(shape) == 1 else shape[:-1])
