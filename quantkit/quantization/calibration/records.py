"""Calibration files, folders and data sets -> rows; a file is judged by its content first and by its name second.

Read: plain text, .jsonl, .json (an array of objects, or objects that follow each other), .csv, .tsv, .parquet, .arrow;
all but the last two also compressed by gzip, bzip2 or xz. Anything else is refused, so that no archive, table or list
of records is ever taken for prose. One row is in memory at a time.
"""

import bz2
import codecs
import csv
import difflib
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO, cast

from quantkit.errors import UserError

Row = tuple[str, Any]  # where it stands, for messages, and its content
Kind = Literal["text", "lines", "json", "csv", "parquet", "arrow"]

READ = (
    "plain text, .jsonl, .json, .csv, .tsv, .parquet and .arrow are read, text and JSON and CSV also as .gz, .bz2, .xz"
)
KEYS = ("text", "messages", "conversations")
START = 1 << 16  # bytes looked at to tell what a file is
CHUNK = 1 << 16  # characters of JSON read at a time
MAX_VALUE = 1 << 28  # characters of one JSON value

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
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+){0,2}")


def local_path(data: str) -> Path | None:
    """The file or folder `data` names; None where it can only be a Hub data set. UserError for a missing file."""
    path = Path(data).expanduser()
    if path.exists():
        return path
    suffixes = (".txt", ".md", ".py", *BY_NAME, *PACKED, *REFUSED_NAMES)
    if path.suffix.lower() not in suffixes and not data.startswith((".", "/", "~")) and HUB_NAME.fullmatch(data):
        return None
    folder = path.parent
    if not folder.is_dir():
        raise UserError(f"calibration.data: no file {data!r}: the folder {str(folder)!r} does not exist")
    near = difflib.get_close_matches(path.name, [entry.name for entry in folder.iterdir()], n=3, cutoff=0.4)
    hint = f"; near by: {', '.join(sorted(near))}" if near else ""
    raise UserError(f"calibration.data: no file {data!r}{hint}")


def file_kind(path: Path) -> Kind:
    """What a file holds; UserError for what is not read, with what to do instead."""
    if not path.is_file():
        raise UserError(f"{path}: not a regular file; {READ}")
    try:
        with path.open("rb") as file:
            packed = file.read(8).startswith(tuple(UNPACKERS))
        with _open_bytes(path) as stream:
            start = stream.read(START)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: {_unreadable(error)}") from None
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


def _open_bytes(path: Path) -> BinaryIO:
    with path.open("rb") as file:
        start = file.read(8)
    opener = next((opener for magic, opener in UNPACKERS.items() if start.startswith(magic)), None)
    return path.open("rb") if opener is None else cast(BinaryIO, opener(path, "rb"))


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """A file's UTF-8 text, unpacked; a byte order mark is dropped."""
    return io.TextIOWrapper(_open_bytes(path), encoding="utf-8-sig", newline=newline)


def read_text(path: Path, characters: int = -1) -> str:
    """The first characters of a text file, all with -1. UserError if it is empty, binary or not UTF-8."""
    try:
        with open_text(path) as file:
            text = file.read(characters)
    except UnicodeDecodeError as error:
        raise UserError(_not_utf8(path, error)) from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: {_unreadable(error)}") from None
    if "\0" in text:
        raise UserError(f"{path}: binary, not UTF-8 text (a zero byte at character {text.index(chr(0))}). {READ}")
    if not text.strip():
        raise UserError(f"{path}: there is no text in it")
    return text


