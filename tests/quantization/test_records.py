"""Calibration files by content and suffix: records are read as records, nothing that is none is taken for text."""

import bz2
import gzip
import json
import lzma
import zipfile
from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import UserError
from quantkit.quantization.calibration.files import file_kind, read_text
from quantkit.quantization.calibration.records import file_rows

TEXTS = ["one, two", 'a "quoted" line\nand another', "three"]
ROWS = [{"text": text} for text in TEXTS]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = 'id,text\n1,"one, two"\n2,"a ""quoted"" line\nand another"\n3,three\n'
READ: dict[str, tuple[str, bytes]] = {
    "lines": ("a.jsonl", LINES.encode()),
    "lines with a mark": ("a.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
    "lines named text": ("a.txt", LINES.encode()),
    "an array": ("a.json", json.dumps(ROWS).encode()),
    "an array, indented": ("a.json", json.dumps(ROWS, indent=2).encode()),
    "an array named text": ("a.txt", json.dumps(ROWS).encode()),
    "an array named lines": ("a.jsonl", json.dumps(ROWS).encode()),
    "csv": ("a.csv", CSV.encode()),
    "csv of windows": ("a.csv", CSV.replace(",three\n", ",three\r\n").encode()),
    "tsv": ("a.tsv", b"text\tn\n" + b'"one, two"\t1\n"a ""quoted"" line\nand another"\t2\nthree\t3\n'),
    "gz": ("a.jsonl.gz", gzip.compress(LINES.encode())),
    "gz named text": ("a.txt", gzip.compress(LINES.encode())),
    "bz2": ("a.json.bz2", bz2.compress(json.dumps(ROWS).encode())),
    "xz": ("a.csv.xz", lzma.compress(CSV.encode())),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_records_are_read_as_records(tmp_path: Path, case: str) -> None:
    name, content = READ[case]
    path = tmp_path / name
    path.write_bytes(content)
    kind = file_kind(path)
    assert kind != "text"
    assert [row["text"] for _, row in file_rows(path, kind)] == TEXTS


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_tables(tmp_path: Path, kind: str) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is optional")
    table = pyarrow.table({"text": TEXTS})
    path = tmp_path / "named.txt"  # the content decides
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path) if hasattr(pyarrow, "parquet") else pytest.importorskip(
            "pyarrow.parquet"
        ).write_table(table, path)
    else:
        with pyarrow.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    assert file_kind(path) == kind
    assert [row["text"] for _, row in file_rows(path, kind)] == TEXTS  # type: ignore[arg-type]


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text")


REFUSED: dict[str, tuple[str, Any, str]] = {
    "zip": ("a.zip", zipped, "zip"),
    "zip named text": ("a.txt", zipped, "zip"),
    "zero bytes": ("a.txt", b"a\0b" * 10, "binary"),
    "not compressed": ("a.txt.gz", b"plain", "not compressed that way"),
    "packed twice": ("a.gz", gzip.compress(gzip.compress(b"x")), "unpack it once"),
    "not parquet": ("a.parquet", b"text", "not such a file"),
    "a word processor's": ("a.docx", b"text", "not read"),
    "a PDF": ("a.txt", b"%PDF-1.7 text", "PDF"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path: Path, case: str) -> None:
    name, content, words = REFUSED[case]
    path = tmp_path / name
    content(path) if callable(content) else path.write_bytes(content)
    with pytest.raises(UserError, match=words) as failure:
        file_kind(path)
    assert str(path) in str(failure.value)


MALFORMED: dict[str, tuple[str, bytes, str]] = {
    "a line that is no JSON": ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2: not JSON"),
    "an array cut off": ("a.json", b'[{"text": "a"}, {"te', r"a\.json:1: not JSON"),
    "something behind the array": ("a.json", b'[{"text": "a"}]\nrest', r"a\.json:2: not JSON: something follows"),
    "no column": ("a.csv", b"id,body\n1,x\n", "no column `text`"),
    "a field too many": ("a.csv", b"id,text\n1,x,y\n", r"a\.csv:2: 3 fields, but 2 columns"),
    "gz cut off": ("a.jsonl.gz", gzip.compress(LINES.encode() * 500)[:-20], "cannot be unpacked|damaged"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_what_is_malformed(tmp_path: Path, case: str) -> None:
    name, content, words = MALFORMED[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        list(file_rows(path, file_kind(path)))  # type: ignore[arg-type]


def test_prose_stays_prose(tmp_path: Path) -> None:
    for text in (
        "Once upon a time",
        "[1] A footnote, and more",
        "{braces} in prose",
        "id,text\nnot a table by its name",
    ):
        (tmp_path / "a.txt").write_text(text, encoding="utf-8")
        assert file_kind(tmp_path / "a.txt") == "text"
        assert read_text(tmp_path / "a.txt") == text
