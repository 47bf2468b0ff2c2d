"""The diary of a run: killed anywhere, the same command goes on after the last finished block to the same bytes.

A run works in OUTPUT.partial. journal.jsonl holds the run's key on its first line (recipe, model fingerprint,
calibration hash, versions) and one line per finished block, written only after that block's tensors are on the disk.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantkit.errors import RunError, UserError

NAME = "journal.jsonl"
ABSENT = object()  # a key that one of two recipes does not have


class Journal:
    """Open or begin the run in `folder` (OUTPUT.partial); `entries` are the finished blocks' records, in order."""

    def __init__(self, folder: Path, key: dict[str, Any], *, restart: bool = False) -> None:
        self.folder, self.path = folder, folder / NAME
        refuse_foreign(folder)
        if folder.exists() and restart:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lines = self._read()
        self.entries = lines[1:]
        if lines:
            refuse_changed(lines[0], key, folder)
            self._rewrite(lines)  # drops a line torn by a kill
        else:
            self._rewrite([key])

    def append(self, entry: dict[str, Any]) -> None:
        """Record a finished block; returns once the line is on the disk."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.entries.append(entry)

    def publish(self, output: Path) -> None:
        """Rename the finished run's folder to `output` in one step, without the journal."""
        if output.exists():
            raise RunError(f"{output} appeared while the run was going on; the result is whole in {self.folder}")
        self.folder.rename(output)
        (output / NAME).unlink()  # last: without it a killed run would look like a folder of somebody else's
        folder = os.open(output.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        lines = []
        for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break  # torn by a kill: this block was not finished
        return lines

    def _rewrite(self, lines: list[dict[str, Any]]) -> None:
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)


def refuse_foreign(folder: Path) -> None:
    """UserError where the folder that a run is to work in holds something else."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder} exists and is a file or a link, not a quantkit run\nhint: move it away")
    if folder.exists() and any(folder.iterdir()) and not (folder / NAME).exists():
        raise UserError(f"{folder} exists and holds no {NAME}: not a quantkit run\nhint: move it away")


def read_key(folder: Path) -> dict[str, Any] | None:
    """The key of the unfinished run in `folder` (OUTPUT.partial); None where there is none that can be read."""
    try:
        with (folder / NAME).open(encoding="utf-8") as file:
            key = json.loads(file.readline())
    except (OSError, ValueError):
        return None
    return key if isinstance(key, dict) else None


def refuse_changed(old: Mapping[str, Any], new: Mapping[str, Any], folder: Path) -> None:
    """UserError with a line for each part of a run's key that has changed, in the recipe's own terms."""
    if changed := [line for name in sorted(old.keys() | new.keys()) for line in _changes(name, old, new)]:
        raise UserError(
            f"{folder} holds an unfinished run of something else; changed since then:\n  "
            + "\n  ".join(changed)
            + "\nhint: run the old command to finish it, or pass --restart to discard it and start again"
        )


def _changes(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    before, now = old.get(name), new.get(name)
    if before == now:
        return []
    if name == "model":
        return ["the model's files have changed (config.json or tensors)"]
    if name == "calibration":
        if None in (before, now):
            return [f"calibration: {'none' if before is None else 'some'} -> {'none' if now is None else 'some'}"]
        return ["the calibration tokens differ (other text, samples, seq_len, seed or tokenizer)"]
    if name == "recipe":
        return list(_differences("", before, now))
    return list(_differences(name, before, now))


def _differences(name: str, before: Any, now: Any) -> Iterator[str]:
    """`weights.group_size: 128 -> 64` for each leaf that differs."""
    if _chosen(before) != _chosen(now) and None not in (_chosen(before), _chosen(now)):
        yield f"{name}: {_chosen(before)} -> {_chosen(now)}"
    elif isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            yield from _differences(f"{name}.{key}".lstrip("."), before.get(key, ABSENT), now.get(key, ABSENT))
    elif isinstance(before, list) and isinstance(now, list):
        for i in range(max(len(before), len(now))):
            pair = (values[i] if i < len(values) else ABSENT for values in (before, now))
            yield from _differences(f"{name}[{i}]", *pair)
    elif before != now:
        yield f"{name}: {_written(before)} -> {_written(now)}"


def _chosen(value: Any) -> str | None:
    """The name in a choice with options, {gptq: {...}}; None for any other value."""
    if isinstance(value, dict) and len(value) == 1 and isinstance(next(iter(value.values())), dict):
        return str(next(iter(value)))
    return None


def _written(value: Any) -> str:
    """A value as a recipe has it, on one line."""
    if value is ABSENT:
        return "not set"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_written, value)) + "]"
    return value if isinstance(value, str) else json.dumps(value)
