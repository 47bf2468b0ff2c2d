"""GGUF files: keys and tensors of one, or of all shards of a model. No torch."""

import re
import stat
from dataclasses import replace
from pathlib import Path

from quantkit.checkpoint.gguf_header import FAULTY, GgufFile, GgufTensor, parse_gguf
from quantkit.errors import UserError

__all__ = ["GgufFile", "GgufTensor", "open_gguf", "read_gguf", "shard_path"]

SPLIT_KEYS = {"split.no": "u16", "split.count": "u16", "split.tensors.count": "i32"}
MIXED = "the shards belong to different models; fetch all of one model"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def read_gguf(path: Path) -> GgufFile:
    """Keys and tensors of one GGUF file (of a sharded model: of this shard alone).

    UserError for whatever is wrong with it: what, where, found, expected.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path}: not a file\nhint: name the .gguf file itself")
        with path.open("rb") as file:
            return parse_gguf(file, path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}\nhint: check that the file exists and can be read") from error


def open_gguf(path: Path) -> GgufFile:
    """A model in one GGUF file, or in all shards of which `path` is any one.

    UserError as `read_gguf`, for a set of shards that is not whole, and for a file that holds no model.
    """
    file = read_gguf(path)
    if file.metadata.get("split.count", 1) != 1 or file.metadata.get("split.no", 0) != 0:
        file = _join_shards(file)
    if not isinstance(file.metadata.get("general.architecture"), str):
        kind = file.metadata.get("general.type")
        holds = f"general.type is {kind!r}" if isinstance(kind, str) else "no key says what else it holds"
        raise UserError(
            f"{file.path}: not a model: it has no key `general.architecture` with a name; {holds}\n"
            "hint: name a model's .gguf file"
        )
    return file


def shard_path(folder: Path, stem: str, number: int, count: int) -> Path:
    """File of shard `number` (from 0 on) of `count`, as llama.cpp looks for it; a single file has no number."""
    return folder / (f"{stem}.gguf" if count == 1 else f"{stem}-{number + 1:05}-of-{count:05}.gguf")


def _join_shards(one: GgufFile) -> GgufFile:
    """All shards of the model that `one` is a shard of."""
    number, count, total = _split(one)
    name = _SHARD.fullmatch(one.path.name)
    if name is None or (int(name["number"]), int(name["count"])) != (number + 1, count):
        wanted = shard_path(Path(), "NAME", number, count)
        raise UserError(
            f"{one.path}: this is shard {number + 1} of {count} by its keys, expected a file name {wanted}\n"
            "hint: give the shards back the names they had; engines look for them by name"
        )
    files = []
    tensors: dict[str, GgufTensor] = {}
    for i in range(count):
        path = shard_path(one.path.parent, name["stem"], i, count)
        if not path.exists():
            raise UserError(f"{path}: missing, expected all {count} shards of the model\nhint: fetch it too")
        file = one if i == number else read_gguf(path)
        if _split(file) != (i, count, total):
            raise UserError(
                f"{path}: by its keys {_describe(*_split(file))}, expected {_describe(i, count, total)}, "
                f"as {one.path.name} says\nhint: {MIXED}"
            )
        twice = next((name for name in file.tensors if name in tensors), None)
        if twice is not None:
            raise UserError(
                f"{path}: tensor {twice!r} is in {tensors[twice].path.name} too, expected once\nhint: {MIXED}"
            )
        tensors |= file.tensors
        files.append(file)
    if len(tensors) != total:
        raise UserError(
            f"{files[0].path}: the {count} shards hold {len(tensors)} tensors, expected {total} (split.tensors.count)\n"
            f"hint: {MIXED}"
        )
    return replace(files[0], tensors=tensors)


def _split(file: GgufFile) -> tuple[int, int, int]:
    """Number of this shard (from 0 on), of shards, of tensors in all of them."""
    for key, kind in SPLIT_KEYS.items():
        found = file.metadata_types.get(key)
        if found != kind:
            raise UserError(
                f"{file.path}: the key {key} of a shard is {found or 'missing'}, expected {kind}\n"
                "hint: this file is no shard of the model; fetch all shards of one model"
            )
    number, count, total = (file.metadata[key] for key in SPLIT_KEYS)
    if not 0 <= number < count or total < 0:
        raise UserError(
            f"{file.path}: split.no is {number} and split.count {count}, split.tensors.count {total}, "
            f"expected a number below the count\nhint: {FAULTY}"
        )
    return number, count, total


def _describe(number: int, count: int, total: int) -> str:
    return f"shard {number + 1} of {count} of a model with {total} tensors"
