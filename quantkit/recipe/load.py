"""Reads recipes from YAML files, shipped names and plain data; all problems at once, as file:line: key: message."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from quantkit.errors import UserError
from quantkit.paths import user_path
from quantkit.recipe.data_sets import is_known
from quantkit.recipe.messages import explain
from quantkit.recipe.names import BEST, find, scheme_named, shipped
from quantkit.recipe.recipe import Recipe, cross_checks
from quantkit.recipe.yaml_document import AFTER_THE_FILE, Document, apply_setting, apply_value, parse

MAX_RECIPE_BYTES, MAX_REPORT_BYTES = 1 << 20, 1 << 28
NO_RECIPE = (
    "no recipe and no scheme: nothing says what to make of the model\n"
    "hint: pass --scheme W4A16 (or another scheme) or --recipe NAME; `quantkit recipes` shows what there is to choose"
)


def schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Recipe.model_json_schema(by_alias=True)


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return list(shipped())


def recipe_text(path_or_name: str | Path) -> str:
    """A recipe file as it is written; UserError where there is none."""
    return _read(find(path_or_name))


class RecipeError(UserError):
    """Mistakes in a recipe; problems: one `file:line: key: message` each.

    contradictions: those of them that are between keys, each of which has a value that another recipe can have
    """

    def __init__(self, name: str | Path, problems: list[str], contradictions: Iterable[str] = ()) -> None:
        count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"recipe {name} has {count}:\n" + "\n".join(problems))
        self.problems, self.contradictions = problems, frozenset(contradictions)


@dataclass(frozen=True, slots=True)
class Flag:
    """An option that stands for one key of a recipe. text: YAML, or the value itself where `literal`."""

    name: str
    key: str
    text: str
    literal: bool = False

    @property
    def label(self) -> str:
        return f"{self.name} {self.text}".rstrip()


def load(
    path_or_name: str | Path | None,
    sets: Iterable[str] = (),
    model: str | None = None,
    *,
    flags: Iterable[Flag] = (),
    scheme: str | None = None,
    option: str = "--set",
) -> Recipe:
    """Read a shipped recipe by name, or any file, with `key.path=value` settings and flags applied on top.

    A quantkit-report.json is read too: the recipe of its run. scheme: what the whole recipe is to be, replacing the
    file's; without a recipe it names the best shipped one for it. option: what messages call a setting.
    Relative paths of a file are looked for in the current folder, then beside the file.
    Raises UserError with every problem, one `file:line: key: message` per line.
    """
    scheme = None if scheme is None else scheme_named(scheme)
    if not path_or_name and scheme is None:
        raise UserError(NO_RECIPE)
    path = find(path_or_name or BEST[str(scheme)])
    document = read_document(path)
    if isinstance(document.data, dict):
        sets, flags = list(sets), list(flags)
        if path_or_name and (scheme is not None or any(_names_scheme(setting) for setting in sets)):
            _forget_scheme(document.data)
        if scheme is not None:
            flags.insert(0, Flag("--scheme", "scheme", scheme))
        for setting in sets:
            apply_setting(document, setting, f"{option} {setting}")
        if model is not None:
            flags.append(Flag("--model", "model", model, literal=True))
        for flag in flags:
            _apply_flag(document, flag, sets)
        recipe = _check(document)
        if recipe is not None and not document.problems:
            return _with_paths(recipe, path, document)
    raise RecipeError(path_or_name or path.stem, document.messages(), document.contradictions)


def read_document(path: Path) -> Document:
    """The recipe in a file, a YAML one or a run's report; what is no mapping of keys is a problem of it."""
    text = _read(path)
    if (data := _report_recipe(text)) is not None:
        return Document(data, str(path), {(): (1, str(path))})
    document = parse(text, str(path))
    if document.data is None and not document.problems:
        document.problems.append((1, f"{path}:1: the file is empty: a recipe is a mapping of keys like weights:"))
    if document.data is not None and not isinstance(document.data, dict):
        kind = type(document.data).__name__
        document.problems.append((1, f"{path}:1: a recipe is a mapping of keys like weights:, this is a {kind}"))
    return document


