"""Bytes and bits of what a recipe makes of a model."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from quantkit.formats import FORMATS
from quantkit.formats.gguf.mixes import size_by_type
from quantkit.planner.linear_groups import PlannedLinear
from quantkit.planner.model_inventory import ModelInventory, cached_heads
from quantkit.quantization.calibration.kv_scales import CacheShape, block_scales
from quantkit.quantization.dense_modules import ignored_names
from quantkit.quantization.gguf_budget import measured_budget
from quantkit.quantization.gguf_layout import GgufPlan, candidate_types, plan_before
from quantkit.quantization.targets import Candidate, Resolved, Targets, resolve
from quantkit.recipe.gguf import Measured
from quantkit.recipe.recipe import Recipe

UNMEASURED = "by measured harm"  # in place of a type


def planned_gguf(recipe: Recipe, inventory: ModelInventory, config: Mapping[str, Any]) -> GgufPlan | None:
    """The GGUF that a run would write; None for other formats. config: of config.json."""
    if recipe.gguf is None:
        return None
    return plan_before(recipe, config, inventory.tensors)


@dataclass(frozen=True, slots=True)
class MeasuredSizes:
    """What is known of a measured mix before anything is measured: its size, and the types that are given."""

    gguf: GgufPlan
    fixed: Mapping[str, str]
    nbytes: int

    @property
    def types(self) -> dict[str, tuple[int, int]]:
        """Type -> (tensors, bytes); those that have no type yet stand together."""
        given = size_by_type(self.fixed, self.gguf.shapes)
        free = self.nbytes - sum(held for _, held in given.values())
        return {UNMEASURED: (len(self.gguf.shapes) - len(self.fixed), free)} | given

    @property
    def bits_per_weight(self) -> float:
        """Of all tensors together."""
        return 8 * self.nbytes / sum(math.prod(shape) for shape in self.gguf.shapes.values())

    def type_of(self, name: str) -> str:
        """The type of the GGUF tensor that a checkpoint tensor goes to."""
        return self.fixed.get(self.gguf.places[name].tensor, UNMEASURED)


def measured_sizes(recipe: Recipe, gguf: GgufPlan, dense: Iterable[str]) -> MeasuredSizes | None:
    """None where the types are known; dense: checkpoint tensors that stay as they are stored.

    UserError where the size is too small for the model.
    """
    if recipe.gguf is None or not isinstance(recipe.gguf.mix, Measured):
        return None
    return MeasuredSizes(gguf, *measured_budget(recipe.gguf, gguf.shapes, gguf.dense_types(dense)))


def gguf_bytes(recipe: Recipe, inventory: ModelInventory, gguf: GgufPlan, found: Resolved) -> int:
    """Bytes of all tensors of a GGUF that a run would write."""
    dense = [f"{name}.weight" for name, _ in found.skipped]
    gguf = gguf.with_dense(dense, inventory.tensors)
    measured = measured_sizes(recipe, gguf, dense)
    return gguf.data_bytes if measured is None else measured.nbytes


def resolved(
    recipe: Recipe, inventory: ModelInventory, gguf: GgufPlan | None = None
) -> tuple[list[PlannedLinear], Resolved]:
    """The linears the recipe quantizes, resolved as a run resolves them; UserError in the same words."""
    candidates = [Candidate(m.name, m.block, m.site, m.rows, m.shape, m.dtype, m.limit) for m in inventory.matrices]
    found = resolve(recipe, candidates, inventory.skipped, None if gguf is None else candidate_types(gguf))
    matrices = {matrix.name: matrix for matrix in inventory.matrices}
    return [PlannedLinear(matrices[t.name], t.weights, t.scheme, t.scale_dtype) for t in found.linears], found


def planned_targets(recipe: Recipe, inventory: ModelInventory, found: Resolved) -> Targets:
    """What a run would have as its targets; the names of linears say where an attention keeps its cache."""
    scales = []
    if found.kv is not None:
        attention = {m.block: m.name.rpartition(".")[0] for m in reversed(inventory.matrices) if "attn" in m.name}
        names, (heads, size) = FORMATS[recipe.output.format].KV_NAMES, cached_heads(inventory.config)
        shape = CacheShape(heads, size, size)
        scales = [block_scales(found.kv, names, module, shape) for module in attention.values()]
    quantized = {linear.name for linear in found.linears}
    ignored = ignored_names(dict(found.skipped), inventory.tensors, quantized)
    return Targets(found.linears, found.skipped, ignored, found.notes, found.kv, scales)


def sizes(recipe: Recipe, inventory: ModelInventory, jobs: list[PlannedLinear]) -> tuple[int, int]:
    """Bytes of all tensors of the output, and bits of the quantized weights among them."""
    format_ = FORMATS[recipe.output.format]
    known: dict[Any, tuple[int, int]] = {}
    size, bits = inventory.stored, 0
    for job in jobs:
        key = (job.matrix.shape, job.scheme, job.scale_dtype)
        if key not in known:
            layout = format_.layout(*key)
            tensors = [(dtype, torch.Size(shape).numel() * dtype.itemsize) for dtype, shape in layout.values()]
            known[key] = (
                sum(held for _, held in tensors),
                sum(held for dtype, held in tensors if dtype != torch.int64),  # a shape is no part of the weight
            )
        size += known[key][0] - job.matrix.numel * job.matrix.dtype.itemsize
        bits += 8 * known[key][1]
    tied, head = inventory.head
    if tied and any(transform.name == "rotation" for transform in recipe.transforms):
        size += head  # absorbs the final norm, the embedding does not
    return size, bits
