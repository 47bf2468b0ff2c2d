"""What a calibration file holds, and its text; a file is judged by its content first and by its name second.

Read: plain text, .jsonl, .json (an array of objects, or objects that follow each other), .csv, .tsv, .parquet, .arrow;
all but the last two also compressed by gzip, bzip2 or xz. Anything else is refused, so that no archive, table or list
of records is ever taken for prose.
"""

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO, cast

from quantkit.errors import UserError

Kind = Literal["text", "lines", "json", "csv", "parquet", "arrow"]

READ = (
    "plain text, .jsonl, .json, .csv, .tsv, .parquet and .arrow are read, text and JSON and CSV also as .gz, .bz2, .xz"
)
START = 1 << 16  # bytes looked at to tell what a file is

UNPACKERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
PACKED = (".gz", ".gzip", ".bz2", ".xz")
BY_NAME: dict[str, Kind] = {
    **dict.fromkeys((".jsonl", ".ndjson"), "lines"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys((".arrow", ".feather"), "arrow"),
    ".json": "json",
    ".parquet": "parquet",
}
ARROW = (b"ARROW1", b"\xff\xff\xff\xff")  # a file, a stream
UNPACK = "unpack it and name a file that was in it"
REFUSED = {
    b"PK\x03\x04": f"a zip archive; {UNPACK}",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it with `zstd -d`, or pack it with gzip",
    b"\x04\x22\x4d\x18": "compressed by lz4; unpack it, or pack it with gzip",
    b"7z\xbc\xaf\x27\x1c": f"a 7z archive; {UNPACK}",
    b"Rar!": f"a rar archive; {UNPACK}",
    b"%PDF": "a PDF; save its text as a .txt file",
    b"SQLite format 3": "an SQLite database; export a .csv with a column `text`",
    b"GGUF": "a GGUF model, not a text",
    b"\xff\xfe": "text in UTF-16 or UTF-32, not UTF-8; save it as UTF-8",
    b"\xfe\xff": "text in UTF-16, not UTF-8; save it as UTF-8",
}
REFUSED_NAMES = [
    ".zip",
    ".zst",
    ".lz4",
    ".7z",
    ".rar",
    ".tar",
    ".tgz",
    ".pdf",
    ".docx",
    ".xlsx",
    ".xls",
    ".ods",
    ".orc",
    ".avro",
    ".h5",
    ".hdf5",
    ".db",
    ".sqlite",
]
REFUSED_NAMES += [".npy", ".npz", ".pkl", ".pickle", ".pt", ".pth", ".bin", ".safetensors", ".gguf"]
# An object with a first key, or an array of objects or texts: what JSON records begin with, and prose does not.
JSON_START = re.compile(r'\s*(\[\s*)?\{\s*"(?:[^"\\]|\\.)*"\s*:|\s*\[\s*"(?:[^"\\]|\\.)*"\s*,')


def file_kind(path: Path) -> Kind:
    """What a file holds; UserError for what is not read, with what to do instead."""
    if not path.is_file():
        raise UserError(f"{path}: not a regular file; {READ}")
    try:
        with path.open("rb") as file:
            packed = file.read(8).startswith(tuple(UNPACKERS))
        with open_bytes(path) as stream:
            start = stream.read(START)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: {unreadable(error)}") from None
    suffix = path.suffix.lower()
    if packed and suffix in PACKED:
        suffix = Path(path.stem).suffix.lower()
    elif suffix in PACKED:
        raise UserError(f"{path}: named {suffix}, but it is not compressed that way; rename it")
    if packed and any(start.startswith(magic) for magic in (*UNPACKERS, b"PAR1", *ARROW)):
        raise UserError(f"{path}: holds another packed file; unpack it once")
    kind = _kind_by_content(path, start) or BY_NAME.get(suffix)
    if kind is None and suffix in REFUSED_NAMES:
        raise UserError(f"{path}: {suffix} files are not read; {READ}")
    text = start.decode("utf-8-sig", errors="replace")
    if kind in ("parquet", "arrow") and not start.startswith((b"PAR1", *ARROW)):
        raise UserError(f"{path}: named {suffix}, but it is not such a file; it is damaged, or has the wrong name")
    if kind in (None, "lines") and JSON_START.match(text):
        return "lines" if kind == "lines" and not text.lstrip().startswith("[") else "json"
    return kind or "text"


def _kind_by_content(path: Path, start: bytes) -> Kind | None:
    if start.startswith(b"PAR1"):
        return "parquet"
    if start.startswith(ARROW):
        return "arrow"
    for magic, what in REFUSED.items():
        if start.startswith(magic):
            raise UserError(f"{path}: {what}. {READ}")
    if start[257:262] == b"ustar":
        raise UserError(f"{path}: a tar archive; {UNPACK}. {READ}")
    if b"\0" in start:
        raise UserError(f"{path}: binary, not UTF-8 text (a zero byte at offset {start.index(0)}). {READ}")
    return None


def open_bytes(path: Path) -> BinaryIO:
    """A file's bytes, unpacked."""
    with path.open("rb") as file:
        start = file.read(8)
    opener = next((opener for magic, opener in UNPACKERS.items() if start.startswith(magic)), None)
    return path.open("rb") if opener is None else cast(BinaryIO, opener(path, "rb"))


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """A file's UTF-8 text, unpacked; a byte order mark is dropped."""
    return io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline=newline)


def read_text(path: Path, characters: int = -1) -> str:
    """The first characters of a text file, all with -1. UserError if it is empty, binary or not UTF-8."""
    try:
        with open_text(path) as file:
            text = file.read(characters)
    except UnicodeDecodeError as error:
        raise UserError(not_utf8(path, error)) from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: {unreadable(error)}") from None
    if "\0" in text:
        raise UserError(f"{path}: binary, not UTF-8 text (a zero byte at character {text.index(chr(0))}). {READ}")
    if not text.strip():
        raise UserError(f"{path}: there is no text in it")
    return text


def unreadable(error: Exception) -> str:
    """Why a file cannot be read or unpacked, in words."""
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    return f"cannot be unpacked: {error}; it is damaged, or was not fully downloaded"


def not_utf8(path: Path, error: UnicodeDecodeError) -> str:
    """Which byte of a file is not UTF-8, in words."""
    return f"{path}: not UTF-8 text: {_bad_byte(path)} ({error.reason})"


def _bad_byte(path: Path) -> str:
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    with open_bytes(path) as file:
        while chunk := file.read(1 << 20):
            kept = len(decoder.getstate()[0])  # bytes of a character begun in the chunk before
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                offset = done - kept + error.start
                return f"byte {error.object[error.start]:#04x} at offset {offset}"
            done += len(chunk)
    return f"the last character is cut off at offset {done}"
