"""Routers: matrices whose outputs are ranked, or indexed, to choose experts, and that have one row per expert.

The outputs of products are followed through the operators that torch really runs, so it does not matter by which
function, method or in-place form a model ranks them. What follows is stopped by other products (attention scores are
no longer an output of q) and by sums that leave none of the columns.

Shapes: N = out features of a matrix, E = experts.
"""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Key = tuple[str, int | None]  # parameter path in the block, and the expert of it

# names of aten operators, without the underscore of those that work in place
RANKS = {"topk", "sort", "argsort", "msort", "kthvalue", "argmax", "argmin", "mode", "cummax", "cummin", "multinomial"}
RANKS |= {"gt", "ge", "lt", "le", "eq", "ne", "nonzero", "masked_select", "bucketize", "searchsorted", "histc"}
RANKS |= {"bincount", "gumbel_softmax", "quantile", "nanquantile"}
RANKS_ALONG_A_DIM = {"max", "min", "median", "nanmedian"}  # without a dimension they look for nothing
TAKES = {"gather", "index_select", "take_along_dim"}  # (values, dimension, indices)
PUTS = {"scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_reduce"}  # (into, dimension, ...)
INDEXES = {"index", "index_put", "_index_put_impl"}  # (values, indices of the leading dimensions)
TABLES = {"index": (0, 1), "index_select": (0, 2), "gather": (0, 2), "embedding": (0, 1)}  # where values, indices are
CONTRACTS = {"mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot", "matmul", "linear", "einsum"}
CONTRACTS |= {"tensordot", "convolution", "conv1d", "conv2d", "cdist", "_cdist_forward", "_grouped_mm", "_scaled_mm"}
REDUCES = {"sum", "nansum", "mean", "nanmean", "prod", "logsumexp", "norm", "linalg_vector_norm", "var", "std", "amax"}
REDUCES |= {"amin", "any", "all", "var_mean", "std_mean", "count_nonzero"}


@dataclass(frozen=True, slots=True)
class Choice:
    """One operator that ranks or indexes what a matrix made: the shape of its input."""

    shape: tuple[int, ...]
    ranked: bool


class FollowOutputs(TorchDispatchMode):
    """Follows tensors given to `tag` through what is computed of them, and notes where they are chosen by.

    choices  what ranks or indexes the outputs of each matrix
    looked_up  matrices whose ranked outputs pick rows of a parameter of the block (experts kept in a table)
    parts  for each parameter of which products read equal parts: into how many it is cut
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.choices: dict[Key, list[Choice]] = {}
        self.looked_up: set[Key] = set()
        self.parts: set[int] = set()
        self._rows: dict[Key, int] = {}
        self._made_by: dict[int, set[Key]] = {}
        self._written: dict[int, set[Key]] = {}  # by storage: views of it that were written into
        self._alive: list[Tensor] = []  # so that no address is used twice
        params = sorted(((p.data_ptr(), p) for p in block.parameters() if p.numel()), key=lambda item: item[0])
        self._starts, self._params = [start for start, _ in params], [param for _, param in params]

    def tag(self, result: Tensor, key: Key) -> None:
        """The output of a product [..., N] with the matrix `key`."""
        self._alive.append(result)
        self._made_by[id(result)] = {key}
        self._rows[key] = result.shape[-1]

    def release(self) -> None:
        """Let go of the run's tensors."""
        del self._alive, self._made_by, self._written

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2].rstrip("_")
        if name in CONTRACTS or name.startswith(("_scaled_dot_product", "scaled_dot_product", "_flash", "_efficient")):
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and (param := self._param_of(leaf)) is not None:
                    self._note_part(param, leaf)
            return result
        makers: set[Key] = set()
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                makers |= self._makers(leaf)
        if makers:
            self._note(name, func._overloadname, args, kwargs)
            self._follow(name, func._schema.is_mutable, result, makers)
        return result

    def _makers(self, tensor: Tensor) -> set[Key]:
        own = self._made_by.get(id(tensor), set())
        if not self._written or tensor.device.type == "meta":
            return own
        return own | self._written.get(tensor.untyped_storage().data_ptr(), set())

    def _follow(self, name: str, in_place: bool, result: Any, makers: set[Key]) -> None:
        for leaf in tree_leaves(result):
            if not isinstance(leaf, Tensor):
                continue
            kept = makers
            if name in REDUCES:
                kept = {key for key in makers if has_columns(tuple(leaf.shape), self._rows[key])}
            if not kept:
                continue
            self._alive.append(leaf)
            self._made_by.setdefault(id(leaf), set()).update(kept)
            if in_place:
                self._written.setdefault(leaf.untyped_storage().data_ptr(), set()).update(kept)

    def _note(self, name: str, overload: str, args: tuple, kwargs: dict) -> None:
        """Note what this operator does with the outputs of matrices."""
        ranked = name in RANKS or (name in RANKS_ALONG_A_DIM and "dim" in overload)
        for leaf in tree_leaves((args, kwargs)) if ranked else ():
            if isinstance(leaf, Tensor):
                for key in self._makers(leaf):
                    self.choices.setdefault(key, []).append(Choice(tuple(leaf.shape), ranked=True))
        for values, sizes in indexed(name, args, kwargs):
            for key in self._makers(values):
                if self._rows[key] in sizes:
                    self.choices.setdefault(key, []).append(Choice(tuple(values.shape), ranked=False))
        places = TABLES.get(name)
        if places is not None and len(args) > max(places) and isinstance(args[places[0]], Tensor):
            indices = [leaf for leaf in tree_leaves(args[places[1]]) if isinstance(leaf, Tensor)]
            found = set[Key]().union(*(self._makers(leaf) for leaf in indices if not leaf.is_floating_point()))
            if found and self._param_of(args[places[0]]) is not None:
                self.looked_up |= found

    def _param_of(self, tensor: Tensor) -> Tensor | None:
        """The parameter of the block that this tensor lies in."""
        if not self._starts or tensor.device.type == "meta" or not tensor.numel():
            return None
        start = tensor.data_ptr()
        param = self._params[max(0, bisect_right(self._starts, start) - 1)]
        inside = 0 <= start - param.data_ptr() < param.numel() * param.element_size()
        return param if inside and tensor.dtype == param.dtype else None

    def _note_part(self, param: Tensor, operand: Tensor) -> None:
        if param.dim() == 2 and operand.dim() == 2 and operand.numel() < param.numel():
            count, rest = divmod(param.numel(), operand.numel())
            if not rest:
                self.parts.add(count)


