"""The recipe of a choice of candidates, as a file that a person reads and edits."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from quantkit.quantization.allocation.units import Option, Unit
from quantkit.recipe.candidates import DENSE, Candidate
from quantkit.recipe.load import from_data
from quantkit.recipe.number_formats import PRESETS
from quantkit.recipe.recipe import Recipe
from quantkit.recipe.yaml_document import parse

WORDS = ("null", "true", "false", "yes", "no", "on", "off")  # that YAML does not read as text
EXPERT = re.compile(r"\\\.experts\\\.\d+\\\.")  # in an escaped name: a unit holds all experts of a layer


def recipe_text(
    base: Recipe,
    candidates: Sequence[Candidate],
    units: Sequence[Unit],
    chosen: Mapping[str, Option],
    comments: Sequence[str],
) -> str:
    """YAML: the candidate that most weights get as the recipe's own, the others as overrides by regular expression.

    base: model, calibration and output; comments: the first lines.
    """
    weights = Counter[str]()
    for unit in units:
        weights[chosen[unit.name].candidate] += unit.weights
    keys = {one.name: one.keys for one in candidates}
    main = next(name for name, _ in weights.most_common() if name != DENSE)
    calibration = {} if base.calibration is None else base.calibration.model_dump(mode="json", exclude_unset=True)
    output = base.output.model_dump(mode="json", exclude_unset=True)
    lines = [f"# {comment}" for comment in comments]
    lines += ["", f"model: {_flow(base.model)}", f"calibration: {_flow(calibration)}"]
    lines += [f"{key}: {_flow(value)}" for key, value in keys[main].items()]
    lines[-1] += f"  # {main}: {_share(weights, main)}"
    lines += ["", "overrides:"] if len(weights) > 1 else []
    for name in (name for name, _ in weights.most_common() if name != main):
        lines.append(f"  # {name}: {_share(weights, name)}")
        change = "skip: true" if name == DENSE else _change(keys[main], keys[name])
        alike = [unit for unit in units if chosen[unit.name].candidate == name]
        lines += [f"  - {{match: {_quoted(pattern)}, {change}}}" for pattern in patterns(alike)]
    lines += ["", "ignore: [lm_head]", *([f"output: {_flow(output)}"] if output else [])]
    return "\n".join(lines) + "\n"


def recipe_of(text: str) -> Recipe:
    """The recipe that a text made here holds."""
    document = parse(text, "recipe.yaml")
    assert not document.problems, document.problems
    return from_data(document.data)


def patterns(units: Sequence[Unit]) -> list[str]:
    """Expressions that match exactly the linears of these units: one for units of a kind, whatever their blocks."""
    blocks: dict[tuple[str, str], list[int]] = {}
    for unit in units:
        parts = [name.partition(f".{unit.block}.") for name in unit.members]
        ends = sorted({EXPERT.sub(r"\\.experts\\.\\d+\\.", re.escape(end)) for _, _, end in parts})
        blocks.setdefault((parts[0][0], _any_of(ends)), []).append(unit.block)
    return [
        f"re:{re.escape(start)}\\.{_any_of(map(str, sorted(found)))}\\.{end}$" for (start, end), found in blocks.items()
    ]


def _change(main: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The keys of an override to `other` in a recipe whose own are `main`: of integers only what differs."""
    if "scheme" in other:
        return _keys(other)
    if "scheme" in main:
        return _keys(other) + ", activations: null" * ("activations" in PRESETS[main["scheme"]])
    kept = {key: value for key, value in other["weights"].items() if value != main["weights"][key]}
    return _keys({"weights": kept})


def _keys(keys: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}: {_flow(value)}" for key, value in keys.items())


def _any_of(texts: Iterable[str]) -> str:
    """One expression for several texts; what they begin with stands in front."""
    texts = list(texts)
    if len(texts) == 1:
        return texts[0]
    cut = min(text.rfind("\\.") for text in texts)
    start = texts[0][: cut + 2] if cut >= 0 else ""
    if any(not text.startswith(start) for text in texts):
        start = ""
    return f"{start}({'|'.join(text.removeprefix(start) for text in texts)})"


def _share(weights: Mapping[str, int], name: str) -> str:
    return f"{weights[name] / sum(weights.values()):.0%} of the weights"


def _quoted(text: str) -> str:
    """A YAML scalar in single quotes, in which a backslash is one."""
    escaped = text.replace("'", "''")
    return f"'{escaped}'"


def _flow(value: Any) -> str:
    """A value on one line of YAML."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w./-]*", value) is not None
    return value if plain and value.lower() not in WORDS else json.dumps(value)
