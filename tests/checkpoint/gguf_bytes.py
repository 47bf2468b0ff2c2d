"""GGUF files byte by byte, as wrong as a test wants them, written from the format's description alone."""

import struct
from dataclasses import dataclass, replace

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)


def text(value: str | bytes, length: int | None = None) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def string(value: str | bytes, length: int | None = None) -> bytes:
    return struct.pack("<i", STRING) + text(value, length)


def u32(value: int) -> bytes:
    return struct.pack("<iI", U32, value)


def array(kind: int, count: int, raw: bytes) -> bytes:
    return struct.pack("<iiQ", ARRAY, kind, count) + raw


@dataclass(frozen=True)
class Entry:
    """A tensor's entry in the header; dims as the file has them: columns first."""

    name: str | bytes
    dims: tuple[int, ...] = (8, 2)
    type: int = 0
    offset: int = 0
    rank: int | None = None
    length: int | None = None

    def raw(self) -> bytes:
        rank = len(self.dims) if self.rank is None else self.rank
        dims = b"".join(struct.pack("<Q", n % 2**64) for n in self.dims)
        place = struct.pack("<iQ", self.type, self.offset % 2**64)
        return text(self.name, self.length) + struct.pack("<I", rank) + dims + place


@dataclass(frozen=True)
class Gguf:
    """A whole file: sound by default, two tensors F32 [2, 8] and Q8_0 [1, 32]."""

    keys: tuple[tuple[str | bytes, bytes], ...] = (
        ("general.architecture", string("llama")),
        ("llama.block_count", u32(1)),
        ("tokenizer.ggml.tokens", array(STRING, 3, text("a") + text("é") + text(""))),
        ("tokenizer.ggml.scores", array(F32, 2, struct.pack("<ff", 1.5, -2))),
    )
    tensors: tuple[Entry, ...] = (Entry("token_embd.weight"), Entry("output.weight", (32, 1), 8, 64))
    data: bytes = bytes(64 + 64)
    magic: bytes = b"GGUF"
    version: int = 3
    order: str = "<"
    key_count: int | None = None
    tensor_count: int | None = None
    alignment: int = 32

    def raw(self) -> bytes:
        tensors = len(self.tensors) if self.tensor_count is None else self.tensor_count
        keys = len(self.keys) if self.key_count is None else self.key_count
        header = self.magic + struct.pack(self.order + "IQQ", self.version, tensors % 2**64, keys % 2**64)
        header += b"".join(text(key) + value for key, value in self.keys)
        header += b"".join(entry.raw() for entry in self.tensors)
        return header + bytes(-len(header) % self.alignment) + self.data


def with_key(key: str | bytes, value: bytes) -> Gguf:
    """The sound file and one more key."""
    return replace(Gguf(), keys=(*Gguf().keys, (key, value)))


def with_tensor(**changes: object) -> Gguf:
    """The sound file, its second tensor changed."""
    first, second = Gguf().tensors
    return replace(Gguf(), tensors=(first, replace(second, **changes)))  # type: ignore[arg-type]
