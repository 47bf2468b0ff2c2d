"""Read a Hugging Face model folder tensor by tensor, with nothing left resident and nothing trusted.

Tensors are read with pread into memory of their own: mapped pages would count as resident for as long as the map lives.
torch is imported with the first tensor; names, shapes and raw bytes come without it.
"""

import hashlib
import os
from collections.abc import Iterator
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint.header import DAMAGED, DTYPES, TensorInfo, read_header, read_json, tag_of, torch_dtype
from quantkit.checkpoint.model_folder import check_inside, check_model_folder, check_names, not_a_model
from quantkit.checkpoint.rawio import as_bytes, copy_range, fill, fresh, opened, read_into, write_at
from quantkit.errors import UserError
from quantkit.paths import user_path

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SAMPLE = 64 << 10  # bytes hashed at the start, in the middle and at the end of a tensor


class Checkpoint:
    """A model folder: `config` (config.json) and `tensors` (name -> TensorInfo, by name); weights stay on disk."""

    def __init__(self, folder: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> None:
        self.folder, self.config = folder, config
        self.tensors = dict(sorted(tensors.items()))

    @classmethod
    def open(cls, folder: str | Path) -> "Checkpoint":
        """Read config.json and every header; UserError naming file and remedy for whatever is wrong with them."""
        folder = user_path(folder)
        check_model_folder(folder)
        config = read_json(folder / "config.json", "a model folder needs one")
        tensors = _find_tensors(folder)
        check_names(folder, tensors)
        return cls(folder, config, tensors)

    @cached_property
    def dtype(self) -> "torch.dtype":
        """The floating dtype that holds most of the bytes: what the model counts as being stored in."""
        held = {"F32": 0}
        for info in self.tensors.values():
            if info.is_float:
                held[info.tag] = held.get(info.tag, 0) + info.nbytes
        return torch_dtype(max(held, key=lambda tag: held[tag]))

    def info(self, name: str) -> TensorInfo:
        """TensorInfo of a tensor; UserError where there is none of that name."""
        if name not in self.tensors:
            raise UserError(f"{self.folder}: no tensor named {name}")
        return self.tensors[name]

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes [start, stop) of a tensor, of a safetensors file without torch."""
        info = self.info(name)
        if info.pickled:
            return bytes(as_bytes(_load_pickled(info.file)[name].contiguous())[start:stop])
        view = memoryview(bytearray((info.nbytes if stop is None else stop) - start))
        with opened(info.file) as fd:
            fill(fd, view, info.start + start, info.file)
        return bytes(view)

    def read(self, name: str) -> "Tensor":
        """The tensor, in memory of its own, contiguous, on the CPU."""
        import torch

        info = self.info(name)
        if info.pickled:
            return _load_pickled(info.file)[name].clone(memory_format=torch.contiguous_format)
        raw = fresh(info.nbytes)
        with opened(info.file) as fd:
            read_into(fd, raw, info.start, info.file)
        return raw.view(info.dtype).reshape(info.shape)

    def rows(self, name: str, index: "Tensor") -> "Tensor":
        """tensor[index] for index int64 [R]: only those rows are read, one pread per run of neighbours."""
        import torch

        info = self.info(name)
        if not info.shape:
            raise ValueError(f"{name} has no rows")
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < info.shape[0]:
            raise UserError(f"{name}: rows {int(index.min())} to {int(index.max())} asked of {info.shape[0]}")
        if info.pickled:
            return _load_pickled(info.file)[name][index].contiguous()
        wanted, position = torch.unique(index.cpu(), sorted=True, return_inverse=True)
        row = info.nbytes // max(1, info.shape[0])
        raw = fresh(wanted.numel() * row)
        breaks = (wanted.diff() != 1).nonzero().flatten() + 1
        edges = [0, *breaks.tolist(), wanted.numel()]
        with opened(info.file) as fd:
            for first, last in pairwise(edges):
                if first < last:
                    start = info.start + int(wanted[first]) * row
                    read_into(fd, raw[first * row : last * row], start, info.file)
        table = raw.view(info.dtype).reshape(wanted.numel(), *info.shape[1:])
        if torch.equal(position, torch.arange(wanted.numel())):
            return table
        # float8 has no indexing kernels on every device, bytes do
        return table.view(torch.uint8).reshape(-1, max(row, 1))[position].view(info.dtype).reshape(-1, *info.shape[1:])

    def copy(self, name: str, fd: int, offset: int) -> None:
        """Copy the tensor's bytes to `offset` of the open file `fd`; OSError when that cannot be written."""
        info = self.info(name)
        if info.pickled:
            write_at(fd, self.read(name), offset)
            return
        with opened(info.file) as source:
            copy_range(source, info.start, fd, offset, info.nbytes, info.file)

    def fingerprint(self) -> str:
        """sha256 over config.json and each tensor's name, dtype, shape and bytes (of a large one three samples).

        Independent of how the tensors are spread over files.
        """
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for name, info in self.tensors.items():
            digest.update(f"\n{name} torch.{DTYPES[info.tag][0]} {info.shape} {info.nbytes}\n".encode())
            for sample in self._samples(name, info):
                digest.update(sample)
        return digest.hexdigest()

    def _samples(self, name: str, info: TensorInfo) -> Iterator[memoryview | bytes]:
        size = info.nbytes
        starts = [0] if size <= 3 * SAMPLE else [0, size // 2, size - SAMPLE]
        length = size if len(starts) == 1 else SAMPLE
        if info.pickled:
            raw = as_bytes(_load_pickled(info.file)[name].contiguous())
            yield from (raw[start : start + length] for start in starts)
            return
        with opened(info.file) as fd:
            for start in starts:
                yield os.pread(fd, length, info.start + start)


def _find_tensors(folder: Path) -> dict[str, TensorInfo]:
    """The weights transformers would load, by its order of preference."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        single, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if single.exists():
            return _file_tensors(single)
        if index.exists():
            return _indexed_tensors(folder, index)
    raise UserError(f"{folder}: {not_a_model(folder)}")


def _file_tensors(path: Path) -> dict[str, TensorInfo]:
    if path.suffix != ".bin":
        return read_header(path)
    tensors: dict[str, TensorInfo] = {}
    for name, tensor in _load_pickled(path).items():
        if (tag := tag_of(tensor.dtype)) is None:
            raise UserError(f"{path}: {name} is {tensor.dtype}, which safetensors files hold no equal of")
        tensors[name] = TensorInfo(tag, tuple(tensor.shape), path, 0, tensor.numel() * tensor.itemsize)
    return tensors


def _indexed_tensors(folder: Path, index: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(index, "").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{index}: no weight_map of tensor names to file names: {DAMAGED}")
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        path = folder / file
        check_inside(folder, path, f"{index} names {file!r}")
        if not path.is_file():
            raise UserError(f"{path}: {index.name} names this file, but it is missing; download it again")
        for name, info in _file_tensors(path).items():
            if name in tensors:
                raise UserError(f"{path}: {name} is also in {tensors[name].file.name}; one of the two files is stale")
            tensors[name] = info
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != folder / file:
            raise UserError(f"{folder / file}: {index.name} says {name} is here, but it is not: {DAMAGED}")
    return tensors


def _load_pickled(path: Path) -> "dict[str, Tensor]":
    """The tensors of a .bin file, lazily mapped; loaded again each time so that no pages stay resident."""
    import torch

    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            loaded = _load_legacy(path)
    except Exception as error:  # unpickling damaged bytes raises nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: torch.load(weights_only=True) refuses this file: {reason}; convert it to safetensors"
        ) from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: holds a {type(loaded).__name__}, not a dict of tensors; convert it to safetensors")
    return {name: tensor for name, tensor in loaded.items() if isinstance(tensor, torch.Tensor)}


@lru_cache(maxsize=1)
def _load_legacy(path: Path) -> Any:
    """A file from before torch 1.6: it cannot be mapped, so the whole of it is kept rather than read per tensor."""
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)