def _unreadable(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    return f"cannot be unpacked: {error}; it is damaged, or was not fully downloaded"


def _not_utf8(path: Path, error: UnicodeDecodeError) -> str:
    return f"{path}: not UTF-8 text: {_bad_byte(path)} ({error.reason})"


def _bad_byte(path: Path) -> str:
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    with _open_bytes(path) as file:
        while chunk := file.read(1 << 20):
            kept = len(decoder.getstate()[0])  # bytes of a character begun in the chunk before
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                offset = done - kept + error.start
                return f"byte {error.object[error.start]:#04x} at offset {offset}"
            done += len(chunk)
    return f"the last character is cut off at offset {done}"


def rows(data: str, path: Path | None) -> Iterator[Row]:
    """Rows of the file or folder `path`, or where it is None of the Hub data set `data`, in order."""
    if path is None:
        yield from _hub_rows(data)
    elif path.is_dir():
        yield from _folder_rows(path)
    else:
        yield from file_rows(path, file_kind(path))


def file_rows(path: Path, kind: Kind) -> Iterator[Row]:
    """Rows of a file of this kind; UserError, with the line or the row, for one that is malformed."""
    reader = {"lines": _json_lines, "json": _json_values, "csv": _csv_rows}
    reader |= {"parquet": _parquet_rows, "arrow": _arrow_rows}
    try:
        yield from reader[kind](path)
    except UnicodeDecodeError as error:
        raise UserError(_not_utf8(path, error)) from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: {_unreadable(error)}") from None


def _json_lines(path: Path) -> Iterator[Row]:
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield f"{path}:{number}", json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(
                        f"{path}:{number}: not JSON: {error.msg} at column {error.colno}; a .jsonl file has one object "
                        'on each line, like {"text": ...}'
                    ) from None
                except (RecursionError, ValueError) as error:
                    raise UserError(f"{path}:{number}: not JSON that can be read: {error}") from None


class _JsonStream:
    """Reads JSON values one after the other out of a text stream of any length."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self.path, self.file = path, file
        self.text, self.at, self.line = "", 0, 1
        self._decoder = json.JSONDecoder()

    @property
    def place(self) -> str:
        return f"{self.path}:{self.line}"

    def _more(self) -> bool:
        rest = self.text[self.at :]
        chunk = self.file.read(max(CHUNK, len(rest)))
        self.text, self.at = rest + chunk, 0
        return bool(chunk)

    def _advance(self, end: int) -> None:
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            end = self.at
            while end < len(self.text) and self.text[end] in " \t\r\n":
                end += 1
            self._advance(end)
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def skip(self, mark: str) -> None:
        found = self.peek()
        if found != mark:
            raise UserError(f"{self.place}: not JSON: {mark!r} expected, {found or 'the end of the file'!r} found")
        self._advance(self.at + 1)

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if len(self.text) - self.at < MAX_VALUE and self._more():
                    continue
                line = self.line + self.text.count("\n", self.at, error.pos)
                raise UserError(f"{self.path}:{line}: not JSON: {error.msg}; it is damaged, or not all JSON") from None
            except (RecursionError, ValueError) as error:
                raise UserError(f"{self.place}: not JSON that can be read: {error}") from None
            if end == len(self.text) and self._more():  # a number may go on
                continue
            self._advance(end)
            return value


def _json_values(path: Path) -> Iterator[Row]:
    """The elements of a top-level array, or values that follow each other."""
    with open_text(path) as file:
        stream = _JsonStream(path, file)
        if stream.peek() != "[":
            while stream.peek():
                place = stream.place
                yield place, stream.value()
            return
        stream.skip("[")
        if stream.peek() != "]":
            while True:
                stream.peek()
                place = stream.place
                yield place, stream.value()
                if stream.peek() != ",":
                    break
                stream.skip(",")
        stream.skip("]")
        if stream.peek():
            raise UserError(f"{stream.place}: not JSON: something follows the array; write one object a line (.jsonl)")


def _csv_rows(path: Path) -> Iterator[Row]:
    with open_text(path, newline="") as file:
        first = file.readline()
    split = {mark: [name.strip() for name in next(csv.reader([first], delimiter=mark), [])] for mark in ",\t;|"}
    delimiter = next((mark for mark, names in split.items() if "text" in names), None)
    if delimiter is None:
        names = max(split.values(), key=len)
        raise UserError(f"{path}:1: no column `text`; the first line names the columns, here: {', '.join(names)[:200]}")
    names = split[delimiter]
    limit = csv.field_size_limit(MAX_VALUE)
    try:
        with open_text(path, newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            try:
                next(reader)
                for row in reader:
                    place = f"{path}:{reader.line_num}"
                    if row and len(row) != len(names):
                        hint = 'put fields with commas, quotes or line breaks into "quotes"'
                        raise UserError(f"{place}: {len(row)} fields, but {len(names)} columns; {hint}")
                    if row:
                        yield place, dict(zip(names, row, strict=True))
            except csv.Error as error:
                raise UserError(f"{path}:{reader.line_num}: not CSV: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _parquet_rows(path: Path) -> Iterator[Row]:
    parquet, errors = _pyarrow(path, "pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as table:
            batches = table.iter_batches(batch_size=256, columns=_columns(path, table.schema_arrow.names))
            yield from _table_rows(path, batches)
    except errors as error:
        raise UserError(f"{path}: the parquet file cannot be read: {error}") from None


def _arrow_rows(path: Path) -> Iterator[Row]:
    ipc, errors = _pyarrow(path, "pyarrow.ipc")
    try:
        with path.open("rb") as file:
            whole = file.read(6) == ARROW[0]
            file.seek(0)
            table = ipc.open_file(file) if whole else ipc.open_stream(file)
            columns = _columns(path, table.schema.names)
            batches = (table.get_batch(i) for i in range(table.num_record_batches)) if whole else table
            yield from _table_rows(path, (batch.select(columns) for batch in batches))
    except errors as error:
        raise UserError(f"{path}: the arrow file cannot be read: {error}") from None


def _pyarrow(path: Path, module: str) -> tuple[Any, type[Exception]]:
    try:
        from importlib import import_module

        return import_module(module), import_module("pyarrow").ArrowException
    except ImportError:
        raise UserError(f"{path}: reading {path.suffix} files needs pyarrow: pip install 'quantkit[data]'") from None


def _columns(path: Path, names: list[str]) -> list[str]:
    found = [name for name in KEYS if name in names]
    if not found:
        raise UserError(f"{path}: has neither a column `text` nor `messages`, only: {', '.join(names)}")
    return found


def _table_rows(path: Path, batches: Iterator[Any]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            yield f"{path} row {number}", row
            number += 1


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError("reading data sets needs the datasets package: pip install 'quantkit[data]'") from None
    return datasets


def _folder_rows(path: Path) -> Iterator[Row]:
    if not any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json")):
        suffixes = {".txt", *BY_NAME, *PACKED}
        files = ", ".join(sorted(f.name for f in path.iterdir() if f.suffix.lower() in suffixes)[:8])
        hint = f"; it holds {files}: name one of those" if files else f"; {READ}"
        raise UserError(f"{path}: this folder was not saved by datasets' save_to_disk{hint}")
    try:
        table = _datasets().load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: the data set cannot be read: {error}") from error
    if isinstance(table, dict):
        table = table["train"] if "train" in table else next(iter(table.values()))
    for number, row in enumerate(table):
        yield f"{path} row {number}", row


def _hub_rows(data: str) -> Iterator[Row]:
    name, config, split = [*data.split(":"), "", ""][:3]
    datasets = _datasets()
    try:
        table = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(table):
            yield f"{data} row {number}", row
    except Exception as error:  # network, names, configs, splits: each layer below has its own classes
        why = str(error).strip().splitlines() or [type(error).__name__]
        hint = f"no file of that name, and the Hub data set cannot be read: {why[0]}"
        raise UserError(f"calibration.data {data!r}: {hint} (a data set is NAME, NAME:CONFIG or ...:SPLIT)") from error
