"""Validation errors of a recipe in the words of its author, with the nearest valid name."""

from collections.abc import Iterable, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from quantkit.recipe.algorithms import Choice
from quantkit.suggestions import nearest


def explain(error: Any, root: type[BaseModel]) -> str:
    """One of pydantic's error details, raised by validating with `root`, as a message without its place."""
    kind, path, given, context = error["type"], error["loc"], error["input"], error.get("ctx", {})
    got = f"got {_shown(given)}"
    match kind:
        case "extra_forbidden":
            holder = _model_at(path[:-1], root)
            names = [field.alias or name for name, field in holder.model_fields.items()]
            valid = "" if (hint := did_you_mean(str(path[-1]), names)) else f"; valid here: {', '.join(names)}"
            return f"unknown {'name' if issubclass(holder, Choice) else 'key'}{hint}{valid}"
        case "missing":
            return "this key is required"
        case "literal_error":
            expected = context["expected"].replace(" or ", ", ").replace("'", "")
            hint = did_you_mean(str(given), expected.split(", "))
            return f"unknown value {str(given)[:60]!r}{hint}" if hint else f"{got}; must be one of {expected}"
        case "whole_or_auto":
            return f"{error['msg']}, {got}{did_you_mean(str(given), ['auto'])}"
        case "value_error":
            return str(context["error"])
        case "model_type" if issubclass(model := _model_at(path, root), Choice):
            return f"must be a name ({', '.join(model.model_fields)}) or {{name: {{option: value}}}}, {got}"
    bounds = {
        "greater_than_equal": ("at least", "ge"),
        "less_than_equal": ("at most", "le"),
        "greater_than": ("more than", "gt"),
    }
    if kind in bounds:
        words, bound = bounds[kind]
        return f"must be {words} {context[bound]}, {got}"
    types = {
        **dict.fromkeys(("int_type", "int_from_float"), "a whole number"),
        **dict.fromkeys(("float_type", "finite_number"), "a number"),
        "bool_type": "true or false",
        "string_type": "text",
        "string_too_short": "some text",
        "list_type": "a list",
        "model_type": "a mapping of keys",
    }
    return f"must be {types[kind]}, {got}" if kind in types else f"{error['msg']}, {got}"


def _shown(value: Any) -> str:
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case str():
            return f"the text {value[:60]!r}"
        case dict():
            return "a mapping"
        case list():
            return "a list"
    return str(value)[:60]


def _model_at(path: Sequence[str | int], root: type[BaseModel]) -> type[BaseModel]:
    """The model a path from `root` leads to."""
    model = root
    for part in path:
        if isinstance(part, int):
            continue
        field = next(f for name, f in model.model_fields.items() if (f.alias or name) == part)
        model = next(m for m in _leaves(field.annotation) if isinstance(m, type) and issubclass(m, BaseModel))
    return model


def _leaves(annotation: Any) -> list[Any]:
    inner = get_args(annotation)
    return [leaf for part in inner for leaf in _leaves(part)] if inner else [annotation]


def did_you_mean(given: str, names: Iterable[str], cutoff: float = 0.5) -> str:
    """`; did you mean 'x'?`, or nothing where no name is near."""
    near = nearest(given, names, cutoff)
    return f"; did you mean {near!r}?" if near else ""
