"""What a run, and one of its decoder blocks, consist of: what its steps pass on to each other."""

from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from quantkit.checkpoint.writer import ShardWriter
from quantkit.formats import Format
from quantkit.model.block_graph import BlockGraph
from quantkit.model.streamed_model import StreamedModel
from quantkit.quantization.gguf_importance import Importance
from quantkit.quantization.gguf_output import GgufOutput
from quantkit.quantization.resources import StageTimer
from quantkit.quantization.targets import LinearTarget, Targets
from quantkit.quantization.transforms.rotation import ModelRotation
from quantkit.recipe.recipe import Recipe


@dataclass(frozen=True, slots=True)
class RunContext:
    """The parts of one run.

    graphs    of every block; folder: where the run writes until it is finished
    rotation  of the whole model, None where the recipe asks for none
    importance  what an importance matrix says of what is rounded; empty without one
    """

    recipe: Recipe
    streamed: StreamedModel
    graphs: list[BlockGraph]
    targets: Targets
    format: Format
    writer: ShardWriter | GgufOutput
    folder: Path
    timer: StageTimer
    rotation: ModelRotation | None = None
    importance: Importance = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BlockContext:
    """One decoder block with its live weights, and what of it is quantized."""

    index: int
    block: nn.Module
    graph: BlockGraph
    linears: list[LinearTarget]

    def groups(self) -> list[tuple[int, list[LinearTarget]]]:
        """The linears by the input group they share, in execution order."""
        groups: dict[int, list[LinearTarget]] = {}
        for linear in self.linears:
            groups.setdefault(self.graph.group_of(linear.site.name), []).append(linear)
        return sorted(groups.items())
