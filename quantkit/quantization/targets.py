"""What is done to each linear, resolved once before any work: which linears, on which grid, by which algorithm.

`resolve` follows from a recipe and shapes alone and is what `quantkit plan` calls too; `resolve_targets` finds the
shapes in a model that was traced.

Shapes: N = out features, K = in features.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quantkit.algorithms import ALGORITHMS
from quantkit.cache_spec import CacheSpec
from quantkit.checkpoint.header import TensorInfo, TensorLayout
from quantkit.errors import UserError
from quantkit.formats import FORMATS, holders
from quantkit.ggml_types import QUANTIZED
from quantkit.model.block_graph import BlockGraph
from quantkit.model.matmul_tracing import LinearSite
from quantkit.model.streamed_model import StreamedModel
from quantkit.model.weight_sources import NO_MODULE, linear_names, written_tensor
from quantkit.quantization.calibration.kv_scales import scale_layouts
from quantkit.quantization.dense_modules import Coverage, coverage, dense_modules, ignored_names
from quantkit.recipe.number_formats import Activations, CacheSide, KVCache, Weights
from quantkit.recipe.recipe import Recipe
from quantkit.types import BLOCK, ActivationSpec, KVSpec, Scheme, TensorSpec, block_spec

HEAD = -1  # in place of a block's number
FLOAT_SCALES = {"nvfp4": "e4m3", "mxfp4": "e8m0", "mxfp8": "e8m0"}  # all others are plain


def weight_spec(weights: Weights, columns: int | None = None) -> TensorSpec:
    """The format a recipe's `weights` stand for; columns: another group size than theirs."""
    element = "int" if weights.type == "int" else "float"
    size = weights.group_columns if columns is None else columns
    scale = FLOAT_SCALES.get(weights.type, "float")
    return TensorSpec(weights.bits, size, weights.symmetric, element, scale, weights.group_rows)  # type: ignore[arg-type]


def activation_spec(given: Activations | None) -> ActivationSpec | None:
    """The format a recipe's `activations` stand for."""
    if given is None:
        return None
    element, bits = ("int" if given.type == "int8" else "float"), 4 if given.type in ("nvfp4", "mxfp4") else 8
    size = {"nvfp4": 16, "mxfp4": 32, "mxfp8": 32}.get(given.type, -1 if given.group_size == "token" else BLOCK)
    scale = FLOAT_SCALES.get(given.type, "float")
    return ActivationSpec(bits, size, given.symmetric, element, scale, given.dynamic)  # type: ignore[arg-type]


def cache_spec(given: KVCache | None) -> CacheSpec | None:
    """The formats a recipe's `kv_cache` stands for."""
    if given is None:
        return None
    return CacheSpec(*(None if side is None else _kv_spec(side) for side in given.sides))


def _kv_spec(side: CacheSide) -> KVSpec:
    element, size = "float" if side.type == "fp8" else "int", side.group_size or -1
    return KVSpec(side.bits, element, side.scope, side.symmetric, size, side.packed, side.channels)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A weight matrix that a recipe may quantize: rows of a site of a block, by its name in the checkpoint."""

    name: str
    block: int
    site: LinearSite
    rows: slice
    shape: tuple[int, int]  # (N, K)
    dtype: torch.dtype
    limit: str | None  # why it cannot be quantized yet, where it cannot

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    def view(self, block: nn.Module) -> Tensor:
        """The live [N, K] weight inside its block."""
        return self.site.view(block)[self.rows]


@dataclass(frozen=True, slots=True)
class LinearTarget(Candidate):
    """A weight matrix and what is done to it."""

    weights: Weights
    activations: Activations | None
    scheme: Scheme
    scale_dtype: torch.dtype

    @property
    def spec(self) -> TensorSpec:
        return self.scheme.weights


@dataclass(frozen=True, slots=True)
class Targets:
    """Everything that is decided before any work.

    linears    what is quantized, in execution order per block
    skipped    (name, reason) of every matrix that is not: lines for the report
    ignored    names that the format's configuration declares dense
    notes      warnings for the report
    kv         the formats of the cache; kv_scales: what calibration finds for it, as tensors of each block: those of
               its keys, then those of its values
    extra      further tensors that the source lacks
    coverage   the share of the blocks' weights that is quantized; None where only a plan is made
    """

    linears: list[LinearTarget]
    skipped: list[tuple[str, str]]
    ignored: list[str]
    notes: list[str] = field(default_factory=list)
    kv: CacheSpec | None = None
    kv_scales: list[list[TensorLayout]] = field(default_factory=list)
    extra: list[TensorLayout] = field(default_factory=list)
    coverage: Coverage | None = None

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Module name -> scheme of what is quantized."""
        return {linear.name: linear.scheme for linear in self.linears}

    @property
    def stored_kv(self) -> KVSpec | None:
        """The format of the cache where the checkpoint's own format is to describe it: static scales."""
        shared = None if self.kv is None else self.kv.shared
        return None if shared is None or shared.per == "token" else shared

    def of_block(self, block: int) -> list[LinearTarget]:
        return [linear for linear in self.linears if linear.block == block]


