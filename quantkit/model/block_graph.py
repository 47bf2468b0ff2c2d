"""The graph of one decoder block, found by running it: its weight matrices, which of them share an input, what folds.

No architecture is named anywhere. The block runs once on a small batch under `Products`; a fused 3-D parameter of
experts is one site per expert. An expert no token reached takes its place from its siblings.

Shapes: M = tokens, N = out features, K = in features.
"""

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import UserError
from quantkit.model.block_trial import (
    structure_key,
)
from quantkit.model.every_expert import every_token
from quantkit.model.fold_search import family, find_folds, transplant
from quantkit.model.folds import Fold, scale_consumers, scale_producer
from quantkit.model.matmul_tracing import LinearSite, TraceMatmuls, WeightKey, evaluation, without_cache
from quantkit.model.routing import FollowOutputs, expert_counts, is_router

__all__ = [
    "BlockGraph",
    "Fold",
    "LinearSite",
    "apply_fold",
    "capture_inputs",
    "matrices_of",
    "run_until",
    "structure_key",
    "trace_block",
]

FEWEST_OUTPUTS = 8  # a gate of one output and its like: nothing to win, and no engine packs it
FEWEST_INPUTS = 8  # coefficients of a few numbers: no group size divides them, and a scale takes as much as it saves


@dataclass
class BlockGraph:
    """What a block is made of. Site names are unique within it, and hold for every block of the same `structure_key`.

    sites     to be quantized; by execution order of their stages
    inputs    groups of site names that read the very same tensor; index = the group index of `capture_inputs`
    stages    groups that do not depend on one another, in order: the experts of a layer, else one group each
    folds     proved; rejected: (producer -> reader, reason)
    every_token  whether `capture_inputs` shows experts in one parameter all tokens, not those that are sent to them
    skipped   (name, reason) of matrices that are not quantized; routers: those of them that run, as sites
    """

    sites: list[LinearSite]
    inputs: list[tuple[str, ...]]
    stages: list[tuple[int, ...]]
    folds: list[Fold] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    routers: list[LinearSite] = field(default_factory=list)
    every_token: bool = False

    def site(self, name: str) -> LinearSite:
        """The site or router of this name."""
        return self.matrices[name]

    @property
    def matrices(self) -> dict[str, LinearSite]:
        """Sites and routers by name."""
        return {site.name: site for site in (*self.sites, *self.routers)}

    def group_of(self, name: str) -> int:
        """Index of the input group that holds this site."""
        return next(index for index, names in enumerate(self.inputs) if name in names)

    def stage_of(self, group: int) -> tuple[int, ...]:
        """The stage that holds this input group."""
        return next(stage for stage in self.stages if group in stage)


def trace_block(block: nn.Module, args: tuple, kwargs: dict, *, folds: bool = True, seed: int = 0) -> BlockGraph:
    """Run the block on a small batch (8 tokens or more, as the model passes it) and read its graph.

    With folds=True also find and prove folds, in float64: see `find_folds` for what that costs. The block's own
    parameters are as they were afterwards. UserError if no weight matrix is found.
    """
    args, kwargs = without_cache(args, kwargs)
    with evaluation(block):
        graph = _Trace(block, args, kwargs).graph()
    if not graph.sites:
        raise UserError(f"{type(block).__name__} runs no matrix product with a weight of its own: nothing to quantize")
    if folds:
        names = {site.name for site in graph.sites}
        graph.folds, graph.rejected = find_folds(block, graph.matrices, names, args, kwargs, seed=seed)
    return graph


def matrices_of(block: nn.Module, reason: str, seen: Collection[str] = ()) -> list[tuple[str, str]]:
    """(name, reason) of every parameter of 2 or 3 dimensions but those seen; {shape} in the reason is filled in."""
    return [
        (name.removesuffix(".weight"), reason.format(shape=list(param.shape)))
        for name, param in block.named_parameters()
        if param.dim() in (2, 3) and name not in seen
    ]


def apply_fold(block: nn.Module, graph: BlockGraph, fold: Fold, scale_C: Tensor) -> None:
    """Divide the producer's channels by scale_C [fold.channels] and multiply its readers' columns, in place."""
    if scale_C.shape != (fold.channels,):
        raise ValueError(f"{fold.producer}: scale has shape {tuple(scale_C.shape)}, expected {(fold.channels,)}")
    matrices = graph.matrices
    scale_producer(block, matrices, fold, scale_C)
    scale_consumers(block, matrices, fold, scale_C)


class _StopError(Exception):
    """Ends a forward early; never leaves `capture_inputs`."""


