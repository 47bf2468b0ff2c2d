"""Which matrices of a block turn with the residual stream, found by running it, and the proof that the block follows.

A rotation R of the hidden states is free where everything that reads them does so through a norm without weight
(it commutes with R) and everything that is added to them is linear: then block'(x R) = block(x) R with

    readers  W diag(norm) R     norms  1     writers  R^T W     and per head, h a rotation: v  h^T W,  o  W h

Nothing is looked up by name. A writer is a matrix whose output, changed by a vector, moves the block's output by a
multiple of that vector while every other product keeps its result. A pair of v and o is a proved fold whose readers
write to the residual and which stays exact under a rotation of each head. All of it is proved together in float64.

Shapes: H = hidden size, N = out features, K = in features, C = channels between v and o.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from quantkit.algorithms.rotation import SMALLEST, Rotation, apply_columns, apply_rows, rotation_of
from quantkit.errors import UserError
from quantkit.model.block_graph import BlockGraph
from quantkit.model.fold_search import Search, family
from quantkit.model.folds import CONTROL, PROOF, Reference, floating, relative_change, wide_parameters
from quantkit.model.matmul_tracing import Float64, LinearSite, TraceMatmuls, WeightKey, evaluation, without_cache

STRAIGHT = 1e-8  # of an output's change: how far it may be from a multiple of the vector that was added


@dataclass(frozen=True, eq=False)
class RotatedMatrix:
    """One matrix becomes rows^T W diag(norm) columns; where one of them is None it is left out.

    norm   path of the norm whose weight the columns absorb
    at     int64, the rows that `rows` turns; None: all
    """

    norm: str | None = None
    columns: Rotation | None = None
    rows: Rotation | None = None
    at: Tensor | None = None


@dataclass
class BlockRotation:
    """What turns in a block: matrices by site name, norms (path -> "norm" or "norm+1") that become neutral.

    heads   (v, o) that turn per head as well; notes: pairs that do not, with the reason
    error   largest relative change of the block's output, turned back, in the proof
    """

    sites: dict[str, RotatedMatrix] = field(default_factory=dict)
    norms: dict[str, str] = field(default_factory=dict)
    heads: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: float = 0.0


def find_rotation(
    block: nn.Module, graph: BlockGraph, args: tuple, kwargs: dict, rotation: Rotation, head_sizes: list[int]
) -> BlockRotation:
    """The turns of a filled block, proved on the arguments the model calls it with (hidden states first or by name).

    graph with its folds; head_sizes: sizes a head of v may have. UserError with the reason where the block's
    architecture does not allow it. Costs about four float64 runs of the block on the tokens given; one weight at a
    time is widened.
    """
    args, kwargs = without_cache(args, kwargs)
    generator = torch.Generator().manual_seed(0)
    small = {name for name, param in block.named_parameters() if param.dim() < 2}
    with evaluation(block), wide_parameters(block, small):
        search = Search(block, graph.matrices, args, kwargs, generator)
        found = BlockRotation()
        for name in _writers(search, rotation.size):
            found.sites[name] = RotatedMatrix(rows=rotation)
        _norms_and_readers(search, graph, rotation, found)
        _heads(search, graph, head_sizes, found)
        found.error = _prove(search, found, rotation)
    return found


def rotate_block(block: nn.Module, sites: Mapping[str, LinearSite], turns: BlockRotation) -> None:
    """Rewrite the block's matrices, biases and norms in place."""
    norms = _norm_weights(block, turns)
    for name, turn in turns.sites.items():
        view = sites[name].view(block)
        view.copy_(_turned(view, turn, norms))
    _turn_vectors(block, sites, turns)


def _turned(w_NK: Tensor, turn: RotatedMatrix, norms: Mapping[str, Tensor]) -> Tensor:
    w_NK = w_NK.to(torch.promote_types(w_NK.dtype, torch.float32))
    if turn.norm is not None:
        w_NK = w_NK * norms[turn.norm].to(w_NK)
    if turn.columns is not None:
        w_NK = apply_columns(w_NK, turn.columns)
    return w_NK if turn.rows is None else _turned_rows(w_NK, turn.rows, turn.at)


def _turned_rows(w: Tensor, rows: Rotation, at: Tensor | None) -> Tensor:
    if at is None:
        return apply_rows(w, rows)
    w, at = w.clone(), at.to(w.device)
    w[at] = apply_rows(w[at], rows).to(w.dtype)
    return w


