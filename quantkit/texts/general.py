"""Rows of the data set `general`, read lazily from the package's files."""

import hashlib
import json
import lzma
from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, Literal, get_args

from quantkit.errors import UserError

Part = Literal["calibration", "held-out"]
PARTS: tuple[str, ...] = get_args(Part)


def general(part: Part = "calibration") -> Iterator[dict[str, Any]]:
    """The rows of one part, in the file's order, decompressed as they are asked for.

    A row has "kind" (prose, code, maths, tables, languages or chat), "source" (a row of SOURCES.md) and either "text"
    (str, 0.3 to 9 kB) or, for kind "chat", "messages": a list of {"role": "system" | "user" | "assistant", "content"}.
    The kinds are interleaved in fixed shares, so that any prefix of some hundred rows is a sample of the whole.

    Raises UserError for any other part, at the call.
    """
    return _rows(_file(part))


def general_sha256(part: Part = "calibration") -> str:
    """The SHA-256 (hex) of the part's compressed file, as SOURCES.md lists it. Raises UserError for any other part."""
    return hashlib.sha256(_file(part).read_bytes()).hexdigest()


def _file(part: str) -> Traversable:
    if part not in PARTS:
        raise UserError(f"data set general: no part `{part}`, expected {' or '.join(PARTS)}")
    return files("quantkit.texts") / f"{part}.jsonl.xz"


def _rows(file: Traversable) -> Iterator[dict[str, Any]]:
    with file.open("rb") as compressed, lzma.open(compressed, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)
