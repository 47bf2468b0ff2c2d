"""The GGUF header: keys, and which tensor lies at which bytes, believed only once it adds up.

A file is the magic, a u32 version, the number of tensors, the number of keys, the keys with their values, one entry for
each tensor, and the data: every tensor begins at a multiple of `general.alignment`, right behind the one before it
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the limits are those of llama.cpp's own reader, which takes
no hole, no other order, no nested array and no name of 64 bytes). Values are decoded only after all of it was judged:
until then, a few MiB of names are the most that a file can make us allocate. No torch.
"""

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from quantkit.checkpoint.header import DAMAGED, MAX_HEADER
from quantkit.errors import UserError
from quantkit.ggml_types import GGML_TYPES, TYPE_NAMES

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32  # where a file does not name one
MAX_NAME = 63  # bytes of a tensor's name
MAX_KEY = 65535
MAX_DIMS = 4
MAX_TENSORS = 1 << 16
MAX_KEYS = 1 << 14
MAX_NAMES = 8 << 20  # bytes of all keys and names together
MAX_ELEMENTS = (1 << 63) - 1
WINDOW = 1 << 20  # bytes that texts are looked through at a time
FAULTY = "the file is damaged, or a faulty program wrote it; fetch it or make it again"

# What a value is called, its struct code and its bytes, by its number in the file.
KINDS = {
    0: ("u8", "B", 1),
    1: ("i8", "b", 1),
    2: ("u16", "H", 2),
    3: ("i16", "h", 2),
    4: ("u32", "I", 4),
    5: ("i32", "i", 4),
    6: ("f32", "f", 4),
    7: ("bool", "?", 1),
    8: ("string", "", 8),  # at least: the length before it
    10: ("u64", "Q", 8),
    11: ("i64", "q", 8),
    12: ("f64", "d", 8),
}
ARRAY = 9


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies: `nbytes` bytes of the file from byte `start` on.

    type   a key of GGML_TYPES
    shape  as numpy has it: rows first, the columns of a row last
    """

    name: str
    type: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    path: Path


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A GGUF file, or all shards of one model (then `path` is the first shard, and so are the keys).

    metadata        value of each key: int, float, bool, str, or a list of these
    metadata_types  what each value is in the file: "u32", "string", "f32[]", ...
    tensors         in the file's order
    """

    path: Path
    version: int
    alignment: int
    metadata: dict[str, Any]
    metadata_types: dict[str, str]
    tensors: dict[str, GgufTensor]


@dataclass(frozen=True, slots=True)
class _Span:
    """A value not decoded yet: `count` of a kind at bytes [start, stop); count is None for one that is no array."""

    kind: int
    count: int | None
    start: int
    stop: int


