"""Where each parameter of a model lies in its checkpoint, and under which checkpoint names a site's codes are written.

transformers renames tensors as it loads them and fuses some (the experts of a layer become one 3-D parameter). Its own
conversion tables are asked, not copied: each checkpoint tensor is sent through them as a `Symbol`, a shape that
remembers which part of which tensor lies where, so nothing is read or computed.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from quantkit.errors import UserError
from quantkit.model.matmul_tracing import LinearSite

Index = tuple[int | slice, ...]
T = TypeVar("T")
NO_MODULE = "no module's weight by its name, which no engine takes quantized"


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """param[where] = checkpoint[name][part], with its last two dimensions swapped first if transposed.

    where and part hold one entry per leading dimension that is cut; () is all of it.
    """

    name: str
    where: Index = ()
    part: Index = ()
    transposed: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """What this piece takes from its checkpoint tensor, a view."""
        return (tensor.mT if self.transposed else tensor)[self.part]


class ShapeTracer:
    """A tensor that is only a shape and the parts of checkpoint tensors that make it."""

    def __init__(self, shape: tuple[int, ...], boxes: list["Region"]) -> None:
        self.shape, self.boxes = torch.Size(shape), boxes

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...]) -> "ShapeTracer":
        box = Region(name, tuple((0, size) for size in shape), tuple((0, size, dim) for dim, size in enumerate(shape)))
        return cls(shape, [box])

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def contiguous(self) -> "ShapeTracer":
        return self

    def transpose(self, dim0: int, dim1: int) -> "ShapeTracer":
        order = list(range(len(self.shape)))
        order[dim0], order[dim1] = order[dim1], order[dim0]
        boxes = [
            replace(box, at=tuple(box.at[d] for d in order), cut=tuple(box.cut[d] for d in order)) for box in self.boxes
        ]
        return ShapeTracer(tuple(self.shape[d] for d in order), boxes)

    def narrow(self, dim: int, start: int, stop: int) -> "ShapeTracer":
        """Rows [start, stop) along dim."""
        boxes = []
        for box in self.boxes:
            low, high = max(box.at[dim][0], start), min(box.at[dim][1], stop)
            if low >= high:
                continue
            first, _, axis = box.cut[dim]
            offset = first - box.at[dim][0]
            boxes.append(box.with_dim(dim, (low - start, high - start), (low + offset, high + offset, axis)))
        return ShapeTracer((*self.shape[:dim], stop - start, *self.shape[dim + 1 :]), boxes)

    def shifted(self, dim: int, by: int) -> list["Region"]:
        return [box.with_dim(dim, (box.at[dim][0] + by, box.at[dim][1] + by), box.cut[dim]) for box in self.boxes]

    def unsqueeze(self, dim: int) -> "ShapeTracer":
        boxes = [
            replace(box, at=(*box.at[:dim], (0, 1), *box.at[dim:]), cut=(*box.cut[:dim], (0, 1, -1), *box.cut[dim:]))
            for box in self.boxes
        ]
        return ShapeTracer((*self.shape[:dim], 1, *self.shape[dim:]), boxes)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: dict | None = None) -> Any:
        """cat, stack, chunk, split and transpose are what conversions of plain checkpoints are made of."""
        kwargs = dict(kwargs or {})
        if func is torch.transpose:
            return args[0].transpose(*args[1:], *(kwargs[key] for key in ("dim0", "dim1") if key in kwargs))
        if func in (torch.cat, torch.stack):
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            parts = [part.unsqueeze(dim) for part in args[0]] if func is torch.stack else list(args[0])
            boxes, total = [], 0
            for part in parts:
                boxes += part.shifted(dim, total)
                total += part.shape[dim]
            shape = parts[0].shape
            return cls((*shape[:dim], total, *shape[dim + 1 :]), boxes)
        if func in (torch.chunk, torch.split):
            dim = kwargs.get("dim", args[2] if len(args) > 2 else 0)
            size, sizes = args[0].shape[dim], args[1]
            if isinstance(sizes, int):
                each = -(-size // sizes) if func is torch.chunk else sizes
                sizes = [min(each, size - start) for start in range(0, size, each)]
            stops = torch.tensor(sizes).cumsum(0).tolist()
            return tuple(args[0].narrow(dim, stop - length, stop) for stop, length in zip(stops, sizes, strict=True))
        raise NotImplementedError(f"{getattr(func, '__name__', func)} on checkpoint tensors")


@dataclass(frozen=True, slots=True)
class Region:
    """at: [start, stop) per dimension of the whole; cut: [start, stop, source dimension], -1 for one that was added."""

    name: str
    at: tuple[tuple[int, int], ...]
    cut: tuple[tuple[int, int, int], ...]

    def with_dim(self, dim: int, at: tuple[int, int], cut: tuple[int, int, int]) -> "Region":
        return replace(
            self, at=(*self.at[:dim], at, *self.at[dim + 1 :]), cut=(*self.cut[:dim], cut, *self.cut[dim + 1 :])
        )

    def piece(self, shape: torch.Size, source: tuple[int, ...]) -> TensorSlice:
        axes = [axis for _, _, axis in self.cut if axis >= 0]
        swapped = [*range(len(axes) - 2), len(axes) - 1, len(axes) - 2]
        if axes != sorted(axes) and axes != swapped:
            raise NotImplementedError(f"dimensions in the order {axes}")
        whole = [at == (0, size) for at, size in zip(self.at, shape, strict=True)]
        where = [
            start if axis < 0 else slice(start, stop)
            for (start, stop), (_, _, axis) in zip(self.at, self.cut, strict=True)
        ]
        part = [slice(start, stop) for start, stop, axis in self.cut if axis >= 0]
        uncut = [(s.start, s.stop) == (0, source[axis]) for s, axis in zip(part, axes, strict=True)]
        return TensorSlice(self.name, trimmed(where, whole), trimmed(part, uncut), axes != sorted(axes))


def trimmed(index: list, whole: list[bool]) -> Index:
    """The index without its trailing entries that take everything; whole ones before a cut become slice(None)."""
    last = max((i for i, all_of_it in enumerate(whole) if not all_of_it or isinstance(index[i], int)), default=-1)
    return tuple(
        slice(None) if whole[i] and isinstance(entry, slice) else entry for i, entry in enumerate(index[: last + 1])
    )


def weight_sources(model: nn.Module, checkpoint: Mapping[str, Any]) -> dict[str, list[TensorSlice]]:
    """For each parameter and persistent buffer of the model: the pieces of checkpoint tensors it is made of.

    checkpoint: name -> shape, or anything with a `.shape`. Tied parameters whose tensor is absent are left out.
    UserError naming the parameter if nothing in the checkpoint makes it, or if its conversion is one we cannot follow.
    """
    shapes = {name: tuple(getattr(value, "shape", value)) for name, value in checkpoint.items()}
    state: dict[str, Any] = model.state_dict()
    rename, by_pattern = _renaming(model, state)
    sources: dict[str, list[TensorSlice]] = {}
    pending: dict[str, WeightConverter] = {}
    for name in sorted(shapes, key=dot_natural_key):  # transformers' order: experts by number
        target, pattern = rename(name)
        if target not in state:
            continue
        if pattern is None:
            sources[target] = [TensorSlice(name)]
        else:
            if target not in pending:
                pending[target] = deepcopy(by_pattern[pattern])
            load: Any = partial(ShapeTracer.of, name, shapes[name])
            pending[target].collected_tensors[pattern].append(load)
    for target, converter in pending.items():
        sources |= converted(model, target, converter, shapes, state)
    check_sources(model, sources, shapes, state)
    return sources


def checkpoint_renaming(model: nn.Module) -> Callable[[str], str]:
    """The function that says which parameter of the model transformers makes a checkpoint's tensor part of, by name."""
    rename, _ = _renaming(model, model.state_dict())
    return lambda name: rename(name)[0]


