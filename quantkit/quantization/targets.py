"""What will be done, decided before any work: which linears, on which grid, by which algorithm, and the files' layout.

Everything here follows from headers, the recipe and one traced run of each distinct kind of block.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor, nn

from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.writer import TensorLayout
from quantkit.errors import UserError
from quantkit.formats import FORMATS, holders
from quantkit.model.block_graph import BlockGraph, LinearSite
from quantkit.model.streamed_model import StreamedModel
from quantkit.model.weight_sources import linear_names, written_tensor
from quantkit.recipe.algorithms import GptqOptions
from quantkit.recipe.number_formats import Activations, KVCache, Weights
from quantkit.recipe.recipe import Recipe
from quantkit.types import BLOCK, ActivationSpec, KVSpec, Scheme, TensorSpec

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


def kv_spec(given: KVCache | None) -> KVSpec | None:
    """The format a recipe's `kv_cache` stands for."""
    if given is None:
        return None
    element = "float" if given.type == "fp8" else "int"
    bits = 4 if given.type == "int4" else 8
    return KVSpec(bits, element, given.scope, given.symmetric, given.group_size or -1)


@dataclass(frozen=True, slots=True)
class LinearTarget:
    """One weight matrix as it is named in the checkpoint: rows of a site of a block, and what to do with it."""

    name: str
    block: int
    site: LinearSite
    rows: slice
    shape: tuple[int, int]
    weights: Weights
    activations: Activations | None
    scheme: Scheme
    scale_dtype: torch.dtype

    @property
    def spec(self) -> TensorSpec:
        return self.scheme.weights

    def view(self, block: nn.Module) -> Tensor:
        """The live [N, K] weight inside its block."""
        return self.site.view(block)[self.rows]


@dataclass(frozen=True, slots=True)
class Targets:
    """linears in execution order per block; skipped and notes are lines for the report.

    kv         the format of the cache
    kv_scales  the tensors of its static scales, two for each block; extra: others that the source lacks
    """

    linears: list[LinearTarget]
    skipped: list[tuple[str, str]]
    notes: list[str]
    kv: KVSpec | None = None
    kv_scales: list[TensorLayout] = field(default_factory=list)
    extra: list[TensorLayout] = field(default_factory=list)

    def of_block(self, block: int) -> list[LinearTarget]:
        return [linear for linear in self.linears if linear.block == block]


def resolve_targets(recipe: Recipe, graphs: list[BlockGraph], streamed: StreamedModel) -> Targets:
    """Resolve the recipe against every linear of the model; every misfit is reported in one UserError."""
    checkpoint, found = streamed.checkpoint, list[tuple[str, int, LinearSite, slice]]()
    skipped = [
        (name, "outside the decoder blocks")
        for name, module in streamed.model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(streamed.path + ".")
    ]
    for block, graph in enumerate(graphs):
        prefix = streamed.prefix(block)
        for site in graph.sites:
            found += [
                (name, block, site, rows) for name, rows in linear_names(streamed.sources, prefix.rstrip("."), site)
            ]
        skipped += [(prefix + path, reason) for path, reason in graph.skipped]
    classes = {name: site.class_name for name, _, site, _ in found} | {name: "Linear" for name, _ in skipped}
    unmatched = recipe.unmatched(classes)
    if unmatched:
        raise UserError("\n".join(unmatched))

    linears, notes, misfits, refused = [], [], [], dict[str, str]()
    format_ = FORMATS[recipe.output.format]
    for name, block, site, rows in found:
        weights = recipe.weights_for(name, site.class_name)
        if weights is None:
            skipped.append((name, "the recipe says so"))
            continue
        info = written_tensor(checkpoint.tensors, name)
        N, K = (info.shape[1], info.shape[0]) if site.transposed and site.index is None else info.shape
        size = weights.group_columns
        spec = weight_spec(weights)
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
            notes.append(
                f"{name}: group_size {size} does not divide {K}, uses {'channel' if fitting == -1 else fitting}"
            )
            spec = weight_spec(weights, fitting)
        options = weights.options
        if (
            isinstance(options, GptqOptions)
            and options.ranges == "updated"
            and (options.act_order or spec.scale_rows != 1)
        ):
            needs = "act_order: false" if options.act_order else f"a scale for each row, which {spec} has not"
            refused.setdefault(f"gptq: ranges: updated needs {needs}", name)
            continue
        activations = recipe.activations_for(name, site.class_name)
        scheme = Scheme(spec, activation_spec(activations))
        try:
            scale_dtype = format_.scale_dtype(scheme, info.dtype)
            format_.layout((N, K), scheme, scale_dtype)
        except UserError as error:
            others = [other for other in holders((N, K), scheme, info.dtype) if other != recipe.output.format]
            advice = f"; output.format {' or '.join(others)} can hold it" if others else "; no format can hold it"
            refused.setdefault(f"output.format {recipe.output.format}: {error}{advice}", name)
            continue
        linears.append(LinearTarget(name, block, site, rows, (N, K), weights, activations, scheme, scale_dtype))
    if misfits:
        raise UserError(_misfit_message(misfits, len(found)))
    if refused:
        raise UserError("\n".join(f"{message} ({name})" for message, name in refused.items()))
    if not linears:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped[:5])
        raise UserError(f"no linear is left to quantize ({reasons or 'none was found in the decoder blocks'})")
    return Targets(linears, skipped, notes, kv_spec(recipe.kv_cache))


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


def file_layout(checkpoint: Checkpoint, targets: Targets, format_: ModuleType) -> list[list[TensorLayout]]:
    """Every tensor of the output in the source's natural order; units (modules) are never cut by a shard."""
    quantized = {f"{linear.name}.weight": linear for linear in targets.linears}
    units: dict[str, list[TensorLayout]] = {}
    for name in sorted(checkpoint.tensors, key=_natural):
        info = checkpoint.tensors[name]
        unit = units.setdefault(name.rpartition(".")[0], [])
        if name in quantized:
            linear = quantized[name]
            for suffix, (dtype, shape) in format_.layout(linear.shape, linear.scheme, linear.scale_dtype).items():
                unit.append(TensorLayout(f"{linear.name}.{suffix}", dtype, shape))
        else:
            unit.append(TensorLayout(name, info.dtype, tuple(info.shape)))
    for layout in (*targets.kv_scales, *targets.extra):
        units.setdefault(layout.name.rpartition(".")[0], []).append(layout)
    return list(units.values())


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def output_bytes(units: Iterable[list[TensorLayout]]) -> int:
    """Bytes of tensor data the layout will hold."""
    return sum(_numel(t.shape) * t.dtype.itemsize for unit in units for t in unit)


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
