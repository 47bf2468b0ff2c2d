"""Candidates of `quantkit auto`: number formats of linears by name, as the recipe keys they stand for. No torch."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from quantkit.errors import UserError
from quantkit.recipe.load import from_data
from quantkit.recipe.number_formats import PRESETS
from quantkit.recipe.recipe import Recipe
from quantkit.suggestions import nearest, plain

DENSE = "as stored"  # what every linear may stay as
GROUPS = (32, 64, 128, "channel")  # of an integer format named without its group size
DEFAULT = ("W2A16", "W3A16", "W4A16", "W5A16", "W6A16", "W8A16")
GPTQ, RTN = {"gptq": {"sweeps": 2}}, "rtn"
_INTEGERS = {
    f"W{bits}A16{'' if symmetric else '_ASYM'}": {"weights": {"type": "int", "bits": bits, "symmetric": symmetric}}
    for bits in range(2, 9)
    for symmetric in (True, False)
}
NAMES: dict[str, Mapping[str, Any]] = {**PRESETS, **_INTEGERS}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A number format that a linear may get.

    keys  of a recipe or of one of its overrides: `weights` with every key that counts, or `scheme` and `weights`
    """

    name: str
    keys: Mapping[str, Any] = field(hash=False)


def candidates(names: Iterable[str] = DEFAULT) -> list[Candidate]:
    """The candidates that names stand for, each once: W4A16:g32, W3A16:channel, FP8_DYNAMIC, ...

    An integer format without inputs' rounding named without its group size stands for all of GROUPS. UserError for a
    name that is none, with the nearest, and where there are no names.
    """
    found: dict[str, Candidate] = {}
    for text in names:
        for candidate in _named(text.strip()):
            found.setdefault(candidate.name, candidate)
    if not found:
        raise UserError("--candidates: no names\nhint: --candidates W3A16,W4A16:g64,W8A16,FP8_DYNAMIC")
    return list(found.values())


def base_recipe(model: str | None, calibration: Mapping[str, Any], engine: str | None, tp: int) -> Recipe:
    """What holds for all candidates: the model, its calibration text, the engine; UserError for wrong keys."""
    if engine == "llama.cpp":
        raise UserError(
            "llama.cpp loads GGUF files, whose types a recipe fits to a size by the same measure\n"
            "hint: quantkit quantize --recipe q4_k_m --set 'gguf.mix={size: 3.6MB}', or {bits_per_weight: 4.5}"
        )
    if engine is None and tp != 1:
        raise UserError(
            f"--tp {tp}: no engine is named that would spread layers over devices\nhint: pass --engine vllm too"
        )
    data = {"model": model, "calibration": dict(calibration), "weights": {"algorithm": GPTQ}}
    return from_data({**data, "output": {"engine": engine, "tp": tp} if engine else {}})


def _named(text: str) -> list[Candidate]:
    first, _, size = text.partition(":")
    name = next((known for known in NAMES if plain(known) == plain(first)), None)
    if name is None:
        near = nearest(first, NAMES)
        hint = f"did you mean `{near}`?" if near else f"there are {', '.join(NAMES)}"
        raise UserError(f"--candidates: no candidate named `{text}`\nhint: {hint}")
    weights = dict(NAMES[name]["weights"])
    if size:
        return [_candidate(name, _size(text, size, weights))]
    if name in _INTEGERS:
        return [_candidate(name, group) for group in GROUPS]
    return [_candidate(name, None)]


def _size(text: str, size: str, weights: Mapping[str, Any]) -> int | str:
    """The group size that a suffix says; UserError where it is none, or the format has its own."""
    number = re.fullmatch(r"g?([1-9]\d*)", size)
    if number is None and size != "channel":
        raise UserError(
            f"--candidates: `{text}`: `{size}` is no group size\n"
            f"hint: {text.partition(':')[0]}:g128, or :channel for one scale per output row"
        )
    if weights["type"] != "int":
        raise UserError(f"--candidates: `{text}`: {weights['type']} weights have a group size of their own")
    return int(number[1]) if number else size


def _candidate(name: str, size: int | str | None) -> Candidate:
    integers = NAMES[name]["weights"]["type"] == "int"
    weights: dict[str, Any] = {"algorithm": GPTQ if integers else RTN}
    label = name if size is None else f"{name}:{size if size == 'channel' else f'g{size}'}"
    if name in _INTEGERS:
        keys = {"weights": {**NAMES[name]["weights"], "group_size": size, **weights}}
    else:
        keys = {"scheme": name, "weights": weights if size is None else {"group_size": size, **weights}}
    from_data({"calibration": {}, **keys})  # a group size that the schema refuses
    return Candidate(label, keys)
