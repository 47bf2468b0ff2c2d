"""Write GGUF files whose every byte has its place before the first tensor exists.

The bytes are those of the `gguf` package's GGUFWriter, and the shards those of llama.cpp's gguf-split: all keys in the
first, the `split.*` keys in each, no tensor cut. An unfinished file has no magic: no engine takes it for a model.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from quantkit.checkpoint.gguf_file import SPLIT_KEYS, read_gguf, shard_path
from quantkit.checkpoint.gguf_header import (
    ALIGNMENT,
    ARRAY,
    KINDS,
    MAGIC,
    MAX_DIMS,
    MAX_NAME,
    VERSION,
    align,
    tensor_bytes,
)
from quantkit.checkpoint.preallocation import PlannedFile, PreallocatedFiles, group_by_size
from quantkit.errors import RunError, UserError
from quantkit.ggml_types import GGML_TYPES

KeyValue = tuple[str, Any]  # what the value is in the file ("u32", "string", "f32[]", ...), and the value

MAX_SHARDS = (1 << 16) - 1  # split.count is a u16
SHARD_HEADER = 256  # bytes of each shard that are no tensor's, at most, without the model's keys
_NUMBERS = {name: (number, code) for number, (name, code, _) in KINDS.items()}


@dataclass(frozen=True, slots=True)
class GgufLayout:
    """A tensor to be written: a key of GGML_TYPES, and its shape as numpy has it, rows first."""

    name: str
    type: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.type, self.shape)


class GgufWriter:
    """GGUF files under `folder`, filled in any order.

    metadata         keys in file order; `general.alignment` (u32) is heeded
    tensors          in file order
    max_shard_bytes  tensor bytes a shard holds at most, unless one tensor alone is larger
    stem             the files are STEM.gguf, or STEM-00001-of-0000N.gguf
    created          names of the tensors whose file did not exist yet: on resume no finished one may be here

    Files found in the folder with the very header they should have are written on; any other content is a RunError.
    DiskFullError naming needed and free bytes where the disk is too small, before anything of it is left behind.
    UserError for a name or a value that a GGUF file cannot hold.
    """

    def __init__(
        self,
        folder: Path,
        metadata: Mapping[str, KeyValue],
        tensors: list[GgufLayout],
        max_shard_bytes: int,
        stem: str = "model",
    ) -> None:
        self.layouts = {layout.name: layout for layout in tensors}
        assert len(self.layouts) == len(tensors), "a tensor name is laid out twice"
        for layout in tensors:
            _check(layout)
        self._files = PreallocatedFiles(folder, _plan(folder, metadata, tensors, max_shard_bytes, stem))
        self.created = self._files.created

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(layout.nbytes for layout in self.layouts.values())

    @property
    def paths(self) -> list[Path]:
        """The files, in order."""
        return [file.path for file in self._files.files]

    def write_at(self, name: str, start: int, data: Tensor) -> None:
        """Put uint8 data (any device, any shape) at byte `start` of a tensor's own."""
        self._check_span(name, start, start + data.numel())
        assert data.element_size() == 1, data.dtype
        self._files.write(name, data.cpu().contiguous(), start)

    def read_at(self, name: str, start: int, stop: int) -> Tensor:
        """Bytes [start, stop) of a tensor, written before (by this run or the one it goes on from), as uint8."""
        self._check_span(name, start, stop)
        return self._files.read(name, start, stop)

    def sync(self) -> None:
        """Return once everything written so far is on the disk."""
        self._files.sync()

    def finish(self) -> None:
        """Sync, make the files readable, read every header back and close."""
        self._files.seal()
        for file in self._files.files:
            found = {(t.name, t.type, t.shape, t.start) for t in read_gguf(file.path).tensors.values()}
            layouts = [(self.layouts[name], start) for name, (start, _) in file.spans.items()]
            if found != {(layout.name, layout.type, tuple(layout.shape), start) for layout, start in layouts}:
                raise RunError(f"{file.path}: the header changed under the run; something else writes into this folder")
        self.close()

    def close(self) -> None:
        """Close the files; what was written stays."""
        self._files.close()

    def _check_span(self, name: str, start: int, stop: int) -> None:
        size = self.layouts[name].nbytes
        if not 0 <= start <= stop <= size:
            raise RunError(f"{name}: bytes {start} to {stop} of a tensor of {size} bytes")


