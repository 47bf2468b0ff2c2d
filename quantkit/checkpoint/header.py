"""The safetensors header: which tensor lies at which bytes, believed only once it adds up.

A file is a u64 little-endian header length, a JSON header padded with spaces to 8 bytes, and the data without holes
(https://github.com/huggingface/safetensors#format). Headers are read without torch: a dtype is the tag that stands in
the file until somebody asks for torch's.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import UserError

if TYPE_CHECKING:
    import torch

# Every dtype both safetensors and torch know, as torch names it and with its bytes, in the order safetensors lays them
# in a file: widest alignment first.
DTYPES = {
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F64": ("float64", 8),
    "C64": ("complex64", 8),
    "F32": ("float32", 4),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "BF16": ("bfloat16", 2),
    "F16": ("float16", 2),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
_TAGS = {name: tag for tag, (name, _) in DTYPES.items()}
MAX_HEADER = 100_000_000  # safetensors' own limit
DAMAGED = "the file is damaged or was not fully downloaded; fetch it again"


def tag_of(dtype: "torch.dtype") -> str | None:
    """What safetensors calls a torch dtype; None where it has no name for it."""
    return _TAGS.get(str(dtype).removeprefix("torch."))


def torch_dtype(tag: str) -> "torch.dtype":
    """The torch dtype of a tag of DTYPES."""
    import torch

    return getattr(torch, DTYPES[tag][0])


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: bytes [start, stop) of file. For an old .bin file only stop - start, the size, counts.

    tag  safetensors' name of the dtype, a key of DTYPES
    """

    tag: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def dtype(self) -> "torch.dtype":
        return torch_dtype(self.tag)

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return DTYPES[self.tag][1]

    @property
    def is_float(self) -> bool:
        return self.tag.startswith(("F", "BF"))

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def pickled(self) -> bool:
        return self.file.suffix == ".bin"


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """A tensor to be written: its name, dtype and shape."""

    name: str
    dtype: "torch.dtype"
    shape: tuple[int, ...]

    @property
    def tag(self) -> str:
        """safetensors' name of the dtype; UserError where it has none."""
        tag = tag_of(self.dtype)
        if tag is None:
            raise UserError(f"{self.name}: safetensors files hold no {self.dtype}")
        return tag

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of one safetensors file; UserError unless they cover the file exactly, without overlap."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise UserError(f"{path}: the header should be {length} bytes, the file has {size}: {DAMAGED}")
            text = file.read(length)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check that the file exists and can be read") from error
    header = _parse_json(text, path, f"the header is not JSON: {DAMAGED}")
    header.pop("__metadata__", None)
    tensors = {name: _entry(path, name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != end:
            what = "overlaps the tensor before it" if info.start < end else "leaves a hole before it"
            raise UserError(f"{path}: {name} {what} (byte {info.start}, expected {end}): {DAMAGED}")
        end = info.stop
    if end != size:
        raise UserError(f"{path}: the header promises {end} bytes, the file has {size}: {DAMAGED}")
    return tensors


def _entry(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    try:
        tag, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(
            f"{path}: the header's entry of {name} lacks dtype, shape or data_offsets: {DAMAGED}"
        ) from error
    if not isinstance(tag, str) or tag not in DTYPES:
        raise UserError(f"{path}: {name} has dtype {tag!r}, which torch has no equal of; store it in another dtype")
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)) or stop < start:
        raise UserError(f"{path}: {name} has shape {shape} at bytes {start}..{stop}: {DAMAGED}")
    if math.prod(shape) * DTYPES[tag][1] != stop - start:
        raise UserError(f"{path}: {name} is {tag} {list(shape)} but takes {stop - start} bytes: {DAMAGED}")
    return TensorInfo(tag, shape, path, base + start, base + stop)


def build_header(layouts: Iterable[TensorLayout]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """(length word and header, name -> [start, stop) in the file) as safetensors itself would write them.

    Tensors are ordered by dtype, widest alignment first, then by name.
    """
    order = {tag: rank for rank, tag in enumerate(DTYPES)}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for layout in sorted(layouts, key=lambda t: (order[t.tag], t.name)):
        start, end = end, end + layout.nbytes
        header[layout.name] = {"dtype": layout.tag, "shape": list(layout.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    del header["__metadata__"]
    spans = {name: tuple(base + offset for offset in entry["data_offsets"]) for name, entry in header.items()}
    return len(text).to_bytes(8, "little") + text, spans


def read_json(path: Path, missing: str) -> dict[str, Any]:
    try:
        text = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is none; {missing}") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check its permissions") from error
    return _parse_json(text, path, "not valid JSON")


def _parse_json(text: bytes, path: Path, complaint: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(pairs) != len(dict(pairs)):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{path}: {twice} is listed twice: {DAMAGED}")
        return dict(pairs)

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {complaint} ({error})\nhint: fetch the file again, or repair it") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: {complaint} (a {type(value).__name__} where an object should be)")
    return value
