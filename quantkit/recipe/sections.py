"""The sections of a recipe, strict at every level; each field's text documents it here and in the JSON Schema.

options.py has the algorithms and transforms, schemes.py the number formats.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from quantkit.recipe.algorithms import Algorithm, Strict
from quantkit.recipe.number_formats import Activations, SchemeName, Weights, open_scheme


def _pattern(value: str) -> str:
    if value.startswith("re:"):
        try:
            re.compile(value[3:])
        except re.error as error:
            raise ValueError(f"{value[3:]!r} is not a regular expression: {error}") from None
    elif "*" in value:
        regex = re.escape(value).replace(r"\*", ".*")
        raise ValueError(f"{value!r} looks like a glob: write it as a regular expression, 're:{regex}'")
    return value


Pattern = Annotated[str, Field(min_length=1), AfterValidator(_pattern)]


class Calibration(Strict):
    """The text whose activations the algorithms look at."""

    data: str = Field(min_length=1)
    """A .txt file (one stream), a .jsonl file (`text`, or `messages` put through the chat template), a folder saved by
    `datasets`, or a Hub data set as NAME, NAME:CONFIG or NAME:CONFIG:SPLIT."""
    samples: int = Field(default=128, ge=1, le=1 << 20)
    """How many sequences."""
    seq_len: int = Field(default=512, ge=8, le=1 << 20)
    """Tokens in each."""
    seed: int | None = Field(default=0, ge=0)
    """Which of the sequences are taken where there are more than needed; null takes the first ones."""
    packing: Literal["concat", "document"] = "concat"
    """concat: documents follow each other and are cut into windows. document: the beginning of one document each,
    shorter documents are skipped."""


class Override(Strict):
    """Other settings for the linears a pattern matches."""

    match: Pattern
    """`re:` and a regular expression matched from the start of the full module name, an exact name, or a class name."""
    scheme: SchemeName | None = None
    """Another scheme for them, by the field's name."""
    weights: Weights | None = None
    """Only the keys to change; the rest is taken from the recipe's `weights`."""
    activations: Activations | None = None
    """Other activations for them; null: their inputs stay as they are."""
    skip: bool = False
    """Leave these linears as they are."""

    @model_validator(mode="before")
    @classmethod
    def _open(cls, data: Any) -> Any:
        return open_scheme(data)

    @model_validator(mode="after")
    def _does_something(self) -> "Override":
        if self.skip == bool(self.model_fields_set & {"weights", "activations", "scheme"}):
            raise ValueError("give either weights: {keys to change}, activations or a scheme, or skip: true")
        return self

    @model_serializer(mode="wrap")
    def _only_changes(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Keys that were not given would mean something here: activations: null is a change."""
        given = {key: value for key, value in handler(self).items() if key in self.model_fields_set}
        if self.weights is not None:
            given["weights"] = self.weights.model_dump(mode="json", by_alias=True, exclude_unset=True)
        return given


class Output(Strict):
    """How the result is written."""

    format: Literal["compressed-tensors", "awq", "gptq", "gptq_v2", "fp8", "fp8_tensor", "modelopt"] = (
        "compressed-tensors"
    )
    """Layout of the packed tensors."""
    engine: Literal["vllm", "sglang", "transformers", "llama.cpp", "tensorrt-llm"] | None = None
    """The engine it is for: its rules are checked before any work starts."""
    tp: int = Field(default=1, ge=1, le=1024)
    """Over how many devices the engine will spread each layer."""
    max_shard_gb: float = Field(default=5.0, gt=0, le=1000)
    """Largest file, in GB."""


def matches(pattern: str, name: str, class_name: str) -> bool:
    """`re:` patterns are matched from the start of the full name, as compressed-tensors does; others are exact."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return pattern in (name, class_name)


def merged(base: Weights, change: Weights) -> Weights:
    """base with the keys that were given in `change`; options of the same algorithm merge too."""
    update = {key: getattr(change, key) for key in change.model_fields_set}
    if "choice" in update and change.algorithm == base.algorithm:
        given = {key: getattr(change.options, key) for key in change.options.model_fields_set}
        update["choice"] = Algorithm.model_validate({base.algorithm: base.options.model_copy(update=given)})
    return base.model_copy(update=update)
