"""The rows of `general`, read from the wheel. Imports nothing heavy: the first row is there in milliseconds."""

import hashlib
import json
import lzma
from collections.abc import Iterator
from importlib.resources import files
from typing import Any, Literal, get_args

from quantkit.errors import UserError

Part = Literal["calibration", "held-out"]
PARTS: tuple[str, ...] = get_args(Part)


def general(part: Part = "calibration") -> Iterator[dict[str, Any]]:
    """The rows of a part of `general`, one at a time: a prefix is decompressed as far as it is read.

    Every row has `kind` (prose, code, maths, data, languages or chat), `language` (what it is written in: "English",
    "Rust", "Markdown"), `source` (a name in SOURCES.md) and either `text` or, when its kind is chat, `messages`: a list
    of {"role": "system" | "user" | "assistant", "content": str}. The order is mixed once and for all, so that any
    prefix has every kind in the proportions of the whole. Nothing in the held-out part is in the calibration part.

    Raises UserError for a part that does not exist.
    """
    with lzma.open(_file(part).open("rb"), "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def general_sha256(part: Part = "calibration") -> str:
    """The SHA-256 of a part's file as it ships, in hexadecimal: what a report records about the data it used."""
    return hashlib.sha256(_file(part).read_bytes()).hexdigest()


def _file(part: str):
    if part not in PARTS:
        raise UserError(f"general: no part `{part}`: expected one of {', '.join(PARTS)}")
    return files("quantkit.texts") / f"{part}.jsonl.xz"