def tensor_bytes(type_name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; a row of its shape is a whole number of blocks."""
    columns = shape[-1] if shape else 1
    return math.prod(shape[:-1]) * GGML_TYPES[type_name].row_bytes(columns)


def align(position: int, alignment: int) -> int:
    """The first multiple of alignment at or behind position."""
    return -(-position // alignment) * alignment


def parse_gguf(file: BinaryIO, path: Path) -> GgufFile:
    """What `read_gguf` returns, of an open file; `path` is what errors call it."""
    header = _Header(file, file.seek(0, os.SEEK_END), path)
    version = _check_beginning(header)
    tensor_count, key_count = header.number("<Q", "the number of tensors"), header.number("<Q", "the number of keys")
    header.check_count(tensor_count, "tensors", MAX_TENSORS, 8 + 1 + 4 + 4 + 8)
    header.check_count(key_count, "keys", MAX_KEYS, 8 + 1 + 4 + 1)
    spans: dict[str, _Span] = {}
    for i in range(key_count):
        key = header.text(MAX_KEY, f"key {i}")
        if key in spans:
            header.refuse(f"key {key!r:.100} is there twice", FAULTY)
        spans[key] = header.value(f"the value of key {key!r:.100}")
    alignment = _alignment(header, spans)
    entries: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for i in range(tensor_count):
        name = header.text(MAX_NAME, f"the name of tensor {i}")
        if name in entries:
            header.refuse(f"tensor {name!r} is there twice", FAULTY)
        entries[name] = _entry(header, f"tensor {name!r}")
    tensors = _place(header, entries, alignment)
    types = {key: KINDS[span.kind][0] + "[]" * (span.count is not None) for key, span in spans.items()}
    metadata = {key: header.decode(span) for key, span in spans.items()}
    return GgufFile(path, version, alignment, metadata, types, tensors)


class _Header:
    """Goes through a header in order; nothing is read or allocated before it is known to lie inside the file."""

    def __init__(self, file: BinaryIO, size: int, path: Path) -> None:
        self.file, self.size, self.path = file, size, path
        self.at = 0
        self.names = 0

    def refuse(self, what: str, hint: str) -> NoReturn:
        raise UserError(f"{self.path}: {what}\nhint: {hint}")

    def skip(self, count: int, what: str) -> None:
        """Go on by `count` bytes, if the file has them."""
        if count > self.size - self.at:
            self.refuse(f"{what} should take {count} bytes from byte {self.at} on, the file has {self.size}", DAMAGED)
        self.at += count
        if self.at > MAX_HEADER:
            self.refuse(f"the header goes on beyond byte {MAX_HEADER}, at {what}: no model has so much", FAULTY)

    def take(self, count: int, what: str) -> bytes:
        start = self.at
        self.skip(count, what)
        return self.read(start, self.at)

    def read(self, start: int, stop: int) -> bytes:
        self.file.seek(start)
        raw = self.file.read(stop - start)
        if len(raw) != stop - start:
            self.refuse("the file became shorter while it was read", "wait until it is fully written")
        return raw

    def number(self, code: str, what: str) -> int:
        return struct.unpack(code, self.take(struct.calcsize(code), what))[0]

    def check_count(self, count: int, what: str, most: int, least_bytes: int) -> None:
        """Refuse a count that the rest of the file cannot hold, or that nobody needs."""
        if count * least_bytes > self.size - self.at:
            self.refuse(f"the header announces {count} {what}, more than a file of {self.size} bytes holds", DAMAGED)
        if count > most:
            self.refuse(f"the header announces {count} {what}, expected at most {most}", FAULTY)

    def text(self, most: int, what: str) -> str:
        """A key or a tensor's name."""
        length = self.number("<Q", f"the length of {what}")
        start = self.at
        self.skip(length, what)
        if not 0 < length <= most:
            begins = f"; it begins {self.read(start, start + most + 1)[:80]!r}" if length else ""
            self.refuse(f"{what}, at byte {start}, is {length} bytes long, expected 1 to {most}{begins}", FAULTY)
        self.names += length
        if self.names > MAX_NAMES:
            self.refuse(f"keys and names take more than {MAX_NAMES} bytes: no model has so many", FAULTY)
        raw = self.read(start, self.at)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.refuse(f"{what}, at byte {start}, is not UTF-8: {raw[:80]!r}", FAULTY)

    def value(self, what: str) -> _Span:
        """Go over a value without decoding it."""
        kind, count = self.number("<i", f"the type of {what}"), None
        if kind == ARRAY:
            kind, count = self.number("<i", f"the type in {what}"), self.number("<Q", f"the length of {what}")
            if kind == ARRAY:
                self.refuse(f"{what} is an array of arrays, expected an array of plain values", FAULTY)
        if kind not in KINDS:
            self.refuse(f"{what} is of type {kind}, expected a type of GGUF {VERSION}: 0 to {max(KINDS)}", FAULTY)
        start, items = self.at, 1 if count is None else count
        if KINDS[kind][0] == "string":
            self._skip_strings(items, what)
        else:
            self.skip(items * KINDS[kind][2], what)
        return _Span(kind, count, start, self.at)

    def _skip_strings(self, count: int, what: str) -> None:
        self.skip(8 * count, what)  # as much as empty ones take: a count that cannot be is refused at once
        self.at -= 8 * count
        at, base, window = self.at, 0, b""
        for _ in range(count):
            self.skip(8, what)
            if self.at > base + len(window):
                base, window = at, self.read(at, min(at + WINDOW, self.size))
            self.skip(int.from_bytes(window[at - base : at - base + 8], "little"), what)
            at = self.at

    def decode(self, span: _Span) -> Any:
        """The value that lies there."""
        raw, count = self.read(span.start, span.stop), 1 if span.count is None else span.count
        if KINDS[span.kind][0] == "string":
            values, at = [], 0
            for _ in range(count):
                end = at + 8 + int.from_bytes(raw[at : at + 8], "little")
                # Readers take any bytes, and some old files have tokens that are parts of characters.
                values.append(raw[at + 8 : end].decode(errors="replace"))
                at = end
        else:
            values = list(struct.unpack(f"<{count}{KINDS[span.kind][1]}", raw))
        return values[0] if span.count is None else values


def _check_beginning(header: _Header) -> int:
    """The version, 3."""
    if not header.size:
        header.refuse("the file is empty", DAMAGED)
    magic = header.take(min(8, header.size), "the beginning")
    if magic == bytes(4) + struct.pack("<I", VERSION):
        hint = "wait for that run, or start it again: it goes on where it stopped"
        header.refuse("the file is unfinished: the run that writes it is not done, or was killed", hint)
    if magic[:4] != MAGIC:
        header.refuse(f"not a GGUF file: it begins {magic!r}, expected {MAGIC!r}", "name a .gguf file")
    header.at = 4
    version = header.number("<I", "the version")
    if version & 0xFFFF == 0 and version:
        header.refuse(
            "the file is big-endian (its version, 3, has its bytes in reverse), expected little-endian",
            "fetch or make the file for little-endian machines",
        )
    if version != VERSION:
        hint = "a newer quantkit may read it" if version > VERSION else "fetch a newer file, or convert the model again"
        header.refuse(f"GGUF version {version}, expected {VERSION}", hint)
    return version


def _alignment(header: _Header, spans: dict[str, _Span]) -> int:
    span = spans.get("general.alignment")
    if span is None:
        return ALIGNMENT
    kind = KINDS[span.kind][0] + "[]" * (span.count is not None)
    if kind != "u32":
        header.refuse(f"general.alignment is of type {kind}, expected u32", FAULTY)
    value = header.decode(span)
    if value & (value - 1) or not value:
        header.refuse(f"general.alignment is {value}, expected a power of two", FAULTY)
    return value


def _entry(header: _Header, what: str) -> tuple[str, tuple[int, ...], int]:
    """Type, shape (rows first) and offset in the data of the tensor whose name was just read."""
    rank = header.number("<I", f"the number of dimensions of {what}")
    if rank > MAX_DIMS:
        header.refuse(f"{what} has {rank} dimensions, expected at most {MAX_DIMS}", FAULTY)
    *dims, number, offset = struct.unpack(f"<{rank}qiQ", header.take(8 * rank + 12, f"the entry of {what}"))
    shape = tuple(dims[::-1])
    if min(shape, default=1) < 1:
        header.refuse(f"{what} has shape {list(shape)}, expected dimensions of at least 1", FAULTY)
    if math.prod(shape) > MAX_ELEMENTS:
        header.refuse(f"{what} has shape {list(shape)}, more elements than a file can hold", FAULTY)
    if number not in TYPE_NAMES:
        header.refuse(
            f"{what} is of type {number}, which is none of llama.cpp's that quantkit knows (0 to {max(TYPE_NAMES)})",
            "another program's own type, or a newer one: quantize the model again with a type of llama.cpp's",
        )
    name = TYPE_NAMES[number]
    columns, block = shape[-1] if shape else 1, GGML_TYPES[name].columns
    if columns % block:
        header.refuse(f"{what} is {name} with rows of {columns}, expected a multiple of its block of {block}", FAULTY)
    return name, shape, offset


def _place(
    header: _Header, entries: dict[str, tuple[str, tuple[int, ...], int]], alignment: int
) -> dict[str, GgufTensor]:
    """Where each tensor lies in the file, one behind the other."""
    base = align(header.at, alignment)
    expected = 0
    tensors = {}
    for name, (type_name, shape, offset) in entries.items():
        nbytes = tensor_bytes(type_name, shape)
        where = f"tensor {name!r} begins at byte {offset} of the data"
        if offset % alignment:
            header.refuse(f"{where}, expected a multiple of the alignment, {alignment}", FAULTY)
        if offset < expected:
            header.refuse(f"{where} and overlaps the tensor before it, expected byte {expected}", FAULTY)
        if base + offset + nbytes > header.size:
            ends = f"{where} and ends at byte {base + offset + nbytes} of the file, which has {header.size} bytes"
            header.refuse(ends, DAMAGED)
        if offset > expected:
            header.refuse(f"{where} and leaves a hole before it, expected byte {expected}", FAULTY)
        tensors[name] = GgufTensor(name, type_name, shape, base + offset, nbytes, header.path)
        expected = align(offset + nbytes, alignment)
    return tensors