def _renaming(
    model: nn.Module, state: dict[str, Any]
) -> tuple[Callable[[str], tuple[str, str | None]], dict[str, WeightConverter]]:
    """(checkpoint name -> parameter and the pattern of its conversion), and the conversions by pattern."""
    prefix = getattr(model, "base_model_prefix", "")
    mapping = get_model_conversion_mapping(model) if hasattr(model, "config") else []  # type: ignore[arg-type]
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}

    def rename(name: str) -> tuple[str, str | None]:
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        return target, pattern

    return rename, by_pattern


def converted(
    model: nn.Module, target: str, converter: WeightConverter, shapes: Mapping[str, tuple[int, ...]], state: Mapping
) -> dict[str, list[TensorSlice]]:
    """The pieces of every parameter one conversion makes."""
    try:
        made: dict[str, Any] = converter.convert(target, model=model, config=model.config)
        made = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        for name in made.keys() & state.keys():
            if made[name].shape != state[name].shape:
                raise UserError(
                    f"{name}: the checkpoint's tensors for it make {list(made[name].shape)}, the model wants "
                    f"{list(state[name].shape)}: some are missing, or config.json does not belong to these weights"
                )
        return {
            name: [box.piece(symbol.shape, shapes[box.name]) for box in symbol.boxes]
            for name, symbol in made.items()
            if name in state
        }
    except UserError:
        raise
    except (NotImplementedError, AttributeError, TypeError, ValueError) as error:
        operations = ", ".join(type(operation).__name__ for operation in converter.operations)
        raise UserError(f"{target}: cannot follow how transformers converts it ({operations}): {error}") from error


