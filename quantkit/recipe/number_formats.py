"""Number formats as a recipe writes them: of weights, of activations, of the cache, and whole schemes by name."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    PlainValidator,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    model_serializer,
    model_validator,
)

from quantkit.recipe.algorithms import Algorithm, GptqOptions, RtnOptions, Strict

BLOCK = 128  # rows and columns of an fp8 block, as in types.py


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


GroupSize = Annotated[
    int | Literal["channel", "tensor", "block"],
    PlainValidator(_group_size),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"enum": ["channel", "tensor", "block", -1]}]}),
]
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


CACHE_TYPES = ("fp8", *(f"int{bits}" for bits in range(8, 1, -1)))


class CacheSide(Strict):
    """The number format of cached keys, or of cached values, written as a type or with keys."""

    type: Literal["fp8", "int8", "int7", "int6", "int5", "int4", "int3", "int2"] = "fp8"
    """fp8 is what engines load; integers are for quantkit's own runtime."""
    per: Literal["tensor", "head", "token"] | None = None
    """What has one scale: all tokens (tensor), all of a head, or each token of a head.
    Of fp8: tensor, but token beside integers; of integers: token."""
    symmetric: bool = True
    """false: with a zero point (integers per token)."""
    group_size: int | None = Field(default=None, ge=8)
    """So many features of a token share a scale (integers per token); null: all of a head."""
    packed: bool = False
    """true: scale and zero point of a token share 16 bits (integers; with a zero point of up to 4 bits)."""
    channels: bool = False
    """true: each feature of a head has an offset and a scale from the calibration text (integers per token).
    Those of keys are for its positions: calibrate on texts as long as those the cache will hold."""
    observer: Literal["minmax", "percentile", "mse"] = "minmax"
    """How static scales are read from the calibration text."""

    @model_validator(mode="before")
    @classmethod
    def _open_short_form(cls, data: Any) -> Any:
        return {"type": data} if isinstance(data, str) else data

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        names = {"type": "string", "enum": list(CACHE_TYPES)}
        return {"title": cls.__name__, "description": cls.__doc__, "anyOf": [names, handler(core_schema)]}

    @model_validator(mode="after")
    def _possible(self) -> "CacheSide":
        if self.type == "fp8":
            if self.group_size or not self.symmetric or self.packed or self.channels:
                raise ValueError("fp8 caches have no groups, no zero points, no packed scales and no channel constants")
        elif self.per in ("tensor", "head"):
            raise ValueError("only fp8 caches have static scales per tensor or head; integers have theirs per token")
        if self.packed and not self.symmetric and self.bits > 4:
            raise ValueError(f"packed scales have room for a zero point of 4 bits, {self.type} needs {self.bits}")
        return self

    @property
    def bits(self) -> int:
        return int(self.type.removeprefix("fp").removeprefix("int"))

    @property
    def scope(self) -> Literal["tensor", "head", "token"]:
        return self.per or ("tensor" if self.type == "fp8" else "token")


class KVCache(CacheSide):
    """The number format of cached keys and values, written `fp8` or with keys."""

    keys: CacheSide | None = None
    """That of keys alone, beside `values`; null leaves them as computed."""
    values: CacheSide | None = None
    """That of values alone, beside `keys`; null leaves them as computed."""

    @model_validator(mode="after")
    def _two_sides(self) -> "KVCache":
        given = self.model_fields_set & {"keys", "values"}
        if not given:
            return self
        if missing := {"keys", "values"} - given:
            raise ValueError(f"keys and values are given together; {missing.pop()} is missing (null: as computed)")
        if more := self.model_fields_set - given:
            raise ValueError(f"{sorted(more)[0]} is for keys and values alike; with both given, write it inside them")
        if self.keys is None and self.values is None:
            raise ValueError("neither keys nor values are quantized: write kv_cache: null")
        keys, values = self.sides
        static = [side is not None and side.scope != "token" for side in (keys, values)]
        if any(static) and not (all(static) and keys.scope == values.scope):  # type: ignore[union-attr]
            raise ValueError(
                "fp8 with calibrated scales per tensor or head is for keys and values alike, which is all that "
                "checkpoints can say; leave out `per`, or write per: token"
            )
        return self

    @property
    def sides(self) -> tuple[CacheSide | None, CacheSide | None]:
        """Of keys and of values. fp8 beside another type has scales per token, which need no place in a checkpoint."""
        if not self.model_fields_set & {"keys", "values"}:
            return self, self
        alike = self.keys is not None and self.values is not None and self.keys.type == self.values.type
        keys, values = (
            side if alike or side is None or side.per is not None else side.model_copy(update={"per": "token"})
            for side in (self.keys, self.values)
        )
        return keys, values

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data = handler(self)
        if self.model_fields_set & {"keys", "values"}:
            return {"keys": data["keys"], "values": data["values"]}
        later = {"keys", "values", *(name for name in ("packed", "channels") if not data.get(name))}
        return {name: value for name, value in data.items() if name not in later}


