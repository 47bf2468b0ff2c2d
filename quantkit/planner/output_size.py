"""Bytes and bits of what a recipe makes of a model."""

from collections import Counter
from typing import Any

import torch

from quantkit.errors import UserError
from quantkit.formats import FORMATS
from quantkit.planner.model_inventory import ModelInventory
from quantkit.planner.run_cost import PlannedLinear
from quantkit.quantization.targets import activation_spec, smaller_group, weight_spec
from quantkit.recipe.recipe import Recipe
from quantkit.types import Scheme


def resolve(recipe: Recipe, inventory: ModelInventory) -> list[PlannedLinear]:
    """The linears the recipe quantizes, each with its scheme; UserError with every misfit, as `quantize` has it."""
    classes = {m.name: m.class_name for m in inventory.matrices} | dict.fromkeys(inventory.skipped, "Linear")
    if unmatched := recipe.unmatched(classes):
        raise UserError("\n".join(unmatched))
    format_ = FORMATS[recipe.output.format]
    jobs: list[PlannedLinear] = []
    misfits: Counter[tuple[int, int]] = Counter()
    checked: set[Any] = set()
    for matrix in inventory.matrices:
        weights = recipe.weights_for(matrix.name, matrix.class_name)
        if weights is None:
            continue
        N, K = matrix.shape
        spec, size = weight_spec(weights), weights.group_columns
        if size != -1 and K % size and spec.scale_rows == 1:
            if weights.on_misfit == "error":
                misfits[size, K] += 1
            if weights.on_misfit in ("error", "skip"):
                continue
            spec = weight_spec(weights, -1 if weights.on_misfit == "channel" else smaller_group(K, size))
        scheme = Scheme(spec, activation_spec(recipe.activations_for(matrix.name, matrix.class_name)))
        scale_dtype = format_.scale_dtype(scheme, matrix.dtype)
        if (key := (matrix.shape, scheme, scale_dtype)) not in checked:
            format_.layout((N, K), scheme, scale_dtype)
            checked.add(key)
        jobs.append(PlannedLinear(matrix, weights, scheme, scale_dtype))
    if misfits:
        shown = ", ".join(f"{size} does not divide {K} ({count} linears)" for (size, K), count in misfits.items())
        raise UserError(f"weights.group_size {shown}; set weights.group_size: channel, or weights.on_misfit")
    if not jobs:
        raise UserError("no linear is left to quantize")
    return jobs


def _sizes(recipe: Recipe, inventory: ModelInventory, jobs: list[PlannedLinear]) -> tuple[int, int]:
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
