"""A grid over the keys of a recipe: read, checked, and all its combinations as recipes. No torch here."""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from quantkit.errors import UserError
from quantkit.recipe import load as recipes
from quantkit.recipe.keys import key_type, nearest_key
from quantkit.recipe.names import find
from quantkit.recipe.recipe import Recipe
from quantkit.recipe.yaml_document import KeyPath

OPENING, CLOSING, QUOTES = "{[", "}]", "\"'"
MOST = 100_000  # combinations; more are a slip


@dataclass(frozen=True, slots=True)
class Combination:
    """One point: the settings, key -> value as YAML, and the recipe they make."""

    settings: Mapping[str, str]
    recipe: Recipe

    @property
    def label(self) -> str:
        return label(self.settings)


@dataclass(frozen=True, slots=True)
class Impossible:
    """Settings that no run can have, and why."""

    settings: Mapping[str, str]
    reason: str

    @property
    def label(self) -> str:
        return label(self.settings)


@dataclass(frozen=True, slots=True)
class Checked:
    """What a grid comes to. folded: combinations left out because another one makes the same recipe."""

    combinations: tuple[Combination, ...]
    impossible: tuple[Impossible, ...]
    folded: int


def label(settings: Mapping[str, str]) -> str:
    """`weights.bits=3 weights.group_size=32`."""
    return " ".join(f"{key}={value}" for key, value in settings.items())


def split_values(text: str) -> list[str]:
    """The parts of `3,{a: 1, b: 2},"x,y"` between the commas that are outside of brackets and quotes, stripped."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in QUOTES and (not parts[-1].strip() or parts[-1].rstrip()[-1] in "{[:,"):  # not in: it's
            quote = letter
        depth += 0 if quote else (letter in OPENING) - (letter in CLOSING)
        if letter == "," and depth <= 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def parse_grid(given: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Key -> its values of `KEY=v1,v2` texts, each value once. UserError for what is not written like that."""
    grid: dict[str, tuple[str, ...]] = {}
    for text in given:
        key, equals, values = text.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UserError(f"--grid {text}: found no KEY=VALUES\nhint: write it like weights.bits=3,4")
        parts = split_values(values)
        if not all(parts):
            what = "no values" if parts == [""] else "an empty value"
            raise UserError(f"--grid {text}: {what}\nhint: write it like {key}=A,B; null is written null")
        for other in grid:
            if f"{other}.".startswith(f"{key}.") or f"{key}.".startswith(f"{other}."):
                twice = "is given twice" if other == key else f"and {other} set the same keys"
                raise UserError(f"--grid {key} {twice}\nhint: give one --grid {min(key, other)} with all of its values")
        grid[key] = tuple(dict.fromkeys(parts))
    return grid


def check_keys(grid: Mapping[str, Sequence[str]], base: str) -> None:
    """UserError for keys that no recipe has, with their place in the base recipe and the key that was meant."""
    for key, values in grid.items():
        if key == "model":
            raise UserError(
                "--grid model: a sweep is of one model\nhint: run one for each model, with an --output each"
            )
        if key_type(key) is None:
            near = nearest_key(key)
            hint = f"did you mean `{near}`?" if near else "`quantkit recipes schema` lists all keys"
            place = _place(base, near or key)
            raise UserError(f"{place}: no recipe has a key `{key}` (--grid {key}={','.join(values)})\nhint: {hint}")


def _place(base: str, key: str) -> str:
    """file:line of the base recipe where a key stands, or of the nearest section that it belongs to."""
    path = find(base)
    where = recipes.read_document(path).where
    parts: KeyPath = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
    known = (where[parts[:n]] for n in range(len(parts), 0, -1) if parts[:n] in where)
    return next((label for _, label in known), f"{path}:1")


def combine(base: str, model: str | None, settings: Mapping[str, str]) -> Combination | Impossible:
    """The recipe of some settings. UserError for a value that its key cannot have, whatever the others are."""
    try:
        given = [f"{key}={value}" for key, value in settings.items()]
        return Combination(settings, recipes.load(base, given, model, option="--grid"))
    except recipes.RecipeError as error:
        wrong = [problem for problem in error.problems if problem not in error.contradictions]
        if wrong:
            raise recipes.RecipeError(base, wrong) from None
        return Impossible(settings, "; ".join(_without_option(problem) for problem in error.problems))


def _without_option(problem: str) -> str:
    return problem.partition(": ")[2] if problem.startswith("--grid ") else problem


def check_grid(base: str, model: str | None, grid: Mapping[str, Sequence[str]]) -> Checked:
    """All combinations of a grid. UserError for keys and values that no recipe has, every wrong value in one message.

    Combinations whose recipes are equal are folded into the first of them.
    """
    check_keys(grid, base)
    if (count := _product(grid)) > MOST:
        raise UserError(f"--grid: {count:,} combinations, at most {MOST:,} are taken\nhint: leave out some values")
    _check_values(base, model, grid)
    possible: dict[str, Combination] = {}
    impossible: list[Impossible] = []
    folded = 0
    for values in itertools.product(*grid.values()):
        found = combine(base, model, dict(zip(grid, values, strict=True)))
        if isinstance(found, Impossible):
            impossible.append(found)
            continue
        same = json.dumps(found.recipe.resolved(), sort_keys=True)
        folded += same in possible
        possible.setdefault(same, found)
    return Checked(tuple(possible.values()), tuple(impossible), folded)


def _product(grid: Mapping[str, Sequence[str]]) -> int:
    count = 1
    for values in grid.values():
        count *= len(values)
    return count


def _check_values(base: str, model: str | None, grid: Mapping[str, Sequence[str]]) -> None:
    """UserError with a line for each value of the grid, and each key of the base, that is wrong by itself."""
    problems: dict[str, None] = {}
    for key, values in grid.items():
        for value in values:
            try:
                combine(base, model, {key: value})
            except recipes.RecipeError as error:
                problems |= dict.fromkeys(error.problems)
    if problems:
        raise recipes.RecipeError(base, list(problems))
