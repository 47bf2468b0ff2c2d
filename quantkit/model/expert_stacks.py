"""Experts that a checkpoint keeps in one tensor per layer, as one matrix each: their layout and their names.

Engines take quantized experts one by one, named as where checkpoints keep them apart. So a stack is cut before
anything is quantized, and put together again when such a folder is loaded.

How a stack is laid out is what transformers' own class says of itself; what it does not say stands in two tables.

Shapes: E = experts, N = out features, K = in features.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from quantkit.checkpoint.expert_view import ExpertPart, UnstackedCheckpoint
from quantkit.checkpoint.reader import Checkpoint
from quantkit.model.weight_sources import TensorSlice, checkpoint_renaming, weight_sources

Sources = dict[str, list[TensorSlice]]
ALL = slice(None)

# Classes that do not say how their stacks lie: (stored [E, K, N], rows of gate and up in turn).
LAYOUTS = {
    "Llama4TextExperts": (True, False),  # bmm(x, gate_up_proj), then chunk
    "InklingSharedExperts": (False, False),  # bmm(x, gate_proj.transpose(1, 2))
    "JetMoeParallelExperts": (False, False),  # linear(x, weight[e])
}
# Model types whose loader in vLLM maps other names than gate_proj, up_proj and down_proj.
MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
NAMES = {"granitemoe": MIXTRAL, "granitemoeshared": MIXTRAL}  # both load through the loader of Mixtral


@dataclass(frozen=True, slots=True)
class StackLayout:
    """How a parameter holds its experts: [E, N, K], [E, K, N] if transposed, or [E, N] of biases.

    parts  (name behind the expert's number, its rows of N); the name may be empty
    leaf   of the tensors of the parts: weight or bias
    """

    experts: int
    parts: tuple[tuple[str, slice], ...]
    transposed: bool
    leaf: str

    def tensors(self, stem: str) -> Iterator[tuple[str, int, slice]]:
        """(tensor, expert, rows) of every part, where the experts' numbers follow on `stem`."""
        for expert in range(self.experts):
            for part, rows in self.parts:
                yield ".".join(filter(None, (stem, str(expert), part, self.leaf))), expert, rows

    def pieces(self, stem: str) -> list[TensorSlice]:
        """The parameter put together from such tensors."""
        return [
            TensorSlice(name, (expert, ALL, rows) if self.transposed else (expert, rows), (), self.transposed)
            for name, expert, rows in self.tensors(stem)
        ]


def stack_layouts(model: nn.Module) -> dict[str, StackLayout]:
    """The layout of each parameter of the model that holds a matrix, or a bias, of every expert of a layer."""
    kind = getattr(getattr(model, "config", None), "get_text_config", lambda: None)()
    names = NAMES.get(getattr(kind, "model_type", ""), {})
    found = {}
    for path, module in model.named_modules():
        for leaf, param in module.named_parameters(recurse=False):
            if (layout := _layout(module, leaf, param, names)) is not None:
                found[f"{path}.{leaf}"] = layout
    return found


def _layout(owner: nn.Module, leaf: str, param: Tensor, names: Mapping[str, str]) -> StackLayout | None:
    known = LAYOUTS.get(type(owner).__name__)
    if known is None and not hasattr(owner, "is_concatenated"):
        return None
    transposed, in_turn = known or (bool(owner.is_transposed), not owner.is_concatenated)
    matrix, bias = leaf.removesuffix("_bias"), leaf.endswith("_bias")
    if param.dim() != (2 if bias else 3):
        return None
    swapped = transposed and not bias
    N = param.shape[2 if swapped else 1]
    if matrix == "weight":
        parts = (("", ALL),)
    elif matrix == "gate_up_proj":
        halves = (slice(0, None, 2), slice(1, None, 2)) if in_turn else (slice(0, N // 2), slice(N // 2, N))
        parts = tuple(
            (names.get(half, half), rows) for half, rows in zip(("gate_proj", "up_proj"), halves, strict=True)
        )
    elif matrix in ("gate_proj", "up_proj", "down_proj"):
        parts = ((names.get(matrix, matrix), ALL),)
    else:
        return None
    return StackLayout(len(param), parts, swapped, "bias" if bias else "weight")


def unstacked(
    model: nn.Module, sources: Sources, checkpoint: Checkpoint, kept: Collection[str] = ()
) -> tuple[Sources, Checkpoint]:
    """Sources and checkpoint where every stack of experts is cut into one tensor per matrix; `kept` stacks are not."""
    renamed = checkpoint_renaming(model)
    cut, parts = dict(sources), dict[str, ExpertPart]()
    for param, layout in stack_layouts(model).items():
        pieces = sources.get(param, [])
        if len(pieces) != 1 or pieces[0].where or pieces[0].part or pieces[0].name in kept:
            continue
        stack = pieces[0].name
        stem, leaf = _stem(stack, param), param.rpartition(".")[2]
        if renamed(f"{stem}.{leaf}") != param:
            continue  # a folder with such names could not be loaded again
        own = {
            name: ExpertPart(stack, expert, layout.transposed != pieces[0].transposed, rows)
            for name, expert, rows in layout.tensors(stem)
        }
        if own.keys() & (checkpoint.tensors.keys() | parts.keys()):
            continue
        parts |= own
        cut[param] = layout.pieces(stem)
    return cut, UnstackedCheckpoint(checkpoint, parts) if parts else checkpoint


def _stem(stack: str, param: str) -> str:
    """What the numbers of the experts follow on: the checkpoint's name of the module that holds them."""
    *_, owner, leaf = param.split(".")
    base = stack.removesuffix(".weight")
    if leaf == "weight":
        return base
    parent, _, last = base.rpartition(".")
    return parent if last == leaf or parent.rpartition(".")[2] == owner else f"{parent}.{owner}"


def idle_stacks(checkpoint: Checkpoint, quantized: Collection[str]) -> set[str]:
    """The stacks that were cut for nothing: no expert of their module is quantized (names of modules)."""
    if not isinstance(checkpoint, UnstackedCheckpoint):
        return set()
    users: dict[str, set[str]] = {}  # module that holds the stacks -> stacks
    busy = set[str]()
    for name, part in checkpoint.parts.items():
        owner = name[: name.rindex(f".{part.expert}.")]
        users.setdefault(owner, set()).add(part.stack)
        if name.rpartition(".")[0] in quantized:
            busy.add(owner)
    return {stack for owner, stacks in users.items() if owner not in busy for stack in stacks}


def stacked_sources(model: nn.Module, checkpoint: Mapping[str, Any]) -> Sources:
    """`weight_sources` of a checkpoint whose stacks may have been cut by `unstacked`."""
    names, layouts = checkpoint.keys(), stack_layouts(model)
    state = model.state_dict().keys()
    renamed = checkpoint_renaming(model)
    stems = dict.fromkeys(stem for name in names if renamed(name) not in state for stem in _stems(name))
    whole: dict[str, tuple[int, ...]] = {}
    found: dict[str, tuple[str, str]] = {}  # name of the stack that is missing -> (parameter, stem)
    for leaf in dict.fromkeys(param.rpartition(".")[2] for param in layouts):
        for stem in stems:
            param = renamed(f"{stem}.{leaf}")
            if param not in layouts or f"{stem}.{leaf}" in names:
                continue
            if all(name in names for name, *_ in layouts[param].tensors(stem)):
                whole[f"{stem}.{leaf}"] = tuple(model.get_parameter(param).shape)
                found[f"{stem}.{leaf}"] = (param, stem)
    own = {name for param, stem in found.values() for name, *_ in layouts[param].tensors(stem)}
    sources = weight_sources(model, {n: s for n, s in checkpoint.items() if n not in own} | whole)
    for param, pieces in sources.items():
        if pieces[0].name in found:
            sources[param] = layouts[param].pieces(found[pieces[0].name][1])
    return sources


def _stems(name: str) -> Iterator[str]:
    """What stands before each number in a name."""
    parts = name.split(".")
    return (".".join(parts[:i]) for i, part in enumerate(parts) if part.isdigit() and i)
