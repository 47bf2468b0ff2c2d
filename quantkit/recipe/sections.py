"""Sections of a recipe, strict at every level; each field's text documents it here and in the JSON Schema."""

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError, PydanticKnownError

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


LONGEST = 1 << 20  # samples, and tokens of one


def _whole_or_auto(least: int) -> Callable[[Any], Any]:
    """A check with one message where a union would have one for each of its members."""

    def check(value: Any) -> Any:
        if value == "auto":
            return value
        if isinstance(value, bool) or not isinstance(value, int):
            raise PydanticCustomError("whole_or_auto", "must be a whole number or auto")
        if value < least:
            raise PydanticKnownError("greater_than_equal", {"ge": least})
        if value > LONGEST:
            raise PydanticKnownError("less_than_equal", {"le": LONGEST})
        return value

    return check


def _flag_or_auto(value: Any) -> Any:
    if value == "auto" or isinstance(value, bool):
        return value
    raise PydanticCustomError("flag_or_auto", "must be auto, true or false")


class Source(Strict):
    """One of several data sets that are mixed; its name alone stands for {data: NAME}."""

    data: str = Field(min_length=1)
    """What `calibration.data` takes as text."""
    weight: float = Field(default=1.0, gt=0)
    """Its share of the tokens, relative to the other weights."""
    column: str | None = Field(default=None, min_length=1)
    """As in `calibration.column`, for this source."""

    @model_validator(mode="before")
    @classmethod
    def _open(cls, data: Any) -> Any:
        return {"data": data} if isinstance(data, str) else data

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        return {"title": cls.__name__, "description": cls.__doc__, "anyOf": [{"type": "string"}, handler(core_schema)]}


def _one_or_several(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    if isinstance(value, list):
        if not value:
            raise PydanticCustomError("no_sources", "must name at least one source")
        return SOURCES.validate_python(value)
    if isinstance(value, Mapping):
        raise PydanticCustomError("one_source", "must be text or a list of sources like [{data: NAME, weight: 2}]")
    if not isinstance(value, str):
        raise PydanticCustomError("source", "must be text or a list of sources")
    if not value:
        raise PydanticKnownError("string_too_short", {"min_length": 1})
    return handler(value)


SOURCES = TypeAdapter(list[Source])
Data = Annotated[
    Annotated[str, Field(min_length=1)] | Annotated[list[Source], Field(min_length=1)],
    WrapValidator(_one_or_several),
]


class Calibration(Strict):
    """The text whose activations the algorithms look at."""

    data: Data = "general"
    """`general`, the set that quantkit brings along; `ultrachat`, `wikitext`, `c4`, `pile-10k`, `fineweb-edu` or
    `cnn_dailymail`, read from the Hub; any Hub data set; each as NAME, NAME:SUBSET, NAME:SUBSET:SPLIT or NAME::SPLIT.
    Or a file: plain text (one stream), .jsonl, .json, .csv, .tsv, .parquet, or a folder saved by `datasets`; write
    ./NAME for a file that is called like a data set. Or a list of these, mixed: [{data: NAME, weight: 2}, FILE]."""
    samples: Annotated[
        Annotated[int, Field(ge=1, le=LONGEST)] | Literal["auto"], BeforeValidator(_whole_or_auto(1))
    ] = "auto"
    """How many sequences. auto: 32 tokens per input feature of the widest calibrated linear, at least 32768 and at most
    1048576 in all, or as many as the data has."""
    seq_len: Annotated[
        Annotated[int, Field(ge=8, le=LONGEST)] | Literal["auto"], BeforeValidator(_whole_or_auto(8))
    ] = "auto"
    """Tokens in each. auto: 2048, or the model's context where that is shorter."""
    seed: int | None = Field(default=0, ge=0)
    """Which of the sequences are taken where there are more than needed; null takes the first ones."""
    packing: Literal["concat", "document"] = "concat"
    """concat: documents follow each other and are cut into windows. document: the beginning of one document each,
    shorter documents are skipped."""
    bos: Annotated[bool | Literal["auto"], BeforeValidator(_flag_or_auto)] = "auto"
    """Whether each sequence starts with the tokenizer's BOS token. auto: where the tokenizer puts it before a text."""
    column: str | None = Field(default=None, min_length=1)
    """The column or key of a row to read. null: `text`, `messages`, `conversations`, `prompt` and `completion`, or
    `instruction` (with `input`) and `output`."""

    def sources(self) -> list[Source]:
        """The sources, at least one; `column` holds for those that name none themselves."""
        given = [Source(data=self.data)] if isinstance(self.data, str) else self.data
        return [source.model_copy(update={"column": source.column or self.column}) for source in given]


class Experts(Strict):
    """How the experts of a layer, each of which sees its own tokens, are calibrated."""

    calibrate: Literal["routed", "all"] = "routed"
    """routed: on the tokens that the router sends to each. all: on every token; what the layer computes stays as
    it is."""
    share_below: int = Field(default=8, ge=0)
    """An expert that fewer tokens reach gets the statistics of all experts of its layer; 0: never."""


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

    format: Literal["compressed-tensors", "awq", "gptq", "gptq_v2", "fp8", "fp8_tensor", "modelopt", "gguf"] = (
        "compressed-tensors"
    )
    """Layout of the packed tensors; gguf goes with the section of that name."""
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
