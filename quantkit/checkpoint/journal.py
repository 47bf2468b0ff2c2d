"""The diary of a run: killed anywhere, the same command goes on after the last finished block to the same bytes.

A run works in OUTPUT.partial. journal.jsonl holds the run's key on its first line (recipe, model fingerprint,
calibration hash, versions) and one line per finished block, written only after that block's tensors are on the disk.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from quantkit.errors import RunError, UserError

NAME = "journal.jsonl"


class Journal:
    """Open or begin the run in `folder` (OUTPUT.partial); `entries` are the finished blocks' records, in order."""

    def __init__(self, folder: Path, key: dict[str, Any], *, restart: bool = False) -> None:
        self.folder, self.path = folder, folder / NAME
        if folder.exists() and restart:
            if not self.path.exists() and any(folder.iterdir()):
                raise UserError(f"{folder} exists and is not a quantkit run: move it away")
            shutil.rmtree(folder)
        if folder.exists() and any(folder.iterdir()) and not self.path.exists():
            raise UserError(f"{folder} exists and holds no {NAME}: not a quantkit run; move it away")
        folder.mkdir(parents=True, exist_ok=True)
        lines = self._read()
        self.entries = lines[1:]
        if lines:
            _refuse_changed(lines[0], key, folder)
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


def _refuse_changed(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    changed = []
    for name in sorted(old.keys() | new.keys()):
        before, now = old.get(name), new.get(name)
        if before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            parts = [
                f"{name}.{k}: {before.get(k)!r} -> {now.get(k)!r}"
                for k in sorted(before.keys() | now.keys())
                if before.get(k) != now.get(k)
            ]
            changed += parts
        else:
            changed.append(f"{name}: {before!r} -> {now!r}")
    if changed:
        raise UserError(
            f"{folder} holds an unfinished run of something else; changed since then:\n  "
            + "\n  ".join(changed)
            + "\nrun the old command to finish it, or pass --restart to discard it and start again"
        )
