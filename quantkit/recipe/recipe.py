"""The recipe: everything a run depends on, as plain data. Strict at every level; the field descriptions are its manual.

load() reads YAML 1.2 and reports every problem of a file at once, each as `file:line: key: message`. No torch here:
checking a recipe must be instant.

Relative `model` and `calibration.data` paths of a file are looked for in the current folder, then beside the file. What
is found in neither is taken for a Hub name.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from quantkit.errors import UserError
from quantkit.recipe.algorithms import (
    Strict,
    Transform,
)
from quantkit.recipe.gguf import Gguf, gguf_conflicts
from quantkit.recipe.messages import did_you_mean
from quantkit.recipe.number_formats import (
    Activations,
    KVCache,
    SchemeName,
    Weights,
    cache_needs,
    contradictions,
    open_scheme,
)
from quantkit.recipe.sections import Calibration, Experts, Output, Override, Pattern, matches, merged
from quantkit.recipe.yaml_document import KeyPath

NEEDS_CALIBRATION = ("gptq", "awq", "smoothquant")


class Recipe(Strict):
    """What `quantkit quantize` does to a model."""

    model: str | None = Field(default=None, min_length=1)
    """A model folder or Hub id; --model overrides it."""
    calibration: Calibration | None = None
    """The text to calibrate on. {} and, where something needs it, an absent key mean the defaults; null: none."""
    transforms: list[Transform] = Field(default=[])
    """Applied in order before the weights are quantized."""
    scheme: SchemeName | None = None
    """A whole scheme by the field's name, for the weights and activations keys it means; those given count more."""
    weights: Weights = Weights()
    activations: Activations | None = None
    """The number format of the linears' inputs; null leaves them as they are."""
    kv_cache: KVCache | None = None
    """The number format of cached keys and values: fp8, or a mapping, {keys: int8, values: int4} for each its own;
    null leaves them as they are."""
    overrides: list[Override] = Field(default=[])
    """The first one that matches a linear counts."""
    ignore: list[Pattern] = Field(default=["lm_head"])
    """Linears left as they are: exact names, `re:` expressions or class names, as in overrides."""
    propagate: Literal["quantized", "original"] = "quantized"
    """Whether a block is calibrated on the outputs of the quantized blocks before it, or of the original ones."""
    head: Weights | None = None
    """The number format of the output head: only the keys that differ from `weights`, as {bits: 8}; its inputs stay as
    they are. null: it stays dense."""
    experts: Experts = Experts()
    """How the experts of a layer are calibrated."""
    gguf: Gguf | None = None
    """Makes a GGUF file: the name of a mix like q4_k_m, or a mapping. null: the result is a folder of safetensors."""
    output: Output = Output()

    def __init__(self, /, **data: Any) -> None:
        """A recipe from the keys of a file; UserError with every problem, one per line."""
        try:
            super().__init__(**data)
            return
        except ValidationError as failure:
            first = str(failure)
        from quantkit.recipe.load import from_data  # which names keys and what was meant, where pydantic names types

        from_data(data)
        raise UserError(first)

    # Read by pydantic: validating data, as the reader of files does, goes past __init__ and keeps pydantic's errors.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @model_validator(mode="before")
    @classmethod
    def _open(cls, data: Any) -> Any:
        data = open_scheme(data)
        if isinstance(data, Mapping) and data.get("gguf") is not None and isinstance(data.get("output", {}), Mapping):
            data = {**data, "output": {"format": "gguf", **data.get("output", {})}}
        if isinstance(data, Mapping) and "calibration" not in data and uncalibrated({**data, "calibration": None}):
            return {**data, "calibration": {}}
        return data

    @model_validator(mode="after")
    def _rotation_first(self) -> "Recipe":
        names = [transform.name for transform in self.transforms]
        if "rotation" in names[1:]:
            raise ValueError("rotation rewrites the whole model: it comes first among the transforms, and once")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if problems := cross_checks(self.resolved()):
            raise ValueError(problems[0][1])
        return self

    def resolved(self) -> dict[str, Any]:
        """Plain data with every default filled in: for reports and hashes, and a valid recipe itself."""
        return self.model_dump(mode="json", by_alias=True)

    def settings(self) -> dict[str, Any]:
        """The same without where model, text and importance matrix lie: what is in them counts, not where."""
        found = {key: value for key, value in self.resolved().items() if key not in ("model", "calibration")}
        if self.gguf is not None and self.gguf.imatrix is not None:
            found["gguf"] |= {"imatrix": PurePath(self.gguf.imatrix).name}
        return found

    def weights_for(self, name: str, class_name: str) -> Weights | None:
        """The settings of one linear by its full module name and class; None where it is ignored or skipped."""
        if any(matches(pattern, name, class_name) for pattern in self.ignore):
            return None
        override = self._override(name, class_name)
        if override is None or (override.weights is None and not override.skip):
            return self.weights
        return None if override.weights is None else merged(self.weights, override.weights)

    @property
    def head_weights(self) -> Weights | None:
        """The settings of the head; None where it stays as it is."""
        return None if self.head is None else merged(self.weights, self.head)

    def activations_for(self, name: str, class_name: str) -> Activations | None:
        """What the input of one linear is rounded to."""
        override = self._override(name, class_name)
        return override.activations if override and "activations" in override.model_fields_set else self.activations

    def _override(self, name: str, class_name: str) -> Override | None:
        return next((o for o in self.overrides if matches(o.match, name, class_name)), None)

    def unmatched(self, linears: Mapping[str, str], never: Mapping[str, str] | None = None) -> list[str]:
        """A message for each pattern that has no effect on a model.

        linears: full name -> class name of the linears that can be quantized; never: full name -> reason of those that
        cannot. Patterns that leave out what is never quantized agree with what happens, so they are fine; the default
        ignore entry lm_head is fine in a model without one too.
        """
        never = never or {}
        names = {**dict.fromkeys(never, "Linear"), **linears}
        problems = []
        for i, pattern in enumerate(self.ignore):
            if pattern != "lm_head" and not any(matches(pattern, *linear) for linear in names.items()):
                problems.append(f"ignore.{i}: {pattern!r} matches no linear{_nearest_linear(pattern, names)}")
        if not self.ignore and (head := next((name for name in never if name.rpartition(".")[2] in HEADS), None)):
            problems.append(
                f"ignore: [] cannot have an effect: {_limit(head, never)}; remove `ignore` or set [lm_head]"
            )
        for i, override in enumerate(self.overrides):
            if problem := self._without_effect(i, override, linears, never, names):
                problems.append(f"overrides.{i}.match: {override.match!r} {problem}")
        return problems

    def _without_effect(
        self,
        index: int,
        override: Override,
        linears: Mapping[str, str],
        never: Mapping[str, str],
        names: Mapping[str, str],
    ) -> str | None:
        """Why an override changes nothing, None where it does."""
        found = [name for name, kind in names.items() if matches(override.match, name, kind)]
        if not found:
            return f"matches no linear{_nearest_linear(override.match, names)}"
        possible = [name for name in found if name in linears]
        if not possible:
            limit = f"can have no effect: {_limit(found[0], never)}; remove this override"
            return None if override.skip else limit
        left = [name for name in possible if not any(matches(p, name, linears[name]) for p in self.ignore)]
        if not left:
            return f"matches only what `ignore` leaves out ({possible[0]}): remove that from `ignore`"
        earlier = self.overrides[:index]
        first = [next((j for j, o in enumerate(earlier) if matches(o.match, n, linears[n])), None) for n in left]
        if None not in first:
            return f"matches only what overrides.{first[0]} already covers ({left[0]}): the first match counts"
        return None


