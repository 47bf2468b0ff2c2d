"""What a GGUF file will hold: its tensors with their names, shapes and types, and its metadata, before any work.

Shapes are in numpy's order (rows first), as in the checkpoint.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint.gguf_writer import GgufLayout, KeyValue
from quantkit.checkpoint.header import TensorInfo, TensorLayout
from quantkit.errors import UserError
from quantkit.formats.gguf.metadata import model_metadata
from quantkit.formats.gguf.mixes import tensor_types
from quantkit.formats.gguf.tensor_names import Place, architecture, extra_tensors, places
from quantkit.formats.gguf.tokenizer import tokenizer_metadata
from quantkit.ggml_types import FILE_TYPES, GGML_TYPES, QUANTIZED
from quantkit.recipe.gguf import Gguf

if TYPE_CHECKING:
    import numpy as np

Tensors = Mapping[str, TensorInfo | TensorLayout]
STORED = {"F32": "F32", "F16": "F16", "BF16": "BF16"}  # a checkpoint's dtype -> the type that holds it exactly


@dataclass(frozen=True, slots=True)
class GgufPlan:
    """The content of a GGUF file.

    places    checkpoint tensor -> where its rows go; what is not in it is not written (a tied head)
    shapes    GGUF tensor -> shape, in the file's order; types: -> name of its type
    metadata  keys of the model; those of the tokenizer and of the run are added when it is written
    extra     tensors that no checkpoint tensor stands for, float32
    """

    architecture: str
    places: dict[str, Place]
    shapes: dict[str, tuple[int, ...]]
    types: dict[str, str]
    metadata: dict[str, KeyValue]
    extra: "dict[str, np.ndarray]"

    def type_of(self, name: str) -> str:
        """The type of the GGUF tensor that a checkpoint tensor goes to."""
        return self.types[self.places[name].tensor]

    def layouts(self) -> list[GgufLayout]:
        """All tensors of the file, in order."""
        return [GgufLayout(name, self.types[name], shape) for name, shape in self.shapes.items()]

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(_bytes(self.types[name], shape) for name, shape in self.shapes.items())

    def by_type(self) -> dict[str, tuple[int, int]]:
        """Type -> (tensors, bytes), the largest first."""
        found: dict[str, tuple[int, int]] = {}
        for name, shape in self.shapes.items():
            count, size = found.get(self.types[name], (0, 0))
            found[self.types[name]] = count + 1, size + _bytes(self.types[name], shape)
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))

    @property
    def bits_per_weight(self) -> float:
        """Of all tensors together."""
        return 8 * self.data_bytes / sum(_count(shape) for shape in self.shapes.values())

    def with_types(self, types: Mapping[str, str]) -> "GgufPlan":
        """Other types for some GGUF tensors."""
        return replace(self, types=self.types | dict(types))

    def with_dense(self, names: Iterable[str], tensors: Tensors) -> "GgufPlan":
        """These checkpoint tensors as they are stored; UserError where only some experts of one tensor are."""
        dense = {name for name in names if name in self.places and self.type_of(name) in QUANTIZED}
        changed: dict[str, str] = {}
        for name in dense:
            place = self.places[name]
            whole = {other for other, at in self.places.items() if at.tensor == place.tensor}
            if not whole <= dense:
                raise UserError(
                    f"{name} is to stay as it is, but {min(whole - dense)} is not: GGUF keeps all experts of a layer "
                    f"in one tensor, {place.tensor}, of one type\nhint: leave out all experts or none"
                )
            changed[place.tensor] = STORED.get(tensors[name].tag, "F32")
        return self.with_types(changed)


def gguf_plan(section: Gguf, config: Mapping[str, Any], tensors: Tensors, *, importance: bool, name: str) -> GgufPlan:
    """The plan of a model by its config.json and the tensors it is stored as; measured mixes start from Q4_K_M.

    importance: whether what is rounded knows its inputs (llama.cpp's mixes ask for that); name: of the model.
    UserError for architectures, tensors, patterns and types that GGUF or quantkit has no place for.
    """
    kind = architecture(config)
    where = places(config, {name: tuple(info.shape) for name, info in tensors.items()})
    shapes = _shapes(where, tensors)
    if "token_embd.weight" not in shapes:
        raise UserError("the checkpoint has no embedding table, which a GGUF needs")
    metadata = model_metadata(config, name=name, vocab_size=shapes["token_embd.weight"][0])
    extra = extra_tensors(config)
    shapes |= {key: tuple(value.shape) for key, value in extra.items()}
    types = tensor_types(
        section.mix if isinstance(section.mix, str) else "Q4_K_M",
        shapes,
        architecture=kind,
        metadata=metadata,
        imatrix=importance,
        pure=section.pure,
        overrides=section.tensor_types,
        token_embedding=section.token_embedding,
        output=section.output,
    )
    return GgufPlan(kind, where, shapes, types, metadata, extra)


def file_metadata(
    plan: GgufPlan, section: Gguf, folder: Path, recipe: Mapping[str, Any], calibration: Mapping[str, Any] | None
) -> dict[str, KeyValue]:
    """All keys of the file: the model's, the tokenizer's in `folder`, and how the file was made.

    recipe: without places; calibration: what the report says of it.
    """
    mix = section.mix if isinstance(section.mix, str) else _most(plan)
    made: dict[str, KeyValue] = {
        "general.quantization_version": ("u32", 2),
        "general.file_type": ("u32", FILE_TYPES.get(mix, FILE_TYPES["Q4_K_M"])),
        "quantkit.recipe": ("string", json.dumps(recipe, sort_keys=True)),
    }
    if calibration is not None:
        made["quantkit.calibration"] = ("string", json.dumps(calibration, sort_keys=True))
    vocabulary = plan.shapes["token_embd.weight"][0]
    return plan.metadata | tokenizer_metadata(folder, vocabulary, pre=section.pre) | made


def _most(plan: GgufPlan) -> str:
    """The mix that stands for measured types: llama.cpp only shows it."""
    name = next(iter(plan.by_type()))
    return {"Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "Q3_K": "Q3_K_M"}.get(name, name)


def _shapes(where: Mapping[str, Place], tensors: Tensors) -> dict[str, tuple[int, ...]]:
    """GGUF tensor -> shape, blocks in order behind the embedding and before the head."""
    found: dict[str, tuple[int, ...]] = {}
    experts: dict[str, int] = {}
    for name, place in where.items():
        shape = tuple(tensors[name].shape)
        if place.expert is not None:
            experts[place.tensor] = max(experts.get(place.tensor, 0), place.expert + 1)
            shape = (experts[place.tensor], *shape)
        found[place.tensor] = shape
    return {name: found[name] for name in sorted(found, key=_order)}


def _order(name: str) -> tuple[int, int, str]:
    if name.startswith("blk."):
        return 1, int(name.split(".")[1]), name
    return (0 if name.startswith("token_embd") else 2), 0, name


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _bytes(kind: str, shape: tuple[int, ...]) -> int:
    return _count(shape) // shape[-1] * GGML_TYPES[kind].row_bytes(shape[-1])