def _turn_vectors(block: nn.Module, sites: Mapping[str, LinearSite], turns: BlockRotation) -> None:
    """Biases of what is written, and the norms, in place."""
    for name, turn in turns.sites.items():
        bias = sites[name].bias
        if bias is not None and turn.rows is not None:
            b_N = block.get_parameter(bias).data
            b_N.copy_(_turned_rows(b_N, turn.rows, turn.at))
    for path, kind in turns.norms.items():
        block.get_parameter(f"{path}.weight").data.fill_(neutral(kind))


def neutral(kind: str) -> float:
    """The weight of a norm that does not scale."""
    return 0.0 if kind == "norm+1" else 1.0


def _norm_weights(block: nn.Module, turns: BlockRotation) -> dict[str, Tensor]:
    """What each norm multiplies by, float32 or wider."""
    weights = {path: block.get_parameter(f"{path}.weight").data for path in turns.norms}
    wide = {path: w.to(torch.promote_types(w.dtype, torch.float32)) for path, w in weights.items()}
    return {path: w + 1 if turns.norms[path] == "norm+1" else w.clone() for path, w in wide.items()}


def _writers(search: Search, hidden_size: int) -> list[str]:
    """Every matrix whose output joins the residual stream; UserError where something lies between."""
    writers: list[str] = []
    reference = search.ordinary
    output = reference.outputs[0]
    ran = {product.name for product in reference.products}
    vector_H = torch.randn(hidden_size, generator=search.generator, dtype=torch.float64).to(output.device)
    vector_H *= output.norm() / vector_H.norm()
    for members in search.families.values():
        alive = {name for name in members if name in ran}
        if not alive or len(search.sites[members[0]].view(search.block)) != hidden_size:
            continue

        def on_product(name: str, x: Tensor, known: Tensor, alive: set[str] = alive) -> Tensor:
            return known + vector_H if name in alive else known

        change_MH = (_replay(search, reference, on_product) - output).reshape(-1, hidden_size)
        if change_MH.norm() <= STRAIGHT * vector_H.norm():
            continue
        part_M = change_MH @ vector_H / vector_H.dot(vector_H)
        if (change_MH - part_M[:, None] * vector_H).norm() > STRAIGHT * change_MH.norm():
            raise UserError(
                f"the output of {members[0]} passes a norm or another function before it joins the residual stream"
            )
        writers += members
    if not writers:
        raise UserError(f"no matrix with {hidden_size} outputs adds to the residual stream")
    return writers


