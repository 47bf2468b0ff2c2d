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
    model_serializer,
    model_validator,
)

BLOCK = 128  # rows and columns of an fp8 block, as in types.py


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
    if isinstance(value, str) and value in ("tensor", "block"):
        return value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"must be a positive whole number, channel (one scale per output row), tensor or block, got {value!r}"
        )
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
    int | Literal["channel", "tensor", "block"],
    PlainValidator(_group_size),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"enum": ["channel", "tensor", "block", -1]}]}),
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


class SmoothquantOptions(Strict):
    """Move outliers of the activations into the weights, folded into the layer before (arXiv:2211.10438)."""

    alpha: float | Literal["search"] = Field(default="search", union_mode="left_to_right")
    """How much of the outliers moves, 0 to 1; search: for each fold what changes the block's output least."""

    @model_validator(mode="after")
    def _between(self) -> "SmoothquantOptions":
        if not isinstance(self.alpha, str) and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be between 0 and 1, or search, got {self.alpha}")
        return self


class RotationOptions(Strict):
    """Turn the residual stream and the values by Hadamard matrices, folded into the weights (arXiv:2404.00456)."""

    seed: int = Field(default=0, ge=0)
    """Of the random signs."""


class Algorithm(Choice):
    """How the codes of a weight are chosen."""

    rtn: RtnOptions | None = None
    gptq: GptqOptions | None = None


class Transform(Choice):
    """A rewriting of the weights before they are quantized that leaves the model's output as it is."""

    awq: AwqOptions | None = None
    smoothquant: SmoothquantOptions | None = None
    rotation: RotationOptions | None = None


# What the keys of a type mean where they are not given, and may only be where they are not a choice.
NATURAL: dict[str, dict[str, Any]] = {
    "int": {"bits": 4, "group_size": 128, "symmetric": True},
    "fp8": {"bits": 8, "group_size": "channel", "symmetric": True},
    "nvfp4": {"bits": 4, "group_size": 16, "symmetric": True},
    "mxfp4": {"bits": 4, "group_size": 32, "symmetric": True},
    "mxfp8": {"bits": 8, "group_size": 32, "symmetric": True},
}


