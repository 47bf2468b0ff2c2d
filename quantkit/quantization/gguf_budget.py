"""How many bytes a measured mix of GGUF's types may take, and whether that is enough. No torch."""

import math
from collections.abc import Mapping

from quantkit.checkpoint.gguf_header import ALIGNMENT, align
from quantkit.errors import UserError
from quantkit.formats.gguf.mixes import bytes_of, given_types
from quantkit.ggml_types import GGML_TYPES, QUANTIZED
from quantkit.recipe.gguf import Gguf, Measured

FREE = (*QUANTIZED, "F16")  # the types a tensor may get

Shapes = Mapping[str, tuple[int, ...]]  # rows first, by GGUF name
Types = Mapping[str, str]


def padded_bytes(type_: str, shape: tuple[int, ...]) -> int:
    """Bytes of a file that a tensor takes up."""
    return align(bytes_of(type_, shape), ALIGNMENT)


def possible_types(shape: tuple[int, ...]) -> list[str]:
    """The types whose blocks divide a tensor's rows."""
    return [type_ for type_ in FREE if shape[-1] % GGML_TYPES[type_].columns == 0]


def measured_budget(section: Gguf, shapes: Shapes, dense: Types, headers: int = 0) -> tuple[dict[str, str], int]:
    """The types of the tensors that a measured mix does not choose, and the bytes that all tensors may have together.

    dense: types of tensors that stay as they are stored; headers: bytes of the file beside its tensors. UserError where
    the free tensors' smallest types and the others are larger.
    """
    assert isinstance(section.mix, Measured)
    fixed = given_types(shapes, section.tensor_types, section.token_embedding, section.output) | dict(dense)
    weights, size = sum(math.prod(shape) for shape in shapes.values()), section.mix.size
    budget = int((section.mix.bits_per_weight or 0) * weights / 8) if size is None else size - headers
    least = sum(
        min(padded_bytes(type_, shape) for type_ in ([fixed[name]] if name in fixed else possible_types(shape)))
        for name, shape in shapes.items()
    )
    if least > budget:
        found = max(0, budget)
        beside = f" beside {headers:,} of keys and vocabulary" if size is not None and headers else ""
        raise UserError(
            f"gguf.mix: {found:,} bytes for tensors{beside} ({8 * found / weights:.3g} bits per weight) are too few "
            f"for this model: the smallest types that fit its rows need {least:,}\n"
            f"hint: ask for at least {math.ceil(800 * least / weights) / 100:g} bits per weight"
            + ("" if size is None else f", a size of {least + headers:,}")
        )
    return fixed, budget
