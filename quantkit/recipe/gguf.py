"""The `gguf` section of a recipe: which type each tensor of a GGUF file gets."""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
    model_serializer,
    model_validator,
)

from quantkit.ggml_types import FILE_TYPES, QUANTIZED, SHORT_MIXES
from quantkit.recipe.algorithms import Strict
from quantkit.sizes import bytes_in
from quantkit.suggestions import nearest

FLOATS = ("F32", "F16", "BF16")
MIXES = tuple(name for name in FILE_TYPES if name not in (*FLOATS, "MXFP4_MOE", "NVFP4"))
TYPES = (*QUANTIZED, *FLOATS)
ELSEWHERE = re.compile(r"IQ[1-3]_\w+|TQ\d_\d|IQ\d_\w+|Q\d_\w+|MXFP4\w*|NVFP4|\w+_R[48]")


def _name(value: Any, known: tuple[str, ...], what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be the name of a {what}")
    wanted = value.upper().replace("-", "_")
    if what == "mix":
        wanted = SHORT_MIXES.get(wanted, wanted)
    if wanted in known:
        return wanted
    near = nearest(wanted, known)
    if ELSEWHERE.fullmatch(wanted) and (near is None or wanted[:3] != near[:3]):
        raise ValueError(f"{value} is a {what} of GGUF's that quantkit does not write; possible: "
                                  f"{', '.join(known)}")  # fmt: skip
    hint = f"did you mean {near}?" if near else f"possible: {', '.join(known)}"
    raise ValueError(f"no {what} of GGUF's is named {value!r}; {hint}")


def _type(value: Any) -> str | None:
    return None if value is None else _name(value, TYPES, "type")


def _bytes(value: Any) -> int:
    """A number of bytes as it is written: 3600000, 3.6MB, 4 GiB."""
    found = None if isinstance(value, bool) else bytes_in(str(value))
    if found is None:
        raise ValueError("must be a size like 3.6MB or 4GiB")
    return found


def _mix(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    if isinstance(value, str):
        return _name(value, MIXES, "mix")
    if isinstance(value, Mapping):
        return Measured.model_validate(value)
    if isinstance(value, Measured):
        return value
    raise ValueError("must be the name of a mix, {bits_per_weight: NUMBER} or {size: 3.6MB}")


def _types(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    for pattern in value:
        try:
            re.compile(str(pattern))
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    return {str(pattern): _type(name) for pattern, name in value.items()}


TypeName = Annotated[str, BeforeValidator(_type)]
_SIZE_SCHEMA = {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string"}]}
Size = Annotated[int, BeforeValidator(_bytes), WithJsonSchema(_SIZE_SCHEMA)]


class Measured(Strict):
    """Each tensor's type by the harm it does to the model's output, for a given size."""

    bits_per_weight: float | None = Field(default=None, ge=2, le=16)
    """Of all tensors of the file together."""
    size: Size | None = None
    """Of the file, keys and vocabulary included, in bytes; text like 3.6MB or 4GiB is read too."""

    @model_validator(mode="after")
    def _one(self) -> "Measured":
        if (self.bits_per_weight is None) == (self.size is None):
            raise ValueError("give either bits_per_weight or size")
        return self

    @model_serializer
    def _given(self) -> dict[str, Any]:
        return {"size": self.size} if self.bits_per_weight is None else {"bits_per_weight": self.bits_per_weight}


class Gguf(Strict):
    """How a GGUF file is made; the name of a mix alone stands for {mix: NAME}."""

    mix: Annotated[str | Measured, WrapValidator(_mix)] = "Q4_K_M"
    """Types by the rules of llama.cpp's quantizer: Q2_K, Q3_K_S, Q3_K_M, Q3_K_L, Q4_K_S, Q4_K_M, Q5_K_S, Q5_K_M, Q6_K,
    IQ4_NL, IQ4_XS, Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0. Or by measured harm: {bits_per_weight: 4.5} or {size: 3.6MB}."""
    pure: bool = False
    """true: every matrix gets the mix's own type."""
    tensor_types: Annotated[dict[str, str], BeforeValidator(_types)] = {}  # noqa: RUF012 (pydantic copies it)
    """Regular expression, searched in GGUF's tensor names -> type; the first that matches counts."""
    token_embedding: TypeName | None = None
    """Type of the embedding table; null: by the mix."""
    output: TypeName | None = None
    """Type of the head; null: by the mix."""
    pre: str | None = Field(default=None, min_length=1)
    """llama.cpp's name of the pre-tokenizer; null: found by what the tokenizer does."""
    imatrix: str | None = Field(default=None, min_length=1)
    """An importance matrix, of `quantkit imatrix` or llama-imatrix: what is rounded to nearest (algorithm rtn, the
    embedding, the head, experts that no calibration token reached) is weighed with it, not with the calibration text.
    GPTQ needs more than it holds, and reads the calibration text. null: all from the calibration text, if any."""

    @model_validator(mode="before")
    @classmethod
    def _open(cls, data: Any) -> Any:
        return {"mix": data} if isinstance(data, str) else data

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        return {"title": cls.__name__, "description": cls.__doc__, "anyOf": [{"type": "string"}, handler(core_schema)]}


# What a recipe may not say beside `gguf`, with the values that say nothing.
NEUTRAL: dict[tuple[str, ...], tuple[Any, ...]] = {
    ("scheme",): (None,),
    ("activations",): (None,),
    ("kv_cache",): (None,),
    ("weights", "type"): ("int",),
    ("weights", "bits"): (4,),
    ("weights", "group_size"): (128,),
    ("weights", "symmetric"): (True,),
    ("weights", "on_misfit"): ("error",),
    ("output", "format"): ("gguf",),
    ("output", "engine"): (None, "llama.cpp"),
    ("output", "tp"): (1,),
}


def gguf_conflicts(data: Mapping[str, Any]) -> list[tuple[tuple[str, ...], str]]:
    """(key path, message) for each key that a GGUF has no place for; and for the format without its section."""
    output = data.get("output")
    wants = isinstance(output, Mapping) and output.get("format") == "gguf"
    if data.get("gguf") is None:
        need = "output.format gguf needs `gguf: q4_k_m` (or another mix, or a mapping of keys)"
        return [(("output", "format"), need)] if wants else []
    found = list(_transforms(data))
    for path, neutral in NEUTRAL.items():
        holder = data if len(path) == 1 else data.get(path[0])
        if isinstance(holder, Mapping) and path[-1] in holder and holder[path[-1]] not in neutral:
            says = {"scheme": "the types of `gguf` are the scheme", "activations": "llama.cpp rounds inputs itself",
                    "kv_cache": "llama.cpp's cache is chosen when it starts"}.get(path[0])  # fmt: skip
            says = says or {"output": "the file is a GGUF, for llama.cpp"}.get(path[0], "GGUF's types say that")
            found.append((path, f"{'.'.join(path)} has no place beside `gguf`: {says}; remove it"))
    return found


def _transforms(data: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """What of the section cannot go with transforms, which change what linears read."""
    transforms, section = data.get("transforms"), data["gguf"]
    listed = transforms if isinstance(transforms, list) else []
    names = [next(iter(one)) if isinstance(one, Mapping) and one else one for one in listed]
    if not names or not isinstance(section, Mapping):
        return
    if section.get("imatrix") is not None:
        yield (
            ("gguf", "imatrix"),
            (
                f"an importance matrix is of the original model's inputs, which {names[0]} changes; "
                "remove gguf.imatrix or the transforms"
            ),
        )
    if "rotation" in names and isinstance(section.get("mix"), Mapping):
        yield (
            ("gguf", "mix"),
            (
                "types by measured harm cannot go with a rotation: harms are measured on the model as it is stored; "
                "name a mix, or remove the rotation"
            ),
        )