class Weights(Strict):
    """The number format of weights, and the algorithm that chooses the codes."""

    type: Literal["int", "fp8", "nvfp4", "mxfp4", "mxfp8"] = "int"
    """int: integers of `bits`. fp8: e4m3. nvfp4, mxfp4, mxfp8: small floats in groups of 16 or 32."""
    bits: int = Field(default=4, ge=2, le=8)
    """Bits per code, 2 to 8, of integers; the other types say theirs by themselves."""
    group_size: GroupSize = 128
    """Input columns that share a scale; or `channel` (also -1) for one scale per output row, `tensor` for one in all
    (fp8, and int with 8 bits), `block` for one per 128 x 128 block (fp8)."""
    symmetric: bool = True
    """true: no zero points are stored."""
    choice: Algorithm = Field(default=Algorithm(rtn=RtnOptions()), alias="algorithm")
    """rtn or gptq, or with options: {gptq: {damping: 0.02}}."""
    on_misfit: Literal["error", "channel", "skip", "smaller-group"] = "error"
    """What to do with a layer whose width the group size does not divide."""

    @model_validator(mode="before")
    @classmethod
    def _type_says(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and isinstance(data.get("type"), str):
            return NATURAL.get(data["type"], {}) | dict(data)
        return data

    @model_validator(mode="after")
    def _possible(self) -> "Weights":
        if self.type != "int":
            for key, value in NATURAL[self.type].items():
                if getattr(self, key) != value and not (self.type == "fp8" and key == "group_size"):
                    raise ValueError(f"{self.type} has {key} {value} and no other, got {getattr(self, key)}")
        sizes = {"int": ("channel", "tensor"), "fp8": ("channel", "tensor", "block")}.get(self.type, ())
        if (isinstance(self.group_size, str) and self.group_size not in sizes) or (
            self.type == "fp8" and isinstance(self.group_size, int)
        ):
            possible = " or ".join(sizes) or "only its own"
            raise ValueError(f"{self.type} weights cannot have group_size {self.group_size}; possible: {possible}")
        if self.type == "int" and self.group_size == "tensor" and not (self.bits == 8 and self.symmetric):
            raise ValueError("group_size tensor is for fp8 and for symmetric integers of 8 bits")
        return self

    @property
    def algorithm(self) -> Literal["rtn", "gptq"]:
        return self.choice.name  # pyright: ignore[reportReturnType]

    @property
    def options(self) -> RtnOptions | GptqOptions:
        return self.choice.options

    @property
    def group_columns(self) -> int:
        """group_size as TensorSpec wants it: -1 for a whole row."""
        if isinstance(self.group_size, str):
            return BLOCK if self.group_size == "block" else -1
        return self.group_size

    @property
    def group_rows(self) -> int:
        """Rows that share a scale, as TensorSpec wants it."""
        return {"tensor": -1, "block": BLOCK}.get(str(self.group_size), 1)


class Activations(Strict):
    """The number format a linear's input is rounded to while the model runs; null leaves inputs as they are."""

    type: Literal["int8", "fp8", "nvfp4", "mxfp4", "mxfp8"]
    """Of the elements; nvfp4, mxfp4 and mxfp8 go with weights of the same type."""
    dynamic: bool = True
    """true: every token's range is taken as it comes. false: one range for all, from calibration (int8, fp8)."""
    symmetric: bool = True
    """false: with a zero point (int8)."""
    group_size: int | Literal["token"] = Field(default="token", union_mode="left_to_right")
    """token: one range for a token. 128: for so many of its features (dynamic fp8 beside block weights)."""
    observer: Literal["minmax", "percentile", "entropy", "mse"] = "minmax"
    """How a static range is read from the calibration inputs."""
    percentile: float = Field(default=99.99, gt=50, le=100)
    """Of magnitudes, for observer percentile."""

    @model_validator(mode="after")
    def _possible(self) -> "Activations":
        if not self.symmetric and self.type != "int8":
            raise ValueError(f"{self.type} activations have no zero point: leave out symmetric")
        if not self.dynamic and self.type not in ("int8", "fp8"):
            raise ValueError(f"{self.type} activations are dynamic; static ones are int8 or fp8")
        if self.group_size != "token" and not (self.type == "fp8" and self.dynamic and self.group_size == BLOCK):
            raise ValueError(f"group_size {self.group_size} is not possible; token, or {BLOCK} for dynamic fp8")
        return self

    @property
    def calibrated(self) -> bool:
        return not self.dynamic or self.type == "nvfp4"


class KVCache(Strict):
    """The number format of cached keys and values, written `fp8` or with keys."""

    type: Literal["fp8", "int8", "int4"] = "fp8"
    """fp8 is what engines load; int8 and int4 are for quantkit's own runtime."""
    per: Literal["tensor", "head", "token"] | None = None
    """What has one scale: all tokens (tensor), all of a head, or each token of a head. fp8: tensor; integers: token."""
    symmetric: bool = True
    """false: with a zero point (integers per token)."""
    group_size: int | None = Field(default=None, ge=8)
    """So many features of a token share a scale (integers per token); null: all of a head."""
    observer: Literal["minmax", "percentile", "mse"] = "minmax"
    """How static scales are read from the calibration text."""

    @model_validator(mode="before")
    @classmethod
    def _open_short_form(cls, data: Any) -> Any:
        return {"type": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _possible(self) -> "KVCache":
        if (self.type == "fp8") == (self.scope == "token"):
            raise ValueError("fp8 caches have static scales per tensor or head, int8 and int4 ones per token")
        if self.type == "fp8" and (self.group_size or not self.symmetric):
            raise ValueError("fp8 caches have no groups and no zero points")
        return self

    @property
    def scope(self) -> Literal["tensor", "head", "token"]:
        return self.per or ("tensor" if self.type == "fp8" else "token")


# The field's names for whole schemes, as the keys they stand for.
PRESETS: dict[str, dict[str, Any]] = {
    "W4A16": {"weights": {"type": "int"}},
    "W4A16_ASYM": {"weights": {"type": "int", "symmetric": False}},
    "W8A16": {"weights": {"type": "int", "bits": 8, "group_size": "channel"}},
    "W8A8": {"weights": {"type": "int", "bits": 8, "group_size": "channel"}, "activations": {"type": "int8"}},
    "W4A8": {"weights": {"type": "int"}, "activations": {"type": "int8"}},
    "FP8": {"weights": {"type": "fp8", "group_size": "tensor"}, "activations": {"type": "fp8", "dynamic": False}},
    "FP8_DYNAMIC": {"weights": {"type": "fp8"}, "activations": {"type": "fp8"}},
    "FP8_BLOCK": {
        "weights": {"type": "fp8", "group_size": "block"},
        "activations": {"type": "fp8", "group_size": BLOCK},
    },
    "NVFP4": {"weights": {"type": "nvfp4"}, "activations": {"type": "nvfp4"}},
    "NVFP4A16": {"weights": {"type": "nvfp4"}},
    "MXFP4": {"weights": {"type": "mxfp4"}, "activations": {"type": "mxfp4"}},
    "MXFP8": {"weights": {"type": "mxfp8"}, "activations": {"type": "mxfp8"}},
}
SchemeName = Literal[
    "W4A16",
    "W4A16_ASYM",
    "W8A16",
    "W8A8",
    "W4A8",
    "FP8",
    "FP8_DYNAMIC",
    "FP8_BLOCK",
    "NVFP4",
    "NVFP4A16",
    "MXFP4",
    "MXFP8",
]


def open_scheme(data: Any) -> Any:
    """A mapping with the keys that its `scheme` stands for; keys given beside it count more."""
    if not isinstance(data, Mapping) or not isinstance(data.get("scheme"), str) or data["scheme"] not in PRESETS:
        return data
    opened = {"activations": None} | PRESETS[data["scheme"]] | dict(data)
    for key in ("weights", "activations"):
        given, preset = data.get(key), PRESETS[data["scheme"]].get(key)
        if isinstance(given, Mapping) and preset is not None:
            opened[key] = preset | dict(given)
    return opened


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