@dataclass(frozen=True, slots=True)
class Resolved:
    """The part of Targets that a recipe and shapes alone decide."""

    linears: list[LinearTarget]
    skipped: list[tuple[str, str]]
    notes: list[str]
    kv: CacheSpec | None


def resolve_targets(
    recipe: Recipe,
    graphs: list[BlockGraph],
    streamed: StreamedModel,
    extra: list[TensorLayout],
    types: Mapping[str, str] | None = None,
    head: Iterable[Candidate] = (),
) -> Targets:
    """Resolve the recipe against every linear of a traced model.

    extra: tensors that a rotation adds to those of the source; types as in `resolve`; head: the head, if it may
    be. UserError naming every misfit.
    """
    stored = streamed.checkpoint.tensors | {layout.name: layout for layout in extra}
    candidates, never = traced_candidates(graphs, streamed, stored, head)
    found = resolve(recipe, candidates, never, types)
    kv_scales = []
    if found.kv is not None:
        kv_scales = scale_layouts(found.kv, FORMATS[recipe.output.format].KV_NAMES, streamed)
    share = coverage(streamed, {f"{linear.name}.weight" for linear in found.linears}, dict(found.skipped))
    return Targets(
        found.linears,
        found.skipped,
        ignored_names(dict(found.skipped), stored, {linear.name for linear in found.linears}),
        found.notes + share.warnings(),
        found.kv,
        kv_scales,
        extra,
        share,
    )


def traced_candidates(
    graphs: list[BlockGraph],
    streamed: StreamedModel,
    stored: Mapping[str, TensorInfo | TensorLayout],
    head: Iterable[Candidate] = (),
) -> tuple[list[Candidate], dict[str, str]]:
    """Every matrix of a traced model that could be quantized, and name -> reason of those that never can.

    stored: the tensors of the source and those that a rotation adds; head: the head, if it may be
    """
    candidates, reasons = _candidates(graphs, streamed)
    candidates += head
    return candidates, dense_modules(streamed.model, streamed.sources, stored, {c.name for c in candidates}, reasons)


def _candidates(graphs: list[BlockGraph], streamed: StreamedModel) -> tuple[list[Candidate], dict[str, str]]:
    """Every matrix of the blocks that could be quantized; path in the model -> reason of those that could not."""
    found = list[Candidate]()
    reasons = {
        path: "outside the decoder blocks"
        for path, module in streamed.model.named_modules()
        if isinstance(module, nn.Linear) and not path.startswith(streamed.path + ".")
    }
    for block, graph in enumerate(graphs):
        prefix = streamed.prefix(block)
        for site in graph.sites:
            for name, rows in linear_names(streamed.sources, prefix.rstrip("."), site):
                if name in streamed.checkpoint.tensors:
                    reasons[prefix + site.param] = NO_MODULE
                    continue
                try:
                    info = written_tensor(streamed.checkpoint.tensors, name)
                except UserError as refusal:  # irrelevant where the recipe leaves this matrix as it is
                    shape, dtype, limit = (
                        _own_shape(streamed, block, site, rows),
                        streamed.checkpoint.dtype,
                        str(refusal),
                    )
                else:
                    swapped = site.transposed and site.index is None
                    shape = (info.shape[1], info.shape[0]) if swapped else (info.shape[0], info.shape[1])
                    dtype, limit = info.dtype, None
                found.append(Candidate(name, block, site, rows, shape, dtype, limit))
        reasons |= {prefix + path: reason for path, reason in graph.skipped}
    return found, reasons


def _own_shape(streamed: StreamedModel, block: int, site: LinearSite, rows: slice) -> tuple[int, int]:
    """(N, K) of a site's rows by the model's parameter."""
    *_, first, second = streamed.blocks[block].get_parameter(site.param).shape
    N, K = (second, first) if site.transposed else (first, second)
    return len(range(N)[rows]), K


