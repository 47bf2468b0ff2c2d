"""Files of records (JSON, CSV, parquet, arrow) -> rows, one in memory at a time."""

import csv
import lzma
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from quantkit.errors import UserError
from quantkit.quantization.calibration.columns import no_column, read_columns
from quantkit.quantization.calibration.files import ARROW, Kind, not_utf8, open_text, unreadable
from quantkit.quantization.calibration.json_rows import MAX_VALUE, Row, json_lines, json_values


def file_rows(path: Path, kind: Kind, column: str | None = None) -> Iterator[Row]:
    """Rows of a file of this kind, of tables the columns that are read (`column`, or those with known names).

    UserError, with the line or the row, for one that is malformed.
    """
    reader: dict[str, Callable[[Path], Iterator[Row]]] = {
        "lines": json_lines,
        "json": json_values,
        "csv": partial(_csv_rows, column=column),
        "parquet": partial(_parquet_rows, column=column),
        "arrow": partial(_arrow_rows, column=column),
    }
    try:
        yield from reader[kind](path)
    except UnicodeDecodeError as error:
        raise UserError(not_utf8(path, error)) from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: {unreadable(error)}") from None


def _csv_rows(path: Path, column: str | None) -> Iterator[Row]:
    with open_text(path, newline="") as file:
        first = file.readline()
    split = {mark: [name.strip() for name in next(csv.reader([first], delimiter=mark), [])] for mark in ",\t;|"}
    delimiter = next((mark for mark, names in split.items() if read_columns(names, column)), None)
    if delimiter is None:
        names = max(split.values(), key=len)
        if column is not None:
            raise no_column(f"{path}:1", names, column)
        raise UserError(
            f"{path}:1: no column `text`; the first line names the columns, here: {', '.join(names)[:200]}\n"
            "hint: name the column to read with calibration.column"
        )
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


def _parquet_rows(path: Path, column: str | None) -> Iterator[Row]:
    parquet, errors = _pyarrow(path, "pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as table:
            batches = table.iter_batches(batch_size=256, columns=_columns(path, table.schema_arrow.names, column))
            yield from _table_rows(path, batches)
    except errors as error:
        raise UserError(f"{path}: the parquet file cannot be read: {error}") from None


def _arrow_rows(path: Path, column: str | None) -> Iterator[Row]:
    ipc, errors = _pyarrow(path, "pyarrow.ipc")
    try:
        with path.open("rb") as file:
            whole = file.read(6) == ARROW[0]
            file.seek(0)
            table = ipc.open_file(file) if whole else ipc.open_stream(file)
            columns = _columns(path, table.schema.names, column)
            batches = (table.get_batch(i) for i in range(table.num_record_batches)) if whole else table
            yield from _table_rows(path, (batch.select(columns) for batch in batches))
    except errors as error:
        raise UserError(f"{path}: the arrow file cannot be read: {error}") from None


def _pyarrow(path: Path, module: str) -> tuple[Any, type[Exception]]:
    try:
        from importlib import import_module

        return import_module(module), import_module("pyarrow").ArrowException
    except ImportError:
        raise UserError(f"{path}: reading {path.suffix} files needs pyarrow\nhint: pip install pyarrow") from None


def _columns(path: Path, names: list[str], column: str | None) -> list[str]:
    if not (found := read_columns(names, column)):
        raise no_column(str(path), names, column)
    return found


def _table_rows(path: Path, batches: Iterator[Any]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            yield f"{path} row {number}", row
            number += 1
