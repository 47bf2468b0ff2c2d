"""The keys that a recipe can have, written with dots, and the types of their values."""

from collections.abc import Iterator
from functools import cache
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from quantkit.recipe.recipe import Recipe
from quantkit.suggestions import nearest

ITEM = "*"  # in place of the position in a list
ValueType = Literal["int", "float", "bool", "text"]


@cache
def recipe_keys() -> dict[str, ValueType]:
    """Dotted key -> type of its values, `*` for a position in a list; text where a key takes several types."""
    return dict(_fields(Recipe, ""))


def key_type(key: str) -> ValueType | None:
    """The type of a key's values, with positions in lists as numbers; None for what is no key of a recipe."""
    parts = (ITEM if part.isdecimal() else part for part in key.split("."))
    return recipe_keys().get(".".join(parts))


def nearest_key(given: str) -> str | None:
    """The key that was meant, whatever its section: group-size -> weights.group_size."""
    shallow = sorted((key for key in recipe_keys() if ITEM not in key), key=lambda key: key.count("."))
    by_leaf = {key.rpartition(".")[2]: key for key in reversed(shallow)}  # the least deep one counts
    leaf = nearest(given.rpartition(".")[2], by_leaf, cutoff=0.75)
    return nearest(given, shallow, cutoff=0.7) or (by_leaf[leaf] if leaf else nearest(given, shallow))


def _fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, ValueType]]:
    for name, field in model.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        leaves = list(_leaves(field.annotation))
        yield key, _type({leaf for leaf, _ in leaves})
        for leaf, listed in dict.fromkeys(leaves):
            inside = f"{key}.{ITEM}" if listed else key
            if listed:
                yield inside, "text"
            if isinstance(leaf, type) and issubclass(leaf, BaseModel):
                yield from _fields(leaf, f"{inside}.")


def _leaves(annotation: Any, listed: bool = False) -> Iterator[tuple[Any, bool]]:
    """The types that an annotation consists of, and whether they are items of a list."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        yield from ((type(value), listed) for value in inner)
    elif hasattr(annotation, "__metadata__"):
        yield from _leaves(inner[0], listed)
    elif inner:
        yield from (leaf for part in inner for leaf in _leaves(part, listed or origin is list))
    else:
        yield annotation, listed


def _type(leaves: set[Any]) -> ValueType:
    found = leaves - {type(None)}
    if found == {bool}:
        return "bool"
    if found == {int}:
        return "int"
    return "float" if found and found <= {int, float} else "text"