def _replay(search: Search, reference: Reference, on_product: Callable[[str, Tensor, Tensor], Tensor]) -> Tensor:
    """The block's output where the result of each product is on_product(name, x, its result in the reference)."""
    expected = iter(reference.products)

    def answer(weight: WeightKey, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        known, name = next(expected, None), search.name_of(weight)
        if known is None or known.name != name or known.x_MK.numel() != x.numel():
            raise UserError(f"at {name} the block takes another path when its hidden states change")
        return on_product(name, x, known.result.clone())

    with Float64(), TraceMatmuls(search.block, answer):
        return floating(search.block(*reference.args, **reference.kwargs))[0]


def _norms_and_readers(search: Search, graph: BlockGraph, rotation: Rotation, found: BlockRotation) -> None:
    for fold in graph.folds:
        if fold.kind == "linear" or fold.channels != rotation.size:
            continue
        path = fold.producer
        if not _commutes(search, path, fold.kind, rotation):
            raise UserError(
                f"{path} does not commute with a rotation: it takes off the mean or adds a bias, as LayerNorm does; "
                "only norms that divide by the root mean square turn with the residual stream"
            )
        found.norms[path] = fold.kind
        for name in (*fold.consumers, *fold.routers):
            found.sites[name] = replace(found.sites.get(name, RotatedMatrix()), norm=path, columns=rotation)
    if not found.norms:
        reasons = "; ".join(f"{pair}: {reason}" for pair, reason in graph.rejected[:2])
        raise UserError(f"no norm over the hidden size hands its weight to the linears behind it ({reasons})")


def _commutes(search: Search, path: str, kind: str, rotation: Rotation) -> bool:
    """Whether norm(x R) = norm(x) R for this norm with a neutral weight."""
    module = search.norms[path]
    (inputs, _), *_ = search.ordinary.norms[path]
    with wide_parameters(module, {"weight"}), Float64():
        module.get_parameter("weight").data.fill_(neutral(kind))
        straight = module(*inputs)
        turned = module(apply_columns(inputs[0], rotation), *inputs[1:])
    return relative_change([turned], [apply_columns(straight, rotation)]) < PROOF


def _heads(search: Search, graph: BlockGraph, sizes: list[int], found: BlockRotation) -> None:
    """Add the rotation of each head to the pairs of v and o: folds into a writer that stay exact under it."""
    writers = {name for name, turn in found.sites.items() if turn.rows is not None}
    tried: set[str] = set()
    for fold in graph.folds:
        if fold.kind != "linear" or not set(fold.consumers) <= writers or family(fold.producer) in tried:
            continue
        tried.add(family(fold.producer))
        pair = f"{fold.producer} -> {', '.join(fold.consumers)}"
        for size in sizes:
            columns = torch.arange(fold.channels) if fold.columns is None else fold.columns.cpu()
            if fold.channels % size or not torch.equal(columns % size, torch.arange(len(columns)) % size):
                continue
            head = rotation_of(size, seed=1, smallest=1)
            turns = {fold.producer: RotatedMatrix(rows=head.repeated(fold.channels // size), at=fold.rows)}
            turns |= {name: RotatedMatrix(columns=head.repeated(len(columns) // size)) for name in fold.consumers}
            output, _ = _run(search, BlockRotation(turns), search.ordinary, None)
            if head.block == 1 or relative_change([output], search.ordinary.outputs[:1]) >= PROOF:
                continue  # signs alone move through what a rotation does not: up into down, in an MLP
            if head.block < SMALLEST:
                found.notes.append(f"{pair}: not rotated, heads of {size} channels leave blocks of {head.block}")
                continue
            producer = found.sites.get(fold.producer, RotatedMatrix())
            found.sites[fold.producer] = replace(producer, rows=turns[fold.producer].rows, at=fold.rows)
            for name in fold.consumers:
                found.sites[name] = replace(found.sites[name], columns=turns[name].columns)
                found.heads.append((fold.producer, name))
                break


def _prove(search: Search, turns: BlockRotation, rotation: Rotation) -> float:
    """How far block'(x R) is from block(x) R; UserError where it is not the same, or would be without the writers."""
    reference = search.ordinary
    expected = apply_columns(reference.outputs[0], rotation)
    half = {name: replace(turn, rows=None) for name, turn in turns.sites.items()}
    output, _ = _run(search, BlockRotation(half, turns.norms), reference, rotation)
    if relative_change([output], [expected]) < CONTROL:
        raise UserError("its output does not depend on what the linears write, so nothing is proved")
    output, first = _run(search, turns, reference, rotation)
    error = relative_change([output], [expected])
    if not error < PROOF:
        where = f", first seen in the result of {first}" if first else ""
        raise UserError(f"rotating the residual stream changes its output by {error:.1e}{where}")
    return error


def _run(
    search: Search, turns: BlockRotation, reference: Reference, rotation: Rotation | None
) -> tuple[Tensor, str | None]:
    """The block's output with its weights turned, for hidden states turned by `rotation`, in float64.

    And the first reader of them whose result is not the reference's. One weight at a time is turned, in a copy.
    """
    block, sites = search.block, search.sites
    args, kwargs = reference.args, dict(reference.kwargs)
    if rotation is not None and args:
        args = (apply_columns(args[0], rotation), *args[1:])
    elif rotation is not None:
        kwargs["hidden_states"] = apply_columns(kwargs["hidden_states"], rotation)
    vectors = {f"{path}.weight" for path in turns.norms}
    vectors |= {bias for name in turns.sites if (bias := sites[name].bias) is not None}
    norms = _norm_weights(block, turns)
    known = iter(reference.products)
    first: str | None = None

    def on_product(weight: WeightKey, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        nonlocal first
        name, before = search.name_of(weight), next(known, None)
        turn = turns.sites.get(name)
        if turn is None:
            result = run(x)
        else:
            w_NK = _turned(sites[name].view(block).double(), turn, norms)
            result = x @ w_NK.t() + run(x.new_zeros(1, x.shape[-1]))[0]  # the bias, where it is added in the product
        if first is None and (turn is None or turn.rows is None):
            same = before is not None and before.name == name and before.result.shape == result.shape
            if not (same and before is not None and relative_change([result], [before.result]) < CONTROL):
                first = name
        return result

    with wide_parameters(block, vectors), Float64(), TraceMatmuls(block, on_product):
        _turn_vectors(block, sites, turns)
        return floating(block(*args, **kwargs))[0], first
