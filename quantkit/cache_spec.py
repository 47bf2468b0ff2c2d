"""The number formats of a cache of keys and values, each its own: in memory, in a config.json, on a command line."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from quantkit.errors import UserError
from quantkit.suggestions import nearest
from quantkit.types import KVSpec

NAME = re.compile(r"(?:fp8|int(?P<bits>[2-8]))(?P<asym>-asym)?(?:-g(?P<group>[1-9]\d*))?(?P<packed>-packed)?")
KINDS = ("fp8", *(f"int{bits}" for bits in range(8, 1, -1)))
UNQUANTIZED = ("none", "16")


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """The number formats of a cache of keys and values; None: as the model computes them."""

    keys: KVSpec | None
    values: KVSpec | None

    @property
    def shared(self) -> KVSpec | None:
        """The one format of keys and values; None where they differ."""
        return self.keys if self.keys == self.values else None

    @property
    def calibrated(self) -> bool:
        """Whether keys or values need numbers from calibration."""
        return any(side is not None and side.calibrated for side in (self.keys, self.values))

    def __str__(self) -> str:
        if self.shared is not None:
            return str(self.shared)
        return ", ".join(
            f"{name} {'as computed' if side is None else side}"
            for name, side in (("keys", self.keys), ("values", self.values))
        )

    def to_json(self) -> dict[str, Any]:
        """The fields of the one format, or both under `keys` and `values`."""
        if self.shared is not None:
            return self.shared.to_json()
        sides = {"keys": self.keys, "values": self.values}
        return {name: None if side is None else side.to_json() for name, side in sides.items()}

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """What `to_json` wrote; ValueError in plain words for anything else."""
        if not isinstance(data, Mapping):
            raise ValueError(f"{data!r} is no mapping")
        if data.keys() == {"keys", "values"}:
            return cls(*(None if data[name] is None else _kv_from_json(data[name]) for name in ("keys", "values")))
        one = _kv_from_json(data)
        return cls(one, one)


def _kv_from_json(data: Any) -> KVSpec:
    known = {field.name for field in fields(KVSpec)}
    if not isinstance(data, Mapping) or not {"bits", "element"} <= data.keys() <= known:
        raise ValueError(f"{data!r} does not name the fields of a cache's format")
    kinds: dict[str, Any] = {"bits": int, "group_size": int, "symmetric": bool, "packed": bool, "channels": bool}
    words = {"element": ("int", "float"), "per": ("tensor", "head", "token")}
    for name, value in data.items():
        if value not in words[name] if name in words else type(value) is not kinds[name]:
            raise ValueError(f"{name} is {value!r}")
    try:
        return KVSpec(**data)
    except UserError as error:
        raise ValueError(str(error)) from error


def cache_named(text: str) -> CacheSpec | None:
    """The formats that `int8` or `keys=int8,values=int4` stands for; None for `none`: as the model computes them.

    A name is fp8 or int2 to int8, and behind an integer -asym (with a zero point), -g32 (so many features share a
    scale) and -packed (scale and zero point in 16 bits), in this order; or none. All have scales per token. UserError
    naming what was meant for any other text.
    """
    parts = [part.strip() for part in text.split(",")]
    if "=" not in text:
        side = _side_named(text.strip(), text)
        return None if side is None else CacheSpec(side, side)
    given = dict[str, KVSpec | None]()
    for part in parts:
        name, equals, value = (word.strip() for word in part.partition("="))
        if name not in ("keys", "values") or not equals or name in given:
            near = nearest(name, ("keys", "values")) if name not in ("keys", "values") else None
            hint = f"did you mean `{near}`?" if near else "write it like keys=int8,values=int4"
            raise UserError(
                f"cache {text!r}: found {part!r}, expected keys=NAME and values=NAME, each once\nhint: {hint}"
            )
        given[name] = _side_named(value, text)
    if missing := {"keys", "values"} - given.keys():
        raise UserError(
            f"cache {text!r} says nothing of the {missing.pop()}\nhint: write `none` to leave them as they are"
        )
    found = CacheSpec(given["keys"], given["values"])
    return None if found == CacheSpec(None, None) else found


def _side_named(name: str, text: str) -> KVSpec | None:
    if name in UNQUANTIZED:
        return None
    found = NAME.fullmatch(name)
    if found is None:
        near = nearest(name, (*KINDS, "none"))
        hint = (
            f"did you mean `{near}`?" if near else f"there are none, {', '.join(KINDS)}, and names like int4-asym-g32"
        )
        raise UserError(f"cache {text!r}: unknown format {name!r}\nhint: {hint}")
    bits, group = int(found["bits"] or 8), int(found["group"] or -1)
    element = "int" if found["bits"] else "float"
    try:
        return KVSpec(bits, element, "token", not found["asym"], group, bool(found["packed"]))
    except UserError as error:
        raise UserError(f"cache {text!r}: {name}: {error}") from error
