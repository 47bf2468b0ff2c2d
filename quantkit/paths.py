"""Paths as users write them. No torch here."""

import os
from pathlib import Path

from quantkit.errors import UserError


def user_path(path: str | Path) -> Path:
    """`path` with a leading `~` or `~name` replaced by that home folder; UserError where there is no such user."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~") and not os.path.lexists(expanded):
        user = expanded.split("/")[0]
        raise UserError(f"{path}: no home folder for {user!r}\nhint: write the path out, or ./{path} for a name with ~")
    return Path(expanded)