def _check(layout: GgufLayout) -> None:
    length, block = len(layout.name.encode()), GGML_TYPES[layout.type].columns
    if not 0 < length <= MAX_NAME:
        raise UserError(
            f"tensor {layout.name!r}: a name of {length} bytes, GGUF files hold names of 1 to {MAX_NAME}\n"
            "hint: rename the tensor in the model's folder"
        )
    if len(layout.shape) > MAX_DIMS or min(layout.shape, default=1) < 1 or (layout.shape or (1,))[-1] % block:
        raise UserError(
            f"tensor {layout.name!r}: shape {list(layout.shape)} as {layout.type}, expected at most {MAX_DIMS} "
            f"dimensions of at least 1 and rows of a multiple of {block}\nhint: choose another type for it"
        )


def _plan(
    folder: Path, metadata: Mapping[str, KeyValue], tensors: list[GgufLayout], max_shard_bytes: int, stem: str
) -> list[PlannedFile]:
    alignment = metadata.get("general.alignment", ("u32", ALIGNMENT))[1]
    groups = group_by_size([align(layout.nbytes, alignment) for layout in tensors], max_shard_bytes) or [[]]
    if len(groups) > MAX_SHARDS:
        raise UserError(f"{len(groups)} shards, GGUF counts up to {MAX_SHARDS}\nhint: allow larger shards")
    files = []
    for i, group in enumerate(groups):
        keys = dict(metadata) if i == 0 else {k: v for k, v in metadata.items() if k == "general.alignment"}
        if len(groups) > 1:
            values = (i, len(groups), len(tensors))
            keys |= {key: (kind, value) for (key, kind), value in zip(SPLIT_KEYS.items(), values, strict=True)}
        header, spans, size = build_gguf_header(keys, [tensors[j] for j in group], alignment)
        path = shard_path(folder, stem, i, len(groups))
        files.append(PlannedFile(path, header, spans, size, seal=len(MAGIC)))
    return files


def build_gguf_header(
    metadata: Mapping[str, KeyValue], tensors: list[GgufLayout], alignment: int = ALIGNMENT
) -> tuple[bytes, dict[str, tuple[int, int]], int]:
    """(header with its padding, name -> [start, stop) in the file, size of the file), as GGUFWriter writes them."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_text(key), _value(key, value)]
    offset = 0
    offsets = []
    for layout in tensors:
        rank, number = len(layout.shape), GGML_TYPES[layout.type].number
        parts += [_text(layout.name), struct.pack(f"<I{rank}qiQ", rank, *reversed(layout.shape), number, offset)]
        offsets.append(offset)
        offset = align(offset + layout.nbytes, alignment)
    header = b"".join(parts)
    header += bytes(align(len(header), alignment) - len(header))
    base = len(header)
    spans = {t.name: (base + start, base + start + t.nbytes) for t, start in zip(tensors, offsets, strict=True)}
    return header, spans, base + offset


def header_bytes(metadata: Mapping[str, KeyValue], tensors: list[GgufLayout], size: int, max_shard_bytes: int) -> int:
    """Bytes of the headers of a model's files, whatever the types; where `size` bytes need shards, at most."""
    header, _, _ = build_gguf_header(metadata, tensors)
    return len(header) + (0 if size <= max_shard_bytes else SHARD_HEADER * (1 + 2 * size // max_shard_bytes))


def _value(key: str, value: KeyValue) -> bytes:
    """Type and value of a key; UserError where the value is none of that type."""
    kind, content = value
    number, code = _NUMBERS[kind.removesuffix("[]")]
    items = list(content) if kind.endswith("[]") else [content]
    try:
        raw = b"".join(map(_text, items)) if not code else struct.pack(f"<{len(items)}{code}", *items)
    except (struct.error, OverflowError, UnicodeEncodeError, AttributeError) as error:
        raise UserError(
            f"{key}: {content!r:.80} is no {kind} of a GGUF file ({error})\n"
            "hint: check the model's config.json and tokenizer files"
        ) from error
    return (
        struct.pack("<iiQ", ARRAY, number, len(items)) + raw if kind.endswith("[]") else struct.pack("<i", number) + raw
    )


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
