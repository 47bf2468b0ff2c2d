"""Reads recipes from YAML files, shipped names and plain data; all problems at once, as file:line: key: message."""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from quantkit.errors import UserError
from quantkit.recipe.messages import explain
from quantkit.recipe.number_formats import PRESETS
from quantkit.recipe.recipe import Recipe, cross_checks
from quantkit.recipe.yaml_document import AFTER_THE_FILE, Document, apply_setting, parse

MAX_RECIPE_BYTES = 1 << 20


def schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Recipe.model_json_schema(by_alias=True)


def shipped() -> dict[str, Path]:
    """Name -> file of the recipes that come along: inside the wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    folder = next((f for f in (package / "recipes", package.parent / "recipes") if f.is_dir()), package)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return list(shipped())


def recipe_text(path_or_name: str | Path) -> str:
    """A recipe file as it is written; UserError where there is none."""
    return _read(_find(path_or_name))


def load(path_or_name: str | Path, sets: Iterable[str] = (), model: str | None = None) -> Recipe:
    """Read a shipped recipe by name, or any file, with `key.path=value` settings applied on top.

    Raises UserError with every problem, one `file:line: key: message` per line.
    """
    path = _find(path_or_name)
    document = parse(_read(path), str(path))
    if document.data is None and not document.problems:
        document.problems.append((1, f"{path}:1: the file is empty: a recipe is a mapping of keys like weights:"))
    if document.data is not None and not isinstance(document.data, dict):
        kind = type(document.data).__name__
        document.problems.append((1, f"{path}:1: a recipe is a mapping of keys like weights:, this is a {kind}"))
    if isinstance(document.data, dict):
        sets = list(sets)
        if any(_names_scheme(setting) for setting in sets):
            _forget_scheme(document.data)
        for setting in sets:
            apply_setting(document, setting)
        if model is not None:
            document.data["model"] = model
            document.where["model",] = (AFTER_THE_FILE, "--model")
        recipe = _check(document)
        if recipe is not None and not document.problems:
            return _with_paths(recipe, path)
    messages = document.messages()
    count = "a problem" if len(messages) == 1 else f"{len(messages)} problems"
    raise UserError(f"recipe {path_or_name} has {count}:\n" + "\n".join(messages))


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


def _find(path_or_name: str | Path) -> Path:
    known = shipped()
    if str(path_or_name) in known:
        return known[str(path_or_name)]
    path = Path(path_or_name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a recipe file\nhint: `quantkit recipes` lists the shipped recipes")
    scheme = str(path_or_name).upper()
    if scheme in PRESETS:
        hint = f"`{scheme}` is a scheme: give a recipe, and with it --set scheme={scheme}"
    else:
        near = difflib.get_close_matches(path.stem.lower(), known, n=1, cutoff=0.5)
        hint = (
            f"did you mean `{near[0]}`? `quantkit recipes` lists all" if near else "`quantkit recipes` lists the names"
        )
    raise UserError(f"no recipe or file named `{path_or_name}`\nhint: {hint}")


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_RECIPE_BYTES + 1)
        if len(raw) > MAX_RECIPE_BYTES:
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
        document.report(path, message)
    try:
        return Recipe.model_validate(document.data)
    except ValidationError as failure:
        for error in failure.errors(include_url=False):
            # Checks of the whole recipe are at loc (): those reported above with their lines, and the transforms.
            path = error["loc"] or ("transforms",)
            if path not in document.unread and not any(message in error["msg"] for _, message in known):
                document.report(path, explain(error, Recipe))
        return None


def _with_paths(recipe: Recipe, file: Path) -> Recipe:
    def found(value: str) -> str:
        path, beside = Path(value).expanduser(), file.resolve().parent.parent / value
        return str(path) if path.exists() else str(beside) if beside.exists() else value

    update: dict[str, Any] = {}
    if recipe.model is not None:
        update["model"] = found(recipe.model)
    if recipe.calibration is not None:
        update["calibration"] = recipe.calibration.model_copy(update={"data": found(recipe.calibration.data)})
    return recipe.model_copy(update=update)