def cache_needs(data: Any) -> str | None:
    """What of a recipe's `kv_cache` needs calibration text, None where nothing does; tolerant of wrong data."""
    if isinstance(data, Mapping) and ("keys" in data or "values" in data):
        given = [data.get("keys"), data.get("values")]
    else:
        given = [data, data]
    sides = [{"type": side} if isinstance(side, str) else side for side in given]
    held = [side for side in sides if isinstance(side, Mapping)]
    if any(side.get("channels") is True for side in held):
        return "the channel constants of a cache need"
    fp8 = [side.get("type", "fp8") == "fp8" and side.get("per") != "token" for side in held]
    return "an fp8 cache has static scales and needs" if len(fp8) == 2 and all(fp8) else None


# The field's names for whole schemes, as the keys they stand for.
PRESETS: dict[str, dict[str, Any]] = {
    "W4A16": {"weights": {"type": "int"}},
    "W4A16_ASYM": {"weights": {"type": "int", "symmetric": False}},
    "W8A16": {"weights": {"type": "int", "bits": 8, "group_size": "channel"}},
    "W8A8": {"weights": {"type": "int", "bits": 8, "group_size": "channel"}, "activations": {"type": "int8"}},
    "W4A8": {"weights": {"type": "int"}, "activations": {"type": "int8"}},
    "FP8": {"weights": {"type": "fp8", "group_size": "tensor"}, "activations": {"type": "fp8", "dynamic": False}},
    "FP8_DYNAMIC": {"weights": {"type": "fp8"}, "activations": {"type": "fp8", "dynamic": True}},
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


REMEDY = "remove one of the two"


def contradictions(data: Mapping[str, Any]) -> list[tuple[tuple[str, ...], str]]:
    """(key path, message) for each key that says otherwise than the `scheme` beside it.

    A scheme's name fixes the types, the bits and what PRESETS spells out; group sizes of integers, zero points and
    observers may be chosen beside it. `activations: null` is a choice too, except beside a name that says A8.
    """
    scheme = data.get("scheme")
    if not isinstance(scheme, str) or scheme not in PRESETS:
        return []
    preset, found = PRESETS[scheme], list[tuple[tuple[str, ...], str]]()
    kind = preset["weights"]["type"]
    weights = {"bits": NATURAL[kind]["bits"]} | preset["weights"]
    if kind == "int":
        weights.pop("group_size", None)
    for section, fixed in (("weights", weights), ("activations", preset.get("activations") or {})):
        given = data.get(section)
        for key, value in (given if isinstance(given, Mapping) else {}).items():
            if key in fixed and value != fixed[key]:
                found.append(((section, key), _contradicts(value, scheme, f"{key}: {_yaml(fixed[key])}")))
    inputs = data.get("activations")
    if isinstance(inputs, Mapping) and not preset.get("activations"):
        meant = f"quantized inputs contradict `scheme: {scheme}`, which means inputs in 16 bits; {REMEDY}"
        found.append((("activations",), meant))
    elif "activations" in data and inputs is None and scheme.endswith("A8"):
        kept = preset["activations"]["type"]
        found.append((("activations",), _contradicts(None, scheme, f"activations: {kept}")))
    return found


def _contradicts(value: Any, scheme: str, meant: str) -> str:
    return f"{_yaml(value)} contradicts `scheme: {scheme}`, which means {meant}; {REMEDY}"


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