def resolve(
    recipe: Recipe,
    candidates: Iterable[Candidate],
    never: Mapping[str, str],
    types: Mapping[str, str] | None = None,
) -> Resolved:
    """What the recipe does to each candidate; never: name -> reason of the matrices no recipe can quantize.

    types: of a GGUF's tensors, by candidate.
    UserError for patterns without effect, and naming every misfit: group sizes that do not divide, schemes the format
    cannot hold, options that exclude each other.
    """
    candidates, format_ = list(candidates), FORMATS[recipe.output.format]
    if unmatched := recipe.unmatched({c.name: c.site.class_name for c in candidates}, never):
        raise UserError("\n".join(unmatched))
    kv = cache_spec(recipe.kv_cache)
    if kv is not None and kv.shared is not None and kv.shared.per != "token" and format_.KV_NAMES is None:
        raise UserError(f"output.format cannot hold the scales of a {kv} cache; compressed-tensors and modelopt can")
    linears, skipped, notes = list[LinearTarget](), list(never.items()), list[str]()
    misfits, refused = list[tuple[str, int, int]](), dict[str, str]()
    for candidate in candidates:
        name, (_, K) = candidate.name, candidate.shape
        of_head = candidate.block == HEAD
        weights = recipe.head_weights if of_head else recipe.weights_for(name, candidate.site.class_name)
        if weights is None:
            skipped.append((name, "the recipe says so"))
            continue
        if candidate.limit is not None:
            raise UserError(candidate.limit)
        if types is not None:
            if types[name] not in QUANTIZED:
                skipped.append((name, f"its type is {types[name]}"))
                continue
            spec = block_spec(types[name])
            if problem := _refusal(weights, Scheme(spec), candidate, recipe.output.format):
                refused.setdefault(problem, name)
                continue
            linears.append(_target(candidate, weights, None, Scheme(spec), torch.float32))
            continue
        spec, size = weight_spec(weights), weights.group_columns
        if size != -1 and K % size and spec.scale_rows == 1:
            if weights.on_misfit == "skip":
                skipped.append((name, f"group_size {size} does not divide {K} input features"))
                continue
            if spec.scale_format != "float":
                own = f"groups of {spec} always have {size} columns, which do not divide the {K} input features"
                refused.setdefault(f"{own}; set weights.on_misfit: skip, or another scheme for such linears", name)
                continue
            if weights.on_misfit == "error":
                misfits.append((name, K, size))
                continue
            fitting = -1 if weights.on_misfit == "channel" else smaller_group(K, size)
            uses = "channel" if fitting == -1 else fitting
            notes.append(f"{name}: group_size {size} does not divide {K}, uses {uses}")
            spec = weight_spec(weights, fitting)
        activations = None if of_head else recipe.activations_for(name, candidate.site.class_name)
        scheme = Scheme(spec, activation_spec(activations))
        if problem := _refusal(weights, scheme, candidate, recipe.output.format):
            refused.setdefault(problem, name)
            continue
        scale_dtype = format_.scale_dtype(scheme, candidate.dtype)
        linears.append(_target(candidate, weights, activations, scheme, scale_dtype))
    problems = [_misfit_message(misfits, len(candidates))] if misfits else []
    problems += [f"{message} ({name})" for message, name in refused.items()]
    if problems:
        raise UserError("\n".join(problems))
    if not linears:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped[:5])
        raise UserError(f"no linear is left to quantize ({reasons or 'none was found in the decoder blocks'})")
    return Resolved(linears, skipped, notes, kv)


def _target(
    candidate: Candidate,
    weights: Weights,
    activations: Activations | None,
    scheme: Scheme,
    scale_dtype: torch.dtype,
) -> LinearTarget:
    where = (candidate.name, candidate.block, candidate.site, candidate.rows, candidate.shape, candidate.dtype, None)
    return LinearTarget(*where, weights, activations, scheme, scale_dtype)


def _refusal(weights: Weights, scheme: Scheme, candidate: Candidate, format_name: str) -> str | None:
    """Why a scheme is not possible for a weight in this format, None where it is."""
    format_ = FORMATS[format_name]
    if reason := ALGORITHMS[weights.algorithm].refusal(weights.options.model_dump(), scheme.weights):
        return reason
    try:
        format_.layout(candidate.shape, scheme, format_.scale_dtype(scheme, candidate.dtype))
    except UserError as error:
        others = [other for other in holders(candidate.shape, scheme, candidate.dtype) if other != format_name]
        advice = f"; output.format {' or '.join(others)} can hold it" if others else "; no format can hold it"
        return f"output.format {format_name}: {error}{advice}"
    return None


def smaller_group(in_features: int, size: int) -> int:
    """The largest divisor of in_features below size that is at least 8, else one group per channel."""
    return next((g for g in range(size - 1, 7, -1) if in_features % g == 0), -1)


def _misfit_message(misfits: list[tuple[str, int, int]], total: int) -> str:
    widths = sorted({K for _, K, _ in misfits})
    size = misfits[0][2]
    common = [g for g in (256, 128, 64, 32, 16, 8) if all(K % g == 0 for K in widths)]
    names = ", ".join(f"{name} ({K})" for name, K, _ in misfits[:4]) + (", ..." if len(misfits) > 4 else "")
    advice = (
        f"group_size {' or '.join(map(str, common))} divides all of these; or"
        if common
        else "no usual group size divides these;"
    )
    return (
        f"weights.group_size {size} does not divide the input features of {len(misfits)} of {total} linears: {names}; "
        f"{advice} set weights.group_size: channel, or weights.on_misfit to channel, skip or smaller-group"
    )