def _report_recipe(text: str) -> dict[str, Any] | None:
    """The recipe of a quantkit-report.json, with the model it was run on; None for any other text."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        report = json.loads(text)
    except ValueError:
        return None
    if not isinstance(report, dict) or not isinstance(report.get("recipe"), dict) or "quantkit" not in report:
        return None
    model = report["recipe"].get("model") or report.get("model")
    return report["recipe"] | ({"model": model} if isinstance(model, str) else {})


def _apply_flag(document: Document, flag: Flag, sets: list[str]) -> None:
    for setting in sets:
        key, _, text = setting.partition("=")
        if key.strip() == flag.key and text.strip() != flag.text:
            document.problems.append((AFTER_THE_FILE, f"{flag.label} and --set {setting} differ: give one of them"))
            return
    parts = flag.key.split(".")
    if flag.literal:
        apply_value(document, parts, flag.text, flag.label)
    else:
        apply_setting(document, f"{flag.key}={flag.text}", flag.label)


def _names_scheme(setting: str) -> bool:
    key, _, value = setting.partition("=")
    return key.strip() == "scheme" and value.strip() not in ("", "~", "null")


def _forget_scheme(data: dict[str, Any]) -> None:
    """Drop the keys of the file that a scheme given on the command line stands for."""
    weights = data.get("weights")
    if isinstance(weights, dict):
        for key in ("type", "bits", "group_size", "symmetric"):
            weights.pop(key, None)
    data.pop("activations", None)


def from_data(data: Mapping[str, Any]) -> Recipe:
    """A recipe from plain data, checked like a file; UserError with every problem, one per line."""
    document = Document(dict(data), "recipe", {(): (1, "recipe")})
    recipe = _check(document)
    if recipe is None or document.problems:
        raise UserError("\n".join(document.messages()))
    return recipe


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_RECIPE_BYTES + 1)
            if len(raw) > MAX_RECIPE_BYTES and raw.lstrip().startswith(b"{"):  # the report of a run of a large model
                raw += file.read(MAX_REPORT_BYTES)
            elif len(raw) > MAX_RECIPE_BYTES:
                raise UserError(f"{path} is larger than {MAX_RECIPE_BYTES} bytes: this is not a recipe")
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}): this is not a recipe") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _check(document: Document) -> Recipe | None:
    """Validate the data; problems are added to the document."""
    known = cross_checks(document.data)
    for path, message in known:
        document.contradictions.add(document.report(path, message))
    try:
        return Recipe.model_validate(document.data)
    except ValidationError as failure:
        for error in failure.errors(include_url=False):
            # Checks of the whole recipe are at loc (): those reported above with their lines, and the transforms.
            path = error["loc"] or ("transforms",)
            if path not in document.unread and not any(message in error["msg"] for _, message in known):
                line = document.report(path, explain(error, Recipe))
                if error["type"] == "value_error" and isinstance(error["input"], Mapping):  # of a section as a whole
                    document.contradictions.add(line)
        return None


def _with_paths(recipe: Recipe, file: Path, document: Document) -> Recipe:
    """The recipe with `~` expanded, and the paths its file gives looked for beside the file if they are not here."""

    def found(value: str, *key: str | int) -> str:
        path = user_path(value)
        if path.exists() or path.is_absolute():
            return str(path) if value.startswith("~") else value  # ./wikitext is the file, wikitext the data set
        known = next((document.where[k] for n in range(len(key), 0, -1) if (k := key[:n]) in document.where), (1, ""))
        beside = file.parent / path
        return str(beside) if known[0] != AFTER_THE_FILE and beside.exists() else value

    update: dict[str, Any] = {}
    if recipe.model is not None:
        update["model"] = found(recipe.model, "model")
    if recipe.calibration is not None:
        data, key = recipe.calibration.data, ("calibration", "data")
        if isinstance(data, str):
            placed: Any = data if is_known(data) else found(data, *key)
        else:
            sources = enumerate(data)
            placed = [
                s if is_known(s.data) else s.model_copy(update={"data": found(s.data, *key, i, "data")})
                for i, s in sources
            ]
        update["calibration"] = recipe.calibration.model_copy(update={"data": placed})
    if recipe.gguf is not None and recipe.gguf.imatrix is not None:
        placed = found(recipe.gguf.imatrix, "gguf", "imatrix")
        update["gguf"] = recipe.gguf.model_copy(update={"imatrix": placed})
    return recipe.model_copy(update=update)
