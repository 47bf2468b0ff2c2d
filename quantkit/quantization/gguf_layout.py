"""What a GGUF file will hold: its tensors with their names, shapes and types, and its metadata, before any work.

Shapes are in numpy's order (rows first), as in the checkpoint.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint.header import TensorInfo, TensorLayout
from quantkit.errors import UserError
from quantkit.formats.gguf.architectures import settings
from quantkit.formats.gguf.metadata import model_metadata
from quantkit.formats.gguf.mixes import bytes_of, size_by_type, tensor_types
from quantkit.formats.gguf.tensor_names import Place, architecture, extra_tensors, gguf_shapes, places
from quantkit.ggml_types import QUANTIZED, STORED
from quantkit.recipe.gguf import Gguf
from quantkit.recipe.recipe import Recipe
from quantkit.report.block_records import LinearRecord
from quantkit.report.records import GgufRecord

if TYPE_CHECKING:
    import numpy as np

    from quantkit.checkpoint.gguf_writer import GgufLayout, KeyValue

TABLES = EMBEDDING, HEAD = "token_embd.weight", "output.weight"

Tensors = Mapping[str, TensorInfo | TensorLayout]


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
    metadata: "dict[str, KeyValue]"
    extra: "dict[str, np.ndarray]"

    def type_of(self, name: str) -> str:
        """The type of the GGUF tensor that a checkpoint tensor goes to."""
        return self.types[self.places[name].tensor]

    def names_of(self, tensor: str) -> list[str]:
        """The checkpoint tensors that make a GGUF tensor."""
        return [name for name, place in self.places.items() if place.tensor == tensor]

    @property
    def head(self) -> str:
        """The GGUF tensor that is the head: the embedding where the two are tied."""
        return HEAD if HEAD in self.shapes else EMBEDDING

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return self.shapes[EMBEDDING][0]

    def layouts(self) -> "list[GgufLayout]":
        """All tensors of the file, in order."""
        from quantkit.checkpoint.gguf_writer import GgufLayout  # which imports torch

        return [GgufLayout(name, self.types[name], shape) for name, shape in self.shapes.items()]

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(bytes_of(self.types[name], shape) for name, shape in self.shapes.items())

    def by_type(self) -> dict[str, tuple[int, int]]:
        """Type -> (tensors, bytes)."""
        return size_by_type(self.types, self.shapes)

    @property
    def bits_per_weight(self) -> float:
        """Of all tensors together."""
        return 8 * self.data_bytes / sum(math.prod(shape) for shape in self.shapes.values())

    def record(self, tables: Iterable[LinearRecord], measured: dict[str, Any] | None) -> GgufRecord:
        """What the report says of the file."""
        return GgufRecord(self.by_type(), self.bits_per_weight, tuple(tables), measured)

    def with_types(self, types: Mapping[str, str]) -> "GgufPlan":
        """Other types for some GGUF tensors."""
        return replace(self, types=self.types | dict(types))

    def dense_types(self, names: Iterable[str]) -> dict[str, str]:
        """GGUF tensor -> type, for checkpoint tensors that stay as they are stored."""
        return {self.places[name].tensor: self.type_of(name) for name in names if name in self.places}

    def with_dense(self, names: Iterable[str], tensors: Tensors) -> "GgufPlan":
        """Those of these checkpoint tensors that lie in blocks as they are stored: what a recipe leaves out.

        UserError where only some experts of one tensor are.
        """
        dense = {
            name
            for name in names
            if name in self.places and self.places[name].tensor.startswith("blk.") and self.type_of(name) in QUANTIZED
        }
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
    stored = {name: tuple(info.shape) for name, info in tensors.items()}
    where, shapes = places(config, stored), gguf_shapes(config, stored)
    if EMBEDDING not in shapes:
        raise UserError("the checkpoint has no embedding table, which a GGUF needs")
    metadata = model_metadata(config, name=name, vocab_size=shapes[EMBEDDING][0])
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
    return GgufPlan(kind, where, shapes, types, metadata, extra_tensors(config))


def plan_for(recipe: Recipe, config: Mapping[str, Any], tensors: Tensors) -> GgufPlan:
    """The plan of a recipe with a `gguf` section for a model."""
    assert recipe.gguf is not None
    importance = recipe.calibration is not None or recipe.gguf.imatrix is not None
    name = str(config.get("_name_or_path") or Path(recipe.model or "model").name)
    return gguf_plan(recipe.gguf, config, tensors, importance=importance, name=Path(name).name)


def plan_before(recipe: Recipe, config: Mapping[str, Any], tensors: Tensors) -> GgufPlan:
    """The plan of a recipe for a model as it is stored, before any transform: a rotation unties the head."""
    if any(transform.name == "rotation" for transform in recipe.transforms) and settings(config)["tie_word_embeddings"]:
        table = next((info for name, info in tensors.items() if name.endswith("embed_tokens.weight")), None)
        tensors = dict(tensors) if table is None else {**tensors, "lm_head.weight": table}
        config = {**config, "tie_word_embeddings": False}
    return plan_for(recipe, config, tensors)


def candidate_types(plan: GgufPlan) -> dict[str, str]:
    """The type of each matrix by its name in the checkpoint, without .weight; F32 where GGUF has no place for it."""
    return {name.removesuffix(".weight"): plan.type_of(name) for name in plan.places if name.endswith(".weight")}
