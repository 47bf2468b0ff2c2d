"""Texts to evaluate on: UTF-8 files, and names of texts that ship with quantkit or lie on the Hub."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import UserError
from quantkit.paths import user_path
from quantkit.suggestions import nearest


@dataclass(frozen=True, slots=True)
class Text:
    """A text as it was read; `sha256` is of its bytes (UTF-8)."""

    name: str
    content: str
    sha256: str


def check_text(name: str | Path) -> None:
    """UserError where `name` is neither a named text nor a file, nor a text itself."""
    if str(name) in NAMED or _is_content(name):
        return
    path = user_path(name)
    if path.is_file():
        return
    if path.is_dir():
        raise UserError(f"{path}: is a folder, not a text file")
    near = nearest(str(name), NAMED, cutoff=0.6)
    hint = f"did you mean {near}?" if near else f"give a UTF-8 text file, or one of: {', '.join(NAMED)}"
    raise UserError(f"{name}: no such text file\nhint: {hint}")


def read_text(name: str | Path) -> Text:
    """A named text, a UTF-8 file or lines of text; UserError for a file that is missing, empty or no UTF-8."""
    check_text(name)
    if isinstance(name, str) and _is_content(name):
        return Text("given text", name, hashlib.sha256(name.encode()).hexdigest())
    if str(name) in NAMED:
        content = NAMED[str(name)]()
        return Text(str(name), content, hashlib.sha256(content.encode()).hexdigest())
    path = user_path(name)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        content = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}: {error.reason})") from error
    if not content.strip():
        raise UserError(f"{path}: the text is empty")
    return Text(str(name), content, hashlib.sha256(raw).hexdigest())


def _is_content(name: str | Path) -> bool:
    """Whether a text is given instead of its name: no file is called by two lines."""
    return isinstance(name, str) and "\n" in name.strip()


def _general() -> str:
    """The held-out part of `general`; chats as plain turns, so that it is the same text for every model."""
    from quantkit.texts import general

    return "\n\n".join(_plain(row) for row in general("held-out"))


def _plain(row: dict[str, Any]) -> str:
    if "messages" not in row:
        return row["text"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in row["messages"])


def _wikitext2() -> str:
    """WikiText-2's test part, its lines joined as papers do."""
    from quantkit.quantization.calibration.hub import hub_rows

    try:
        return "\n\n".join(row["text"] for _, row in hub_rows("wikitext2"))
    except UserError as error:
        words = str(error).replace("calibration.data 'wikitext2': no file of that name, and", "text wikitext2:")
        raise UserError(words) from error


NAMED: dict[str, Callable[[], str]] = {"general": _general, "wikitext2": _wikitext2}
