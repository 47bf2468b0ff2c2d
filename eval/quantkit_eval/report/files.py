"""Where a report is written: each file at once or not at all, and only over what quantkit itself wrote."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantkit.errors import RunError, UserError
from quantkit.report.document import DOCUMENT, SCHEMA
from quantkit.report.page import GENERATOR

PAGE = "quantkit-report.html"
ANOTHER = "hint: move it away, or name another file with --output"


def page_is_ours(content: str) -> bool:
    """Whether an HTML page is a report of ours."""
    return f'<meta name="generator" content="{GENERATOR}">' in content[:2000]


def document_is_ours(content: str) -> bool:
    """Whether a JSON file is a report of ours, of any version."""
    found = _json(content)
    return isinstance(found, dict) and str(found.get("schema", "")).startswith(SCHEMA.partition("/")[0] + "/")


def stored_document(folder: Path) -> Any:
    """What an earlier report left in a folder; None where there is none."""
    try:
        return _json((folder / DOCUMENT).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None


def _json(content: str) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


def check_target(path: Path, ours: Callable[[str], bool]) -> None:
    """UserError where something lies there that quantkit did not write, or nothing can be written."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder, and the report is a file\nhint: --output {path / PAGE}")
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path}: a link to nowhere\n{ANOTHER}")
    if path.exists():
        try:
            known = ours(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            known = False
        if not known:
            raise UserError(f"{path}: exists, is no report of quantkit, and is never overwritten\n{ANOTHER}")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f"{path}: there is no folder {folder}\nhint: make it first, or name another file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{path}: you may not write into {folder}\nhint: name a file elsewhere with --output")


def write_whole(path: Path, content: str) -> None:
    """Write a text file at once: whoever reads it finds the old or the new one. RunError where that fails."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with unfinished.open("wb") as file:
            file.write(content.encode("utf-8", "backslashreplace"))  # file names may hold bytes that are no UTF-8
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        unfinished.unlink(missing_ok=True)
