"""Rows of JSON files of any length: one object a line, an array, or values that follow each other."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from quantkit.errors import UserError
from quantkit.quantization.calibration.files import open_text

Row = tuple[str, Any]  # where it stands, for messages, and its content
CHUNK = 1 << 16  # characters of JSON read at a time
MAX_VALUE = 1 << 28  # characters of one JSON value


def json_lines(path: Path) -> Iterator[Row]:
    """Rows of a .jsonl file; UserError, with the line, for one that is not JSON."""
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


def json_values(path: Path) -> Iterator[Row]:
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