@contextmanager
def capture_inputs(
    block: nn.Module, graph: BlockGraph, callback: Callable[[int, Tensor], None], *, until: int | None = None
) -> Iterator[None]:
    """Inside, every run of the block calls callback(group, x_MK) once per input group, just before its first product.

    x_MK is [tokens, K], float32 or wider, not a copy where it need not be: do not write to it. Experts without a token
    are not called. With until=group the run ends as soon as all groups of that group's stage were seen, and so does the
    `with` body: run the block once in it, or use `run_until`. Weights may be written in place, not replaced.
    """
    group_of = {
        (site.param, site.index): graph.group_of(site.name) for site in graph.sites
    }  # fixed here: one dict look-up per product
    seen: set[int] = set()
    stage = () if until is None else graph.stage_of(until)

    def on_product(weight: WeightKey, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        group = group_of.get((weight.param, weight.index))
        if group is not None and group not in seen:
            x_MK = x.detach().reshape(-1, x.shape[-1])
            if weight.index is not None and not bool((routed_M := x_MK.any(1)).all()):
                x_MK = x_MK[routed_M]  # models that hand every expert every token hand it zeros where it has no part
            if not len(x_MK):
                return run(x)
            seen.add(group)
            callback(group, x_MK.to(torch.promote_types(x_MK.dtype, torch.float32)))
            if stage == (group,):
                raise _StopError
        return run(x)

    def stop(*_: Any) -> None:
        raise _StopError

    handles = [block.register_forward_pre_hook(lambda *_: seen.clear())]
    if len(stage) > 1:
        owner = common_module(block, [graph.site(name) for group in stage for name in graph.inputs[group]])
        handles.append(owner.register_forward_hook(stop))
    try:
        stacks = {site.param for site in graph.sites if site.index is not None and graph.every_token}
        with every_token(block, stacks), TraceMatmuls(block, on_product):
            yield
    except _StopError:
        pass
    finally:
        for handle in handles:
            handle.remove()


def run_until(
    block: nn.Module,
    graph: BlockGraph,
    args: tuple,
    kwargs: dict,
    callback: Callable[[int, Tensor], None],
    until: int | None = None,
) -> Any:
    """One run of the block under `capture_inputs`; its output, or None where `until` cut it short."""
    output = None
    with capture_inputs(block, graph, callback, until=until):
        output = block(*args, **kwargs)
    return output


def common_module(block: nn.Module, sites: Iterable[LinearSite]) -> nn.Module:
    """The innermost module that runs all of these sites."""
    paths = [site.param.split(".")[:-1] for site in sites]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    while isinstance(block.get_submodule(".".join(shared)), nn.ModuleList):  # a list is never called
        shared.pop()
    return block.get_submodule(".".join(shared))


class _Trace:
    """One plain run of a block, and what can be read off it."""

    def __init__(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        self.block, self.args, self.kwargs = block, args, kwargs
        self.weights: dict[tuple[str, int | None], WeightKey] = {}
        self.read: dict[tuple[str, int | None], list[Hashable]] = {}  # which inputs each weight met, in order
        self.inputs: dict[tuple[str, int | None], Tensor] = {}
        self.side_by_side: dict[frozenset, bool] = {}
        self.alive: list[Any] = []  # tensors stay alive during the run, or their addresses would be used again
        self.followed = FollowOutputs(block)
        with self.followed, TraceMatmuls(block, self.on_product):
            block(*args, **kwargs)
        self.followed.release()
        del self.alive
        fused = {param for param, index in self.weights if index is not None}
        self.experts = expert_counts(block, self.followed.parts, fused)

    def on_product(self, weight: WeightKey, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        key = (weight.param, weight.index)
        self.weights.setdefault(key, weight)
        version = 0 if x.is_inference() else x._version
        tensor = (x.data_ptr(), x.numel(), x.shape[-1], x.stride(-1), x.dtype, version)
        self.read.setdefault(key, []).append(tensor)
        self.inputs.setdefault(key, x.clone())
        result = run(x)
        self.alive += [x, result]
        self.followed.tag(result, key)
        return result

    def graph(self) -> BlockGraph:
        matrices = {key: self.make_site(weight) for key, weight in self.weights.items()}
        skipped: list[tuple[str, str]] = []
        routers: list[LinearSite] = []
        grouped: dict[Hashable, list[str]] = {}
        kept: dict[str, LinearSite] = {}
        for key, site in matrices.items():
            reason = self.reason_to_skip(key, site)
            if reason is not None:
                skipped.append((site.name, reason))
                routers.append(site)
                continue
            kept[site.name] = site
            grouped.setdefault(self.read[key][0], []).append(site.name)
        groups = [tuple(names) for names in grouped.values()]
        self.add_siblings(kept, groups)
        skipped += self.never_run({site.param for site in (*kept.values(), *routers)})

        families: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        for names in groups:
            families.setdefault(tuple(family(name) for name in names), []).append(names)
        stages: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        for names in groups:
            alike = tuple(family(name) for name in names)
            together = len(families[alike]) > 1 and self.independent([kept[n] for g in families[alike] for n in g])
            stages.setdefault(alike if together else names, []).append(names)
        for members in stages.values():
            members.sort(key=lambda names: [int(part) for part in names[0].split(".") if part.isdigit()])
        inputs = [names for members in stages.values() for names in members]
        index = {names: i for i, names in enumerate(inputs)}
        return BlockGraph(
            sites=[kept[name] for names in inputs for name in names],
            inputs=inputs,
            stages=[tuple(index[names] for names in members) for members in stages.values()],
            skipped=skipped,
            routers=routers,
        )

    def independent(self, sites: list[LinearSite]) -> bool:
        """Whether no site's input depends on what the others compute: experts run side by side, layers do not."""
        keys = frozenset((site.param, site.index) for site in sites)
        if keys not in self.side_by_side:
            same = True

            def on_product(weight: WeightKey, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
                nonlocal same
                key = (weight.param, weight.index)
                if key not in keys:
                    return run(x)
                same = same and key in self.inputs and torch.equal(x, self.inputs[key])
                return run(x) * 2

            with TraceMatmuls(self.block, on_product):
                self.block(*self.args, **self.kwargs)
            self.side_by_side[keys] = same
        return self.side_by_side[keys]

    def make_site(self, weight: WeightKey) -> LinearSite:
        path, _, leaf = weight.param.rpartition(".")
        owner = self.block.get_submodule(path)
        name = path if leaf == "weight" and weight.index is None else weight.param
        name = name if weight.index is None else f"{name}.{weight.index}"
        bias = getattr(owner, "bias", None) if leaf == "weight" and weight.index is None else None
        param = self.block.get_parameter(weight.param)
        N = param.shape[-1] if weight.transposed else param.shape[-2]
        has_bias = isinstance(bias, nn.Parameter) and bias.shape == (N,)
        return LinearSite(
            name,
            weight.param,
            weight.index,
            weight.transposed,
            type(owner).__name__,
            f"{path}.bias" if has_bias else None,
        )

    def reason_to_skip(self, key: tuple[str, int | None], site: LinearSite) -> str | None:
        N = len(site.view(self.block))
        if is_router(key, N, self.followed, self.experts):
            return f"router: its {N} outputs are ranked to choose experts"
        if N < FEWEST_OUTPUTS:
            return f"only {N} outputs: nothing to win"
        if (K := site.view(self.block).shape[1]) < FEWEST_INPUTS:
            return f"only {K} inputs: nothing to win"
        if len(set(self.read[key])) > 1:
            return f"runs on {len(set(self.read[key]))} different inputs in one block"
        return None

    def add_siblings(self, kept: dict[str, LinearSite], groups: list[tuple[str, ...]]) -> None:
        """Experts no trial token reached: the same place in the graph as a sibling that differs by an index only."""
        models = {family(name): names for names in groups for name in names}
        modules = [
            (name, None)
            for name, param in self.block.named_parameters()
            if param.dim() == 2 and name.endswith(".weight") and family(name.removesuffix(".weight")) in models
        ]
        fused = [
            (site.param, e)
            for site in list({s.param: s for s in kept.values() if s.index is not None}.values())
            for e in range(len(self.block.get_parameter(site.param)))
        ]
        for param, index in (*modules, *fused):
            if (param, index) in self.weights:
                continue
            name = param.removesuffix(".weight") if index is None else f"{param}.{index}"
            names = models[family(name)]
            like = next(kept[other] for other in names if family(other) == family(name))
            shape = self.block.get_parameter(like.param).shape
            if self.block.get_parameter(param).shape != shape:
                continue
            kept[name] = self.make_site(WeightKey(param, index, like.transposed))
            group = tuple(transplant(other, like.name, name) for other in names)
            if group not in groups:
                groups.append(group)

    def never_run(self, seen: set[str]) -> list[tuple[str, str]]:
        return matrices_of(self.block, "no matrix product of the trial run reads it (shape {shape})", seen)
