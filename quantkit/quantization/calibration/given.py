"""Calibration data given from Python -> text rows or token sequences. Everything that is neither is one UserError."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import UserError
from quantkit.quantization.calibration.json_rows import Row

TAKEN = (
    "a path or a data set's name, a list of texts, a list of chats (each a list of {role, content}), "
    "a datasets.Dataset, a DataLoader or an iterable of token id tensors or of dicts with input_ids"
)


@dataclass(frozen=True, slots=True)
class GivenRows:
    """Rows like those of a file, read once."""

    name: str
    rows: Iterable[Row]


@dataclass(frozen=True, slots=True)
class GivenTokens:
    """Token sequences without padding, read once.

    whole: all of them are meant, they came as one tensor; stream: it is one sequence, to be cut into windows
    """

    name: str
    sequences: Iterator[list[int]]
    whole: bool = False
    stream: bool = False


Given = GivenRows | GivenTokens


def given(calibration: object) -> str | Given:
    """What a caller's calibration data is: a path or name for the recipe's `calibration.data`, rows or tokens.

    Tensors are integers, [seq] or [batch, seq]; a dict holds input_ids and perhaps attention_mask, where padding is 0
    and is cut off. An iterable is read once, and no further than needed: it may be infinite.
    UserError for anything else; what only shows in a later item is raised when that is read.
    """
    if isinstance(calibration, str | Path):
        if not str(calibration).strip():
            raise UserError(f"calibration: an empty text names nothing\nhint: give {TAKEN}")
        return str(calibration)
    if isinstance(calibration, Mapping) and "input_ids" in calibration:
        return GivenTokens("token ids", _sequences(calibration, "calibration"), whole=True)
    if isinstance(calibration, Tensor) or _is_array(calibration):
        tensor = _tensor(calibration, "calibration")
        return GivenTokens("token ids", _sequences(tensor, "calibration"), whole=True, stream=tensor.ndim == 1)
    if isinstance(calibration, Mapping):
        if not isinstance(calibration.get("train"), Iterable):
            raise _wrong("calibration", calibration)
        calibration = calibration["train"]  # a DatasetDict
    if not isinstance(calibration, Iterable):
        raise _wrong("calibration", calibration)
    iterator = iter(calibration)
    try:
        first = next(iterator)
    except StopIteration:
        raise UserError(f"calibration: it is empty, nothing can be read from it\nhint: give {TAKEN}") from None
    kind = type(calibration).__name__
    return _items(f"given {kind}", first, itertools.chain([first], iterator))


def _items(name: str, first: object, items: Iterator[Any]) -> Given:
    """Rows or tokens by what the first item is; a later one of another kind is an error when it is read."""
    if isinstance(first, str):
        return GivenRows(name, _rows(items, lambda item: {"text": item} if isinstance(item, str) else None, "a text"))
    if _is_chat(first):
        return GivenRows(name, _rows(items, lambda item: {"messages": item} if _is_chat(item) else None, "a chat"))
    if isinstance(first, Mapping) and "input_ids" not in first:
        if "role" in first and "content" in first:
            raise UserError(
                "calibration: one chat, a list of {role, content}, where a list of chats is expected\n"
                "hint: give [chat] for a single one"
            )
        return GivenRows(name, _rows(items, lambda item: dict(item) if isinstance(item, Mapping) else None, "a row"))
    if isinstance(first, int) and not isinstance(first, bool):
        return GivenTokens(name, _sequences(list(itertools.islice(items, 1 << 20)), "calibration"), stream=True)
    if isinstance(first, Mapping | Tensor | list | tuple) or _is_array(first):
        return GivenTokens(name, _all_sequences(items))
    raise _wrong("calibration item 0", first)


def _rows(items: Iterator[Any], row_of: Callable[[Any], dict[str, Any] | None], kind: str) -> Iterator[Row]:
    for number, item in enumerate(items):
        if (row := row_of(item)) is None:
            raise UserError(
                f"calibration item {number}: {kind} like the first one is expected, this is {_shown(item)}\n"
                "hint: give items of one kind"
            )
        yield f"calibration item {number}", row


def _all_sequences(items: Iterator[Any]) -> Iterator[list[int]]:
    for number, item in enumerate(items):
        yield from _sequences(item, f"calibration item {number}")


def _sequences(item: Any, place: str) -> Iterator[list[int]]:
    """The sequences of one item, without padding: a tensor or list [seq] or [batch, seq], a dict, or (tensor, ...)."""
    mask: Any = None
    if isinstance(item, Mapping):
        if "input_ids" not in item:
            raise UserError(f"{place}: no input_ids among {', '.join(map(str, item))}\nhint: give {TAKEN}")
        item, mask = item["input_ids"], item.get("attention_mask")
    elif isinstance(item, tuple) or (isinstance(item, list) and item and isinstance(item[0], Tensor)):
        if not item:
            raise _wrong(place, item)
        item = item[0]  # what a DataLoader makes of a TensorDataset
    if isinstance(item, list) and item and all(isinstance(row, list) for row in item):  # ragged rows are fine
        masks = [None] * len(item) if mask is None else mask
        for row, row_mask in zip(item, masks, strict=True):
            yield from _cut(_tensor(row, place), row_mask, place)
        return
    yield from _cut(_tensor(item, place), mask, place)


def _cut(ids: Tensor, mask: Any, place: str) -> Iterator[list[int]]:
    """The rows of ids [seq] or [batch, seq] where the mask of the same shape is not 0; it must be one run in each."""
    if mask is None:
        yield from ids.reshape(-1, ids.shape[-1]).tolist()
        return
    mask = torch.as_tensor(mask).cpu()
    if mask.shape != ids.shape:
        raise UserError(
            f"{place}: attention_mask {list(mask.shape)} must have the shape of input_ids {list(ids.shape)}\n"
            "hint: give the two of one tokenizer call"
        )
    rows = zip(ids.reshape(-1, ids.shape[-1]), mask.reshape(-1, ids.shape[-1]) != 0, strict=True)
    for row, real in rows:
        where = real.nonzero().flatten()
        if len(where) and int(where[-1] - where[0]) + 1 != len(where):
            raise UserError(
                f"{place}: the attention_mask has zeros between ones: what is left is no text the model would see\n"
                "hint: pad at one end, or give sequences without padding"
            )
        if len(where):
            yield row[where].tolist()


def _tensor(item: Any, place: str) -> Tensor:
    """int64 on the CPU, [seq] or [batch, seq] with at least one token; UserError for anything else."""
    try:
        ids = torch.as_tensor(item).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise _wrong(place, item) from None
    if ids.numel() == 0:
        raise UserError(f"{place}: no token ids in it, shape {list(ids.shape)}\nhint: give {TAKEN}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        kind = str(ids.dtype).removeprefix("torch.")
        raise UserError(f"{place}: {kind} numbers {list(ids.shape)}, where integer token ids are expected")
    if ids.ndim not in (1, 2):
        raise UserError(f"{place}: token ids {list(ids.shape)}, where [seq] or [batch, seq] is expected")
    return ids.long()


def _is_chat(item: object) -> bool:
    keys = ({"role", "content"}, {"from", "value"})
    return (
        isinstance(item, list)
        and bool(item)
        and all(isinstance(turn, Mapping) and any(names <= set(turn) for names in keys) for turn in item)
    )


def _is_array(item: object) -> bool:
    return type(item).__module__ == "numpy" and hasattr(item, "shape")


def _shown(item: object) -> str:
    shape = list(item.shape) if isinstance(item, Tensor) else ""
    return f"{type(item).__name__} {shape}".strip()


def _wrong(place: str, item: object) -> UserError:
    return UserError(f"{place}: {_shown(item)} is no calibration data\nhint: give {TAKEN}")
