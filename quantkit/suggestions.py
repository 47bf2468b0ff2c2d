"""The name that was meant, for messages about a name that does not exist."""

import difflib
import re
from collections.abc import Iterable

from quantkit.errors import UserError


def plain(name: str) -> str:
    """A name as it is compared: lower case, `-` between its parts."""
    return re.sub(r"[\s_-]+", "-", name.strip().lower())


def nearest(given: str, names: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The name most like `given`, whatever the case and the separators; None where none is like it."""
    by_plain = {plain(name): name for name in names}
    close = difflib.get_close_matches(plain(given), by_plain, n=1, cutoff=cutoff)
    return by_plain[close[0]] if close else None


def unknown(kind: str, given: str, names: Iterable[str]) -> UserError:
    """The error for a name of some kind (engine, format, ...) that does not exist; all names where none is like it."""
    near = nearest(given, names := list(names))
    hint = f"did you mean `{near}`?" if near else f"there are {', '.join(names)}"
    return UserError(f"unknown {kind} {given!r}\nhint: {hint}")
