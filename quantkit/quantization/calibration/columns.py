"""Which columns of a table, or keys of a row, hold the text."""

from collections.abc import Collection

from quantkit.errors import UserError
from quantkit.recipe.messages import did_you_mean

# In this order: the first that a row has is read.
SHAPES = (("text",), ("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"))
BESIDE = {"instruction": "input"}  # read too where it is there
KNOWN = "`prompt` and `completion`, or `instruction` and `output`"


def read_columns(names: Collection[str], column: str | None) -> list[str]:
    """Those of a table's columns that are read: `column` where one is named; empty where there is nothing to read."""
    if column is not None:
        return [column] if column in names else []
    shapes = [shape for shape in SHAPES if all(name in names for name in shape)]
    found = [name for shape in shapes for name in shape]
    return found + [name for key, name in BESIDE.items() if key in found and name in names]


def no_column(place: str, names: Collection[str], column: str | None) -> UserError:
    """What to raise for a table, or a row, without a column to read."""
    has = ", ".join(map(str, names))[:200] or "no keys"
    if column is not None:
        hint = did_you_mean(column, map(str, names)).removeprefix("; ") or "set calibration.column to one of these"
        return UserError(f"{place}: no column `{column}`, only: {has}\nhint: {hint}")
    return UserError(
        f"{place}: has neither `text` (text) nor `messages` (a list), only: {has}\n"
        f"hint: name the one to read with calibration.column; without, `text`, `messages`, `conversations`, {KNOWN} are"
    )
