"""Rows -> documents: the text of each row, chats put through the model's chat template."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from quantkit.errors import UserError
from quantkit.quantization.calibration.columns import SHAPES, no_column
from quantkit.quantization.calibration.json_rows import Row

ROLES = {"human": "user", "gpt": "assistant"}
SPEAKERS = {"user": "User", "assistant": "Assistant", "system": "System"}


@dataclass(frozen=True, slots=True)
class Document:
    """One text, where it came from, and whether special tokens are already written in it (chat templates do that)."""

    text: str
    templated: bool = False


class Documents:
    """The documents of one source's rows, in order; what was read so far is counted and hashed.

    column: the one to read, None for those with known names; plain_chats: `messages` are written as "User: ..." where
    the tokenizer has no chat template or it refuses them, instead of a UserError.
    """

    def __init__(
        self, rows: Iterable[Row], tokenizer: Any, *, column: str | None = None, plain_chats: bool = False
    ) -> None:
        self._rows, self._tokenizer, self._column, self._plain = rows, tokenizer, column, plain_chats
        self.read = self.blank = 0
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """sha256 of the rows read so far, each as one line of JSON with sorted keys."""
        return self._digest.hexdigest()

    def __iter__(self) -> Iterator[Document]:
        for place, row in self._rows:
            self.read += 1
            line = json.dumps(row, sort_keys=True, default=str) + "\n"
            self._digest.update(line.encode())
            found = self._document(place, row)
            if found is not None and found.text.strip():
                yield found
            else:
                self.blank += 1

    def _document(self, place: str, row: Any) -> Document | None:
        """A row's text; None where its columns are there and empty."""
        if not isinstance(row, dict):
            raise UserError(f'{place}: must be an object like {{"text": ...}} or {{"messages": [...]}}')
        content = self._content(place, row)
        if isinstance(content, list):
            content, templated = self._chat(place, content)
        else:
            templated = False
        if content is None:
            return None
        try:
            content.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{place}: the text holds half a character (a lone surrogate); repair or remove it"
            ) from None
        return Document(content, templated)

    def _content(self, place: str, row: dict[str, Any]) -> str | list[Any] | None:
        """The text or the messages of a row; None where what it should hold is null."""
        if self._column is not None:
            if self._column not in row:
                raise no_column(place, list(row), self._column)
            content = row[self._column]
            if content is not None and not isinstance(content, str | list):
                kind = type(content).__name__
                raise UserError(f"{place}: `{self._column}` must be text or a list of messages, this is a {kind}")
            return content
        empty = False
        for shape in SHAPES:
            values = [row.get(name) for name in shape]
            if None in values:
                empty |= all(name in row for name in shape)
            elif (content := self._of_shape(shape, row)) is not None:
                return content
        if empty:
            return None
        raise no_column(place, list(row), None)

    def _of_shape(self, shape: tuple[str, ...], row: dict[str, Any]) -> str | list[Any] | None:
        """What the columns of one of SHAPES hold together; None where their types are others."""
        values = [row[name] for name in shape]
        if shape == ("text",):
            return values[0] if isinstance(values[0], str) else None
        if len(shape) == 1:
            return values[0] if isinstance(values[0], list) else None
        asked, answered = values
        if isinstance(asked, list) and isinstance(answered, list):  # both as messages
            return [*asked, *answered]
        if not isinstance(asked, str) or not isinstance(answered, str):
            return None
        if shape[0] == "instruction" and isinstance(beside := row.get("input"), str) and beside.strip():
            asked = f"{asked}\n\n{beside}"
        if getattr(self._tokenizer, "chat_template", None) is not None and asked.strip() and answered.strip():
            return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        if shape[0] == "instruction":
            return "\n\n".join(part for part in (asked, answered) if part.strip())
        joined = asked[-1:].isspace() or answered[:1].isspace() or not asked or not answered
        return asked + ("" if joined else "\n") + answered

    def _chat(self, place: str, messages: list[Any]) -> tuple[str, bool]:
        """(text, whether a template wrote it): messages as the chat template writes them.

        ShareGPT's from and value are role and content.
        """
        turns = [
            {"role": ROLES.get(turn["from"], turn["from"]), "content": turn.get("value")}
            if isinstance(turn, dict) and isinstance(turn.get("from"), str)
            else turn
            for turn in messages
        ]
        if getattr(self._tokenizer, "chat_template", None) is None:
            if self._plain:
                return _plain(turns), False
            raise UserError(
                f"{place}: `messages` need a chat template, and the model's tokenizer has none: give `text`"
            )
        try:
            return self._tokenizer.apply_chat_template(turns, tokenize=False), True
        except Exception as error:  # the template is the model's own program: whatever it raises is about this row
            if self._plain:
                return _plain(turns), False
            raise UserError(f"{place}: the chat template refuses these messages: {error}") from error


def _plain(turns: list[Any]) -> str:
    return "\n\n".join(f"{SPEAKERS.get(turn['role'], turn['role'])}: {turn['content']}" for turn in turns)
