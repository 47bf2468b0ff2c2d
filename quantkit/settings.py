"""The sections of a recipe, strict at every level; each field's text documents it here and in the JSON Schema."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    field_serializer,
    model_serializer,
    model_validator,
)


class Strict(BaseModel):
    """Unknown keys, "4" for 4, true for 1, NaN: all refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Choice(Strict):
    """One name with its options, written `name` or `{name: {option: value}}`: exactly one field is set."""

    @model_validator(mode="before")
    @classmethod
    def _open_short_form(cls, data: Any) -> Any:
        if isinstance(data, str):
            return {data: {}}
        if isinstance(data, Mapping):
            return {name: {} if options is None else options for name, options in data.items()}
        return data

    @model_validator(mode="after")
    def _exactly_one(self) -> "Choice":
        chosen = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(chosen) != 1:
            raise ValueError(f"name exactly one of {', '.join(type(self).model_fields)}, got {len(chosen)}")
        return self

    @model_serializer
    def _dump(self, info: SerializationInfo) -> dict[str, Any]:
        return {self.name: self.options.model_dump(mode=info.mode, exclude_unset=info.exclude_unset)}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        mapping = handler(core_schema) | {"minProperties": 1, "maxProperties": 1}
        names = {"type": "string", "enum": list(cls.model_fields)}
        return {"title": cls.__name__, "description": cls.__doc__, "anyOf": [names, mapping]}

    @property
    def name(self) -> str:
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)

    @property
    def options(self) -> Any:
        return getattr(self, self.name)


def _group_size(value: Any) -> int | str:
    if value in ("channel", -1) and not isinstance(value, bool):
        return "channel"
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"must be a positive whole number, or channel for one scale per output row, got {value!r}")
    return value


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


GroupSize = Annotated[
    int | Literal["channel"],
    PlainValidator(_group_size),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"enum": ["channel", -1]}]}),
]
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


class RtnOptions(Strict):
    """Round to nearest."""

    range: Literal["output", "mse", "minmax"] = "output"
    """How a group's range is chosen. minmax: the full range. mse: shrunk where that lowers the error of the weights,
    weighted by E[x^2] with a calibration section. output: by the error of the group's output on the calibration text,
    correlations between its inputs included; mse where there is no such text or a group has over 256 columns."""


class GptqOptions(Strict):
    """Round column by column and let the columns to come absorb the error."""

    damping: float = Field(default=0.01, ge=0, le=1)
    """Share of the Hessian's mean diagonal added to it; raised step by step, and reported, where it will not factor."""
    act_order: bool = True
    """Columns with the largest activations first; groups stay where they are."""
    refit: bool = True
    """Asymmetric calibration: first re-fit the weight to undo the error of the layers before it."""
    range: Literal["mse", "minmax"] = "mse"
    """How a group's range is chosen: shrunk where that lowers the error weighted by E[x^2], or the full range."""
    ranges: Literal["fixed", "updated"] = "fixed"
    """fixed: from the weights as they are at first. updated: as corrected when the group is reached."""
    block_size: int = Field(default=128, ge=1, le=1 << 16)
    """Columns per lazy update: changes the speed, never the result."""
    float64: bool = False
    """Factor the Hessian in float64."""
    sweeps: int = Field(default=0, ge=0, le=100)
    """Passes of coordinate descent over the codes afterwards."""


class AwqOptions(Strict):
    """Scale input channels by their activations, folded into the layer before."""

    candidates: int = Field(default=20, ge=1, le=1000)
    """Scale strengths tried per group of linears; no scaling is always one more."""


class Algorithm(Choice):
    """How the codes of a weight are chosen."""

    rtn: RtnOptions | None = None
    gptq: GptqOptions | None = None


class Transform(Choice):
    """A rewriting of the weights before they are quantized that leaves the model's output as it is."""

    awq: AwqOptions | None = None


class Weights(Strict):
    """The number format of weights, and the algorithm that chooses the codes."""

    bits: int = Field(default=4, ge=2, le=8)
    """Bits per code, 2 to 8."""
    group_size: GroupSize = 128
    """Input columns that share a scale, or `channel` (also -1) for one scale per output row."""
    symmetric: bool = True
    """true: no zero points are stored."""
    choice: Algorithm = Field(default=Algorithm(rtn=RtnOptions()), alias="algorithm")
    """rtn or gptq, or with options: {gptq: {damping: 0.02}}."""
    on_misfit: Literal["error", "channel", "skip", "smaller-group"] = "error"
    """What to do with a layer whose width the group size does not divide."""

    @property
    def algorithm(self) -> Literal["rtn", "gptq"]:
        return self.choice.name  # pyright: ignore[reportReturnType]

    @property
    def options(self) -> RtnOptions | GptqOptions:
        return self.choice.options

    @property
    def group_columns(self) -> int:
        """group_size as TensorSpec wants it: -1 for channel."""
        return -1 if self.group_size == "channel" else self.group_size


class Override(Strict):
    """Other settings for the linears a pattern matches."""

    match: Pattern
    """`re:` and a regular expression matched from the start of the full module name, an exact name, or a class name."""
    weights: Weights | None = None
    """Only the keys to change; the rest is taken from the recipe's `weights`."""
    skip: bool = False
    """Leave these linears as they are."""

    @model_validator(mode="after")
    def _does_something(self) -> "Override":
        if self.skip == (self.weights is not None):
            raise ValueError("give either weights: {keys to change} or skip: true")
        return self

    @field_serializer("weights", mode="wrap")
    def _only_changes(self, weights: Weights | None, handler: SerializerFunctionWrapHandler) -> Any:
        return None if weights is None else weights.model_dump(mode="json", by_alias=True, exclude_unset=True)


class Output(Strict):
    """How the result is written."""

    format: Literal["compressed-tensors"] = "compressed-tensors"
    """Layout of the packed tensors."""
    engine: Literal["vllm", "sglang", "transformers", "llama.cpp", "tensorrt-llm"] | None = None
    """The engine it is for: its rules are checked before any work starts."""
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