HEADS = ("lm_head", "embed_out", "output")


def _limit(name: str, never: Mapping[str, str]) -> str:
    own = ", and the head with `head: {bits: 8}`" if name.rpartition(".")[2] in HEADS else ""
    return f"{name} is never quantized ({never[name]}); quantkit quantizes the linears of the decoder blocks{own}"


def cross_checks(data: Mapping[str, Any]) -> list[tuple[KeyPath, str]]:
    """(key path, message) for what is wrong between keys; works on data that is wrong in other ways too.

    Of what needs calibration text only the first key is named.
    """
    found: list[tuple[KeyPath, str]] = list(contradictions(data))
    overrides = data.get("overrides")
    for i, override in enumerate(overrides if isinstance(overrides, list) else []):
        if isinstance(override, Mapping):
            found += [(("overrides", i, *path), message) for path, message in contradictions(override)]
    return found + list(gguf_conflicts(data)) + uncalibrated(data)


def uncalibrated(data: Mapping[str, Any]) -> list[tuple[KeyPath, str]]:
    """The first thing that needs calibration text in a recipe that rules it out, tolerant of otherwise wrong data."""
    if data.get("calibration", {}) is not None:
        return []
    data = open_scheme(data)

    def items(value: Any) -> Sequence[Any]:
        return value if isinstance(value, list) else []

    def algorithm(holder: Any) -> Any:
        weights = holder.get("weights") if isinstance(holder, Mapping) else None
        return weights.get("algorithm") if isinstance(weights, Mapping) else None

    places: list[tuple[KeyPath, Any]] = [(("weights", "algorithm"), algorithm(data))]
    places += [(("head", "algorithm"), algorithm({"weights": data.get("head")}))]
    places += [(("transforms", i), item) for i, item in enumerate(items(data.get("transforms")))]
    overrides = enumerate(items(data.get("overrides")))
    places += [(("overrides", i, "weights", "algorithm"), algorithm(item)) for i, item in overrides]
    holders = [((), data), *((("overrides", i), open_scheme(o)) for i, o in enumerate(items(data.get("overrides"))))]
    add = "add a section like calibration: {} (general text) or calibration: {data: FILE}"
    found = [
        (path, f"{name} needs calibration text: {add}")
        for path, value in places
        for name in NEEDS_CALIBRATION
        if value == name or (isinstance(value, Mapping) and name in value)
    ]
    for path, holder in holders:
        inputs = holder.get("activations") if isinstance(holder, Mapping) else None
        if isinstance(inputs, Mapping) and (inputs.get("dynamic") is False or inputs.get("type") == "nvfp4"):
            key = "scheme" if isinstance(holder, Mapping) and "scheme" in holder else "activations"
            what = "nvfp4 activations need" if inputs.get("type") == "nvfp4" else "static activation ranges need"
            found.append(((*path, key), f"{what} calibration text: {add}"))
    mix = section.get("mix") if isinstance(section := data.get("gguf"), Mapping) else None
    if isinstance(mix, Mapping):
        found.append((("gguf", "mix"), f"types by measured harm need calibration text: {add}"))
    if (what := cache_needs(data.get("kv_cache"))) is not None:
        found.append((("kv_cache",), f"{what} calibration text: {add}"))
    return found[:1]


def _nearest_linear(pattern: str, names: Mapping[str, str]) -> str:
    if not pattern.startswith("re:"):
        return did_you_mean(pattern, {*names, *names.values()})
    leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
    words = re.findall(r"[A-Za-z]\w+", pattern[3:])
    hint = did_you_mean(words[-1], leaves) if words else ""
    return hint or f"; names end in {', '.join(leaves[:12])}"
