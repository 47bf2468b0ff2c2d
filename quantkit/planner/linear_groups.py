"""The linears of a block that share an input, as memory and time are counted: by group and in order of execution.

Shapes: N = out features (of all linears of a group), K = in features.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from quantkit.planner.model_inventory import LinearShape, ModelInventory
from quantkit.quantization.calibration.staged_forward import fits_in_memory
from quantkit.recipe.algorithms import Algorithm, GptqOptions
from quantkit.recipe.number_formats import Weights
from quantkit.recipe.recipe import Recipe
from quantkit.types import Scheme


@dataclass(frozen=True, slots=True)
class PlannedLinear:
    """One linear that is quantized."""

    matrix: LinearShape
    weights: Weights
    scheme: Scheme
    scale_dtype: torch.dtype


@dataclass(slots=True)
class Group:
    """Linears with one input: `rows` of each, all of K columns; attention: they belong to one."""

    K: int
    expert: bool
    attention: bool
    algorithm: Algorithm
    columns: int
    rows: list[int] = field(default_factory=list)

    @property
    def N(self) -> int:  # noqa: N802 (the shape suffix)
        return sum(self.rows)

    @property
    def gptq(self) -> GptqOptions | None:
        return self.algorithm.gptq

    @property
    def refits(self) -> bool:
        """Whether the original model's inputs are its target; an expert's tokens differ between the two streams."""
        return bool(self.gptq and self.gptq.refit and not self.expert)

    @property
    def block(self) -> int | None:
        """Columns of the diagonal blocks of the Hessian that are gathered; None where none are."""
        return self.columns if self.gptq is None and self.algorithm.options.range == "output" else None


Blocks = list[list[Group]]


def grouped(jobs: Iterable[PlannedLinear]) -> Blocks:
    """The groups of every block that has any."""
    found: dict[tuple[int, str], Group] = {}
    for job in jobs:
        N, K = job.matrix.shape
        group = found.setdefault(
            (job.matrix.block, job.matrix.group),
            Group(
                K,
                job.matrix.expert,
                "attn" in job.matrix.group or "attention" in job.matrix.group,
                job.weights.choice,
                job.scheme.weights.columns(K),
            ),
        )
        group.rows.append(N)
    blocks: dict[int, list[Group]] = {}
    for (block, _), group in found.items():
        blocks.setdefault(block, []).append(group)
    return list(blocks.values())


def staged(recipe: Recipe, groups: list[Group]) -> bool:
    """Whether every group of the block waits for the quantized ones before it."""
    return recipe.propagate == "quantized" and any(group.gptq for group in groups)


def halted(recipe: Recipe, blocks: Blocks, inventory: ModelInventory, tokens: int) -> bool:
    """Whether all batches are halted inside a block for its stages, and go on from there."""
    widest = max(group.K for groups in blocks for group in groups)
    experts = any(group.expert for groups in blocks for group in groups)
    wanted = any(staged(recipe, groups) and len(groups) > 1 for groups in blocks)
    return wanted and not experts and fits_in_memory(tokens, inventory.hidden_size, widest)