def indexed(name: str, args: tuple, kwargs: dict) -> Iterator[tuple[Tensor, set[int]]]:
    """(tensor, sizes of its dimensions along which it is indexed) for an operator that takes or puts by index."""
    values, where, *rest = (*args, *kwargs.values(), None)
    if not isinstance(values, Tensor):
        return
    if name in INDEXES and isinstance(where, list | tuple):
        sizes, dim = set[int](), 0
        for index in where:
            steps = index.dim() if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) else 1
            sizes |= set(values.shape[dim : dim + steps]) if index is not None else set()
            dim += steps
    elif name in TAKES | PUTS and isinstance(where, int) and values.dim():
        sizes = {values.shape[where]}
    else:
        return
    for leaf in (values, *rest):
        if isinstance(leaf, Tensor):
            yield leaf, sizes


def has_columns(shape: tuple[int, ...], N: int) -> bool:
    """Whether a tensor of this shape can still hold N columns: in one dimension, or in neighbours that are groups."""
    for first in range(len(shape)):
        total = 1
        for size in shape[first:]:
            total *= size
            if total == N:
                return True
    return False


def expert_counts(block: nn.Module, parts: set[int], fused: set[str]) -> set[int]:
    """How many experts the block may have: sizes of 3-D parameters, numbers of like modules, parts of a parameter.

    fused: paths of 3-D parameters seen in products; of the others, those of convolutions are left out.
    """
    counts = set(parts)
    for path, module in block.named_modules():
        for name, param in module.named_parameters(recurse=False):
            of_convolution = isinstance(module, nn.modules.conv._ConvNd)
            if param.dim() == 3 and (f"{path}.{name}".lstrip(".") in fused or not of_convolution):
                counts.add(param.shape[0])
        alike = Counter(
            (re.sub(r"\d+", "*", name), type(child).__name__, tuple(tuple(p.shape) for p in child.parameters()))
            for name, child in module.named_children()
            if next(child.parameters(), None) is not None
        )
        counts |= {count for count in alike.values() if count > 1}
    return counts


def is_router(key: Key, N: int, followed: FollowOutputs, counts: set[int]) -> bool:
    """Whether the matrix `key` with N rows is a router of a block with one of these numbers of experts.

    More rows than experts (some that stand for no expert at all) are allowed where the experts' columns are ranked.
    """
    if key[1] is not None:
        return False  # an expert itself
    if key in followed.looked_up:
        return True
    choices = followed.choices.get(key, [])
    if N in counts:
        return bool(choices)
    return any(
        count < N <= 2 * count and choice.ranked and (N in choice.shape or count in choice.shape)
        for count in counts
        for choice in choices
    )
