"""The algorithms and transforms a recipe can name, each with its options; the base of all its strict sections."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializationInfo, model_serializer, model_validator


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


class RtnOptions(Strict):
    """Round to nearest."""

    range: Literal["output", "mse", "minmax"] = "output"
    """How a group's range is chosen. minmax: the full range. mse: shrunk where that lowers the error of the weights,
    weighted by E[x^2] with a calibration section. output: by the error of the group's output on the calibration text,
    correlations between its inputs included; mse where there is no such text or a group has over 256 columns."""


class GptqOptions(Strict):
    """Round column by column and let the columns to come absorb the error."""

    damping: float = Field(default=0.01, ge=0, le=1)
    """Share of the Hessian's mean diagonal added to it; raised step by step, and reported, where it will not factor.
    Damping for the number of calibration tokens comes on top: 4 x input features / tokens of each diagonal element."""
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
