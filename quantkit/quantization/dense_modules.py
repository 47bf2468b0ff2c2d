"""What stays dense: every weight matrix of the checkpoint that is not quantized, by its name there, and why.

The checkpoint decides, not the model: prediction layers and vision towers that transformers does not build are listed
too, for an engine that does build them must know that they are dense.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from torch import nn

from quantkit.checkpoint.header import TensorInfo, TensorLayout
from quantkit.model.streamed_model import StreamedModel
from quantkit.model.weight_sources import TensorSlice

LOW = 0.9  # share of the blocks' weights below which the report warns
TABLES = re.compile(r"wte|wpe|shared|((tok|token|word|pos|position)_)?embed(ding|dings|_tokens|_positions|_in)?")
Sources = Mapping[str, list[TensorSlice]]
Tensors = Mapping[str, TensorInfo | TensorLayout]


def dense_modules(
    model: nn.Module, sources: Sources, tensors: Tensors, candidates: Set[str], reasons: Mapping[str, str]
) -> dict[str, str]:
    """Checkpoint name -> reason of every matrix that no recipe can quantize.

    sources     parameter of the model -> the checkpoint tensors it is made of
    tensors     all that the output's source holds; candidates: names of the matrices a recipe may quantize
    reasons     why a module or parameter of the model is not a candidate, by its path there
    """
    embeddings = {
        piece.name
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Embedding)
        for piece in sources.get(f"{path}.weight", ())
    }
    found: dict[str, str] = {}
    for path, reason in reasons.items():
        for name in _checkpoint_names(sources, path, embeddings):
            if name not in candidates:
                found[name] = reason
    built = {piece.name for pieces in sources.values() for piece in pieces}
    for name, info in tensors.items():
        module = name.removesuffix(".weight")
        stack = len(info.shape) == 3 and ".experts." in name
        if module in candidates or not (stack or (module != name and len(info.shape) == 2)):
            continue
        if looks_like_embedding(module) and (name in embeddings or name not in built):
            continue
        if name in embeddings:  # whose name does not say so: engines are told
            found.setdefault(module, "an embedding table")
            continue
        why = "outside the decoder blocks" if name in built else "transformers does not build it; it is copied as it is"
        found.setdefault(module, why)
    return found


def looks_like_embedding(module: str) -> bool:
    """Whether a module that is not in the model is an embedding table, by its name: only clear names count.

    A table taken for a linear does no harm in a list of dense modules; a linear taken for a table does.
    """
    return TABLES.fullmatch(module.rpartition(".")[2]) is not None


def ignored_names(skipped: Iterable[str], tensors: Tensors, quantized: Set[str]) -> list[str]:
    """The modules to declare dense: those skipped; for a dense stack of experts, the module that holds it."""
    names = list(skipped)
    stacks = {name.rpartition(".")[0] for name in names if name in tensors and len(tensors[name].shape) == 3}
    dense = [name for name in names if name not in tensors]
    return dense + sorted(s for s in stacks if not any(name.startswith(f"{s}.") for name in quantized))


@dataclass(frozen=True, slots=True)
class Coverage:
    """share: of the weights in the blocks' matrices, how many are quantized; then the largest part that is not."""

    share: float
    largest: str = ""
    largest_share: float = 0.0
    reason: str = ""

    def warnings(self) -> list[str]:
        """A warning where the share is low."""
        if self.share >= LOW:
            return []
        return [
            f"only {self.share:.1%} of the weights in the decoder blocks are quantized; the largest part that is not, "
            f"{self.largest_share:.1%}: {self.largest} ({self.reason})"
        ]


def coverage(streamed: StreamedModel, quantized: Set[str], skipped: Mapping[str, str]) -> Coverage:
    """How much of the decoder blocks is quantized, counted in weights of 2-D and 3-D tensors of the checkpoint.

    quantized: names of tensors; skipped: module name -> reason.
    """
    tensors = streamed.checkpoint.tensors
    names = {
        piece.name: None
        for index, block in enumerate(streamed.blocks)
        for path, param in block.named_parameters()
        if param.dim() in (2, 3)
        for piece in streamed.sources.get(streamed.prefix(index) + path, ())
    }
    dense: Counter[tuple[str, str]] = Counter()
    for name in names.keys() - quantized:
        module = name.removesuffix(".weight")
        alike = ".".join("*" if part.isdigit() else part for part in module.split("."))
        dense[alike, skipped.get(module, "not a linear")] += math.prod(tensors[name].shape)
    total = sum(math.prod(tensors[name].shape) for name in names)
    if not total or not dense:
        return Coverage(1.0)
    (largest, reason), size = max(dense.items(), key=lambda item: (item[1], item[0]))
    return Coverage(1 - dense.total() / total, largest, size / total, reason)


def _checkpoint_names(sources: Sources, path: str, embeddings: Set[str]) -> list[str]:
    """What the checkpoint calls a module or parameter of the model; its own path where it has no tensor of its own."""
    for param in (f"{path}.weight", path):
        if param in sources and not any(piece.name in embeddings for piece in sources[param]):
            return list(dict.fromkeys(piece.name.removesuffix(".weight") for piece in sources[param]))
    return [path]
