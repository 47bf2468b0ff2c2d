"""How many bytes a measured mix of GGUF's types may take, and whether that is enough. No torch."""

import math
from collections.abc import Mapping

from quantkit.errors import UserError
from quantkit.formats.gguf.mixes import bytes_of, given_types
from quantkit.ggml_types import GGML_TYPES, QUANTIZED
from quantkit.recipe.gguf import Gguf, Measured

FREE = (*QUANTIZED, "F16")  # the types a tensor may get

Shapes = Mapping[str, tuple[int, ...]]  # rows first, by GGUF name
Types = Mapping[str, str]


def byte_budget(shapes: Shapes, bits_per_weight: float | None, size: int | None) -> int:
    """Bytes that all tensors together may have: of the average over all weights, or as given."""
    if size is not None:
        return size
    assert bits_per_weight is not None
    return int(bits_per_weight * sum(math.prod(shape) for shape in shapes.values()) / 8)


def possible_types(shape: tuple[int, ...]) -> list[str]:
    """The types whose blocks divide a tensor's rows."""
    return [type_ for type_ in FREE if shape[-1] % GGML_TYPES[type_].columns == 0]


def check_budget(shapes: Shapes, fixed: Types, budget: int) -> None:
    """UserError where the free tensors' smallest types and the fixed ones are larger than `budget` bytes together."""
    least = sum(
        min(bytes_of(type_, shape) for type_ in ([fixed[name]] if name in fixed else possible_types(shape)))
        for name, shape in shapes.items()
    )
    if least > budget:
        weights = sum(math.prod(shape) for shape in shapes.values())
        raise UserError(
            f"gguf.mix: {budget:,} bytes ({8 * budget / weights:.3g} bits per weight) are too few for this model: the "
            f"smallest types that fit its rows need {least:,}\n"
            f"hint: ask for at least {math.ceil(800 * least / weights) / 100:g} bits per weight"
        )


def check_section(section: Gguf, shapes: Shapes, dense: Types) -> dict[str, str]:
    """The types of the tensors that a measured mix does not choose; UserError where its size is too small for them all.

    dense: types of tensors that stay as they are stored
    """
    assert isinstance(section.mix, Measured)
    fixed = given_types(shapes, section.tensor_types, section.token_embedding, section.output) | dict(dense)
    check_budget(shapes, fixed, byte_budget(shapes, section.mix.bits_per_weight, section.mix.size))
    return fixed
