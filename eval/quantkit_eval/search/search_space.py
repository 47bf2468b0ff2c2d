"""What a search may choose: keys with values, or with a range of numbers. No optuna here."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from quantkit.errors import UserError
from quantkit.recipe import load as recipes
from quantkit.recipe.keys import key_type
from quantkit_eval.search.grid import check_keys, combine

NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
RANGE = re.compile(rf"({NUMBER})\.\.({NUMBER})")
# Searched where no --grid says otherwise: what decides about size and harm of integer weights.
DEFAULT = {
    "weights.bits": ("3", "4", "8"),
    "weights.group_size": ("32", "64", "128", "channel"),
    "weights.symmetric": ("true", "false"),
    "weights.algorithm": ("rtn", "gptq"),
    "transforms": ("[]", "[awq]"),
}


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from least to most, by their logarithms where they span a factor of 10 or more."""

    least: float
    most: float
    whole: bool

    @property
    def logarithmic(self) -> bool:
        return self.least > 0 and self.most / self.least >= 10


def range_of(key: str, values: tuple[str, ...]) -> Range | None:
    """The range that a key's values stand for; None where they are values. UserError for one that is none."""
    found = next((match for value in values if (match := RANGE.fullmatch(value))), None)
    if found is None:
        return None
    kind = key_type(key)
    if len(values) > 1 or kind not in ("int", "float"):
        why = "a range stands alone" if len(values) > 1 else "the key takes no numbers"
        raise UserError(f"--grid {key}={','.join(values)}: {why}\nhint: write {key}=LEAST..MOST, or values")
    least, most = float(found[1]), float(found[2])
    if not least < most or (kind == "int" and not (least.is_integer() and most.is_integer())):
        raise UserError(f"--grid {key}={found[0]}: expected LEAST..MOST, {'whole ' * (kind == 'int')}numbers")
    return Range(least, most, kind == "int")


def check_space(base: str, model: str | None, grid: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """What is searched: the grid, or DEFAULT without one. UserError for keys, values and bounds that no recipe has."""
    if not grid:
        recipe = recipes.load(base, (), model)
        if recipe.gguf is not None or recipe.weights.type != "int":
            what = "a GGUF file" if recipe.gguf is not None else f"{recipe.weights.type} weights"
            raise UserError(f"--search: no default space for {what}\nhint: say what to try by --grid KEY=v1,v2")
        return dict(DEFAULT)
    check_keys(grid, base)
    problems: list[str] = []
    for key, values in grid.items():
        found = range_of(key, values)
        ends = values if found is None else tuple(written(end, found) for end in (found.least, found.most))
        for value in ends:
            try:
                combine(base, model, {key: value})
            except recipes.RecipeError as error:
                problems += error.problems
    if problems:
        raise recipes.RecipeError(base, list(dict.fromkeys(problems)))
    return dict(grid)


def written(value: float, among: Range) -> str:
    """A number of a range as YAML."""
    return str(int(value)) if among.whole else repr(float(value))
