"""One source -> tokens to cut windows from, and what the report says of it."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import UserError
from quantkit.quantization.calibration.amount import Amount
from quantkit.quantization.calibration.bos import starts_with_bos
from quantkit.quantization.calibration.documents import Document, Documents
from quantkit.quantization.calibration.given import GivenRows, GivenTokens
from quantkit.quantization.calibration.json_rows import Row
from quantkit.quantization.calibration.sources import Place, place_rows
from quantkit.quantization.calibration.windows import (
    Material,
    Sequences,
    Stream,
    document_ids,
    joined_ids,
    stream_ids,
    text_documents,
)
from quantkit.recipe.data_sets import GENERAL
from quantkit.recipe.sections import Calibration
from quantkit.texts import general_sha256

HASHED = 1 << 28  # bytes of a file; of a longer one the beginning
MOST_ROWS = 1 << 20  # of an iterable, which may be infinite


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """A source as the report names it.

    name    as the recipe or the caller gives it
    sha256  of a file's bytes (of its first `bytes` where it is longer; of `general` the file in the wheel), of the rows
            read (each as a line of JSON with sorted keys), or of the token ids read
    rows    that were read, None where there are none; bytes: of the file that are hashed, None for other sources
    """

    name: str
    sha256: str
    rows: int | None = None
    bytes: int | None = None


@dataclass(frozen=True, slots=True)
class ReadSource:
    """A source after reading. pool: how many windows at most are drawn from; blank: rows without text."""

    record: SourceRecord
    material: Material
    pool: int
    blank: int = 0

    def windows(self, seq_len: int) -> list[list[int]]:
        """The windows to draw from."""
        return self.material.windows(seq_len)[: self.pool]

    def remarks(self, seq_len: int) -> list[str]:
        """What of it was left out."""
        found = []
        if isinstance(self.material, Sequences) and (short := self.material.shorter(seq_len)):
            kind = "sequences" if self.material.split else "documents"
            found.append(f"calibration: {short} {kind} shorter than {seq_len} tokens were skipped")
        if self.blank:
            found.append(f"calibration: {self.blank} rows of {self.record.name} hold no text and were skipped")
        return found


def read_place(place: Place, calibration: Calibration, tokenizer: Any, wanted: Amount, pool: int) -> ReadSource:
    """Up to `pool` windows' worth of a file, a folder or a data set."""
    if place.path is not None and place.is_text:
        if calibration.packing == "document":
            material = _documents(text_documents(place.path), calibration, tokenizer, wanted, pool)
        else:
            bos = starts_with_bos(tokenizer, calibration.bos)
            material = Stream(stream_ids(place.path, tokenizer, pool * wanted.seq_len), bos)
        return ReadSource(_file_record(place.data, place.path, None), material, pool)
    rows = place_rows(place)
    return _read_rows(place.data, rows, place.column, calibration, tokenizer, wanted, pool, path=place.path)


def read_rows(given: GivenRows, calibration: Calibration, tokenizer: Any, wanted: Amount, pool: int) -> ReadSource:
    """Up to `pool` windows' worth of rows that a caller gave."""
    rows = itertools.islice(given.rows, MOST_ROWS)
    return _read_rows(given.name, rows, calibration.column, calibration, tokenizer, wanted, pool)


def read_tokens(given: GivenTokens, wanted: Amount, held: int, longest: int) -> tuple[ReadSource, Amount]:
    """Token sequences that a caller gave, no more than needed with `held` windows beside, and the amount they mean.

    Left to auto, the length is the sequences' own up to `longest` (where they differ the one that keeps most tokens),
    and a single tensor is taken as a whole. UserError where there is no token.
    """
    kept = list(_take(given, wanted, held))
    if not kept:
        raise UserError(f"calibration: no token ids in the {given.name}: every sequence is empty or padding alone")
    digest = hashlib.sha256(repr(kept).encode()).hexdigest()
    material: Material = Stream(list(itertools.chain(*kept))) if given.stream else Sequences(kept, split=True)
    samples, seq_len = wanted.samples, wanted.seq_len
    if wanted.auto_seq_len and not given.stream:
        tokens = sum(map(len, kept)) if given.whole else wanted.tokens
        seq_len = material.best(longest, tokens) if wanted.auto_samples else min(longest, material.longest(samples))
    elif wanted.auto_seq_len:
        seq_len = min(seq_len, material.longest(1 if wanted.auto_samples else samples))
    if wanted.auto_samples and seq_len:
        samples = len(material.windows(seq_len)) if given.whole else -(-wanted.tokens // seq_len)
    source = ReadSource(SourceRecord(given.name, digest, rows=len(kept)), material, pool=samples + held)
    return source, Amount(max(1, samples), seq_len, wanted.auto_samples, auto_seq_len=False)


def _take(given: GivenTokens, wanted: Amount, held: int) -> Iterator[list[int]]:
    """As many sequences as can be of use: of an iterable, which may be infinite, those that fill the amount."""
    if given.whole:
        yield from given.sequences
        return
    tokens = windows = 0
    for sequence in itertools.islice(given.sequences, 64 * (wanted.samples + held) + 4096):
        yield sequence
        tokens += len(sequence)
        windows += 1 if wanted.auto_seq_len else len(sequence) // wanted.seq_len
        enough = tokens >= wanted.tokens + held * wanted.seq_len
        if enough if wanted.auto_samples and wanted.auto_seq_len else windows >= wanted.samples + held:
            return


def _read_rows(
    name: str,
    rows: Iterable[Row],
    column: str | None,
    calibration: Calibration,
    tokenizer: Any,
    wanted: Amount,
    pool: int,
    path: Path | None = None,
) -> ReadSource:
    if tokenizer is None:
        raise UserError(
            f"calibration: {name} is text, and there is no tokenizer\nhint: pass tokenizer=..., or token ids"
        )
    documents = Documents(rows, tokenizer, column=column, plain_chats=name == GENERAL)
    if calibration.packing == "document":
        material: Material = _documents(documents, calibration, tokenizer, wanted, pool)
    else:
        ids = joined_ids(documents, tokenizer, calibration.bos, pool * wanted.seq_len)
        material = Stream(ids, starts_with_bos(tokenizer, calibration.bos))
    if path is not None and path.is_file():
        record = _file_record(name, path, documents.read)
    elif name == GENERAL:
        record = SourceRecord(name, general_sha256(), rows=documents.read)
    else:
        record = SourceRecord(name, documents.sha256, rows=documents.read)
    return ReadSource(record, material, pool, documents.blank)


def _documents(
    documents: Iterable[Document], calibration: Calibration, tokenizer: Any, wanted: Amount, pool: int
) -> Sequences:
    """The beginnings of documents; those too short are kept only where seq_len is left to auto."""
    items, lengths, kept = list[list[int]](), list[int](), 0
    for tokens in document_ids(documents, tokenizer, calibration.bos, wanted.seq_len, pool):
        if wanted.auto_seq_len or len(tokens) >= wanted.seq_len:
            items.append(tokens)
            kept += len(tokens)
        else:
            lengths.append(len(tokens))
        if kept >= pool * wanted.seq_len:
            break
    return Sequences(items, left_out=len(lengths), longest_left_out=max(lengths, default=0))


def _file_record(name: str, path: Path, rows: int | None) -> SourceRecord:
    digest, left = hashlib.sha256(), HASHED
    with path.open("rb") as file:
        while left and (chunk := file.read(min(left, 1 << 20))):
            digest.update(chunk)
            left -= len(chunk)
    return SourceRecord(name, digest.hexdigest(), rows=rows, bytes=HASHED - left)