def check_sources(
    model: nn.Module, sources: Mapping[str, list[TensorSlice]], shapes: Mapping[str, tuple[int, ...]], state: Mapping
) -> None:
    """UserError for a parameter that has no source and is tied to none that has, and for a wrong shape."""
    first: dict[int, str] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        first.setdefault(id(param), name)
        if name in sources:
            first[id(param)] = name
    tied = {name: first[id(param)] for name, param in model.named_parameters(remove_duplicate=False)}
    also = getattr(model, "all_tied_weights_keys", None) or {}
    for name in state:
        others = (tied.get(name), also.get(name), *(a for a, b in also.items() if b == name))
        if name not in sources and not any(other in sources for other in others if other is not None):
            raise UserError(f"{name}: no tensor of the checkpoint makes this parameter of {type(model).__name__}")
    for name, pieces in sources.items():
        if len(pieces) == 1 and not pieces[0].where and not pieces[0].part and not pieces[0].transposed:
            found, expected = shapes[pieces[0].name], tuple(state[name].shape)
            if found != expected:
                raise UserError(
                    f"{pieces[0].name}: has shape {list(found)}, the model's {name} is {list(expected)}: "
                    "config.json does not belong to these weights"
                )


def assemble(pieces: Iterable[TensorSlice], out: Tensor, read: Callable[[str], Tensor]) -> Tensor:
    """Fill `out` (a parameter's shape and dtype) from its pieces, reading one checkpoint tensor at a time."""
    for piece in pieces:
        out[piece.where].copy_(piece.of(read(piece.name)))
    return out


def linear_names(sources: Mapping[str, list[TensorSlice]], prefix: str, site: LinearSite) -> list[tuple[str, slice]]:
    """The checkpoint modules a site's [N, K] weight is written as: (module name, its rows of N), in row order.

    prefix: the block's path in the model. One entry with all rows for a plain linear; gate and up for a fused expert.
    UserError where the checkpoint's tensor holds more than this weight and so cannot be replaced by it.
    """
    param = f"{prefix}.{site.param}" if prefix else site.param
    names: list[tuple[str, slice]] = []
    for piece in sources[param]:
        where = list(piece.where)
        stacked = False
        if site.index is not None:
            expert = where.pop(0) if where else slice(None)
            if isinstance(expert, int):
                if expert != site.index:
                    continue
            else:
                start, stop, _ = expert.indices(1 << 62)
                if not start <= site.index < stop:
                    continue
                stacked = True
        rows = where[1:2] if site.transposed else where[:1]
        columns = where[:1] if site.transposed else where[1:2]
        if site.index is not None and not stacked and piece.transposed != site.transposed:
            raise UserError(f"{piece.name}: {param} is multiplied the other way round than its experts are stored")
        if piece.part or any(cut != slice(None) for cut in columns):
            raise UserError(f"{piece.name}: holds more than {param}, so it cannot be written quantized on its own")
        name = piece.name.removesuffix(".weight")
        if stacked:  # all experts in one tensor: named one by one, as where they are kept apart
            stem, _, leaf = name.rpartition(".")
            name = f"{stem}.{site.index}.{leaf}"
        names.append((name, rows[0] if rows and isinstance(rows[0], slice) else slice(None)))
    if not names:
        raise UserError(f"{param}: the checkpoint has no tensor for {site.name}")
    return sorted(names, key=lambda item: item[1].start or 0)


def written_tensor(checkpoint: Mapping[str, T], name: str) -> T:
    """checkpoint's entry of the tensor that the quantized linear `name` replaces.

    UserError where it is one expert of many in a single tensor, which no output format can replace by itself.
    """
    if f"{name}.weight" in checkpoint:
        return checkpoint[f"{name}.weight"]
    stem, _, leaf = name.rpartition(".")
    stem, _, index = stem.rpartition(".")
    whole = next((n for n in (f"{stem}.{leaf}", f"{stem}.{leaf}.weight") if n in checkpoint), None)
    if index.isdigit() and whole is not None:
        raise UserError(
            f"{whole}: all experts of a layer in one tensor of the checkpoint {shape_of(checkpoint[whole])}cannot be "
            f"quantized yet; leave them as they are with ignore: ['re:.*{re.escape(stem.rpartition('.')[2])}.*']"
        )
    if name in checkpoint:
        raise UserError(f"{name}: {NO_MODULE}")
    raise UserError(f"{name}: the checkpoint holds no tensor {name}.weight that this linear could replace")


def shape_of(entry: Any) -> str:
    return f"{list(entry.shape)} " if hasattr(entry, "shape") else ""
