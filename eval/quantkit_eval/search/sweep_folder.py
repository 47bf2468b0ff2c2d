"""The folder of a sweep: whose it is, its rows, and the models that are kept.

    sweep.json                    of which model it is
    rows/NAME.json                a row, written when its run has ended
    work/NAME                     the model of a run, until the sweep knows whether it is kept; NAME.partial: half made
    models/LABEL                  models that are kept; nothing in there is ever removed
    results.parquet, results.csv, front.svg, search.db

Files that begin with a dot are a lock and what was being written when a sweep was killed.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from quantkit.checkpoint.output_folder import check_output, write_json
from quantkit.errors import UserError

NAME = "sweep.json"
ANOTHER = "hint: choose another --output"


class SweepFolder:
    """A sweep's folder; `check` comes before anything is made, `begin` locks it for this process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows, self.work, self.models = path / "rows", path / "work", path / "models"
        self._lock: IO[str] | None = None

    def check(self, model: Path | None) -> None:
        """UserError for what is not a sweep's folder and cannot become one. model: the folder that is read."""
        if model is not None and self.path.resolve().is_relative_to(model.resolve()):
            raise UserError(f"{self.path} lies in the model's own folder {model}, which is only read\n{ANOTHER}")
        if not self.path.exists() or not self.path.is_dir():
            check_output(self.path, model)
        elif not (self.path / NAME).is_file() and any(not path.name.startswith(".") for path in self.path.iterdir()):
            raise UserError(f"{self.path} exists and holds no {NAME}: not a sweep's folder\n{ANOTHER}")
        elif not os.access(self.path, os.W_OK | os.X_OK):
            raise UserError(f"{self.path}: you may not write into that folder\n{ANOTHER}")

    def begin(self, model: str, model_hash: str, kind: str) -> None:
        """Make the folder or take it up again; UserError where it is another sweep's, or one runs in it.

        kind: grid or search. A model that has changed under its name, or is the same under another one, may go on.
        """
        mine = {"quantkit_sweep": 1, "kind": kind, "model": model, "model_hash": model_hash}
        try:
            found = json.loads((self.path / NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        if found and found.get("kind") != kind:
            raise UserError(f"{self.path} holds another sweep, a {found.get('kind')}; this is a {kind}\n{ANOTHER}")
        if found and found.get("model") != model and found.get("model_hash") != model_hash:
            raise UserError(f"{self.path} holds another sweep, of {found.get('model')}\n{ANOTHER}")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{self.path}: a sweep is running in it\nhint: wait for it, or end it first") from error
        temporary = self.path / f".{NAME}"
        write_json(temporary, mine)
        temporary.replace(self.path / NAME)
        for folder in (self.rows, self.work):
            folder.mkdir(exist_ok=True)

    def row(self, name: str) -> Path:
        """The file of a row."""
        return self.rows / f"{name}.json"

    def made(self, name: str, label: str) -> Path | None:
        """The folder of a run's model, kept or not yet decided; None where there is none."""
        found = (self.kept(name, label), self.work / name)
        return next((folder for folder in found if folder.is_dir()), None)

    def kept(self, name: str, label: str) -> Path:
        """Where the model of a run is kept: named by its settings."""
        plain = re.sub(r"[^\w.=-]+", "_", label)[:120].strip("_")
        return self.models / f"{plain}_{name[:8]}"

    def drop(self, names: Iterable[str]) -> None:
        """Remove the models of runs, where nobody has decided to keep them."""
        for name in names:
            shutil.rmtree(self.work / name, ignore_errors=True)

    def clear(self, names: Iterable[str], *, finished: bool) -> None:
        """Remove the models that are not kept; finished: nothing of the work folder is of use any longer."""
        if finished:
            shutil.rmtree(self.work, ignore_errors=True)
        else:
            self.drop(names)

    def keep(self, name: str, label: str) -> Path:
        """Keep a run's model for good; returns its folder."""
        place = self.kept(name, label)
        if not place.is_dir():
            self.models.mkdir(exist_ok=True)
            (self.work / name).rename(place)
        return place

    def end(self) -> None:
        """Unlock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
