"""Importance matrices: what llama-imatrix gathers and llama-quantize reads, in both of their files. No torch.

For each weight tensor, by its GGUF name: the sum over tokens of x_k^2 of every input column k, and how many tokens that
were. A tensor of experts has both once for each. llama.cpp's older file (.dat) holds means instead, with one count for
all experts, in units of chunks.

Shapes: K = input features (ne0 of the tensor), M = matrices of the tensor: its experts, else 1.
"""

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from quantkit.checkpoint.gguf_file import GgufFile, GgufTensor, read_gguf
from quantkit.errors import RunError, UserError

if TYPE_CHECKING:
    from quantkit.checkpoint.gguf_writer import KeyValue

MAGIC = b"GGUF"
SUMS, COUNTS = ".in_sum2", ".counts"
DATASETS, CHUNKS, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
LONGEST_NAME = 1 << 12  # bytes of a name in a .dat: beyond all that llama.cpp takes
AGAIN = "hint: make it again with `quantkit imatrix` or llama-imatrix"


@dataclass(frozen=True, slots=True)
class ImatrixEntry:
    """sums float32 [M, K] of x^2; counts float32 [M], tokens behind each row (of a .dat: chunks, [1] for all rows)."""

    sums: NDArray[np.float32]
    counts: NDArray[np.float32]

    def importance(self) -> NDArray[np.float32]:
        """E[x^2] of each column, float32 [M, K]; ones for a matrix that no token reached, as llama-quantize has it."""
        counts = self.counts[:, None]
        return np.where(counts > 0, self.sums / np.where(counts > 0, counts, 1), 1).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Imatrix:
    """entries by GGUF tensor name; datasets: names of the text; chunks of chunk_size tokens each (0: not known)."""

    entries: Mapping[str, ImatrixEntry]
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_size: int = 0
    unreached: dict[str, int] = field(init=False, default_factory=dict)  # tensor -> experts that no token reached

    def __post_init__(self) -> None:
        for name, entry in self.entries.items():
            if missing := int((entry.counts == 0).sum()):
                self.unreached[name] = missing


def importance_of(imatrix: Imatrix, name: str, shape: tuple[int, ...] | None = None) -> NDArray[np.float32] | None:
    """E[x^2] of the columns of a tensor: float32 [K], or [M, K] for a tensor of experts; None where there is no entry.

    name   of the tensor in a GGUF; shape: its own, rows first: (N, K) or (M, N, K)
    UserError where the entry is for a tensor of another shape.
    """
    if name not in imatrix.entries:
        return None
    found = imatrix.entries[name].importance()
    if shape is not None:
        experts = shape[0] if len(shape) == 3 else 1
        if found.size != experts * shape[-1]:  # a .dat has all experts in one row
            raise UserError(
                f"imatrix: {name} has {found.size} values, the tensor {list(shape)} needs {experts} x {shape[-1]}\n"
                "hint: take the file that was made for this model"
            )
        found = found.reshape(experts, shape[-1])
        return found if len(shape) == 3 else found[0]
    return found[0] if len(found) == 1 else found


def used_keys(file: str, imatrix: Imatrix) -> "dict[str, KeyValue]":
    """The keys by which a quantized file says which importance matrix it was made with, as llama-quantize names them.

    file: its name, without folders.
    """
    keys: dict[str, KeyValue] = {"quantize.imatrix.file": ("string", file)}
    if imatrix.datasets:
        keys["quantize.imatrix.dataset"] = ("string", imatrix.datasets[0])
    keys["quantize.imatrix.entries_count"] = ("u32", len(imatrix.entries))
    if imatrix.chunks:
        keys["quantize.imatrix.chunks_count"] = ("u32", imatrix.chunks)
    return keys


def read_imatrix(path: Path) -> Imatrix:
    """An importance matrix of either form; which one, its first bytes say. UserError for whatever is wrong with it."""
    try:
        with path.open("rb") as file:
            found = _read_dat(file, path) if file.read(4) != MAGIC else None
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}\nhint: give a file of `quantkit imatrix` or llama-imatrix"
        ) from error
    found = found or _read_gguf(read_gguf(path))
    if not found.entries:
        raise UserError(f"{path}: no entries\n{AGAIN}")
    for name, entry in found.entries.items():
        _check(path, name, entry)
    return found


def write_imatrix(path: Path, imatrix: Imatrix) -> None:
    """Write a new file: .dat the older form, any other ending GGUF; whole, or not at all.

    UserError where `path` exists, RunError where it cannot be written. The same matrix gives the same bytes.
    """
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} exists and is never overwritten\nhint: choose another --output, or move it away")
    partial = path.with_name(path.name + ".partial")
    try:
        (_write_dat if path.suffix == ".dat" else _write_gguf)(partial, imatrix)
        partial.replace(path)
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


def _check(path: Path, name: str, entry: ImatrixEntry) -> None:
    problem = None
    with np.errstate(all="ignore"):  # a damaged file may divide by next to nothing
        finite = all(np.isfinite(values).all() for values in (entry.counts, entry.sums, entry.importance()))
    if not finite:
        problem = "a value is NaN or infinite"
    elif (entry.sums < 0).any() or (entry.counts < 0).any():
        problem = "a sum of squares or a count is negative"
    if problem is not None:
        raise UserError(f"{path}: {name}: {problem}\n{AGAIN}")


def _read_gguf(file: GgufFile) -> Imatrix:
    path, metadata = file.path, file.metadata
    if (kind := metadata.get("general.type")) != "imatrix":
        said = "a model" if kind in (None, "model") else repr(kind)
        raise UserError(f"{path}: this GGUF file is {said}, not an importance matrix\n{AGAIN}")
    missing = [key for key in (DATASETS, CHUNKS, CHUNK_SIZE) if key not in metadata]
    if missing:
        raise UserError(f"{path}: the key {missing[0]} is missing, without which llama.cpp refuses the file\n{AGAIN}")
    datasets, chunks, chunk_size = metadata[DATASETS], metadata[CHUNKS], metadata[CHUNK_SIZE]
    if not isinstance(datasets, list) or not all(isinstance(one, str) for one in datasets):
        raise UserError(f"{path}: {DATASETS} is not a list of names\n{AGAIN}")
    if not isinstance(chunks, int) or not isinstance(chunk_size, int):
        raise UserError(f"{path}: {CHUNKS} or {CHUNK_SIZE} is not a whole number\n{AGAIN}")
    sums = {name.removesuffix(SUMS): tensor for name, tensor in file.tensors.items() if name.endswith(SUMS)}
    counts = {name.removesuffix(COUNTS): tensor for name, tensor in file.tensors.items() if name.endswith(COUNTS)}
    for name in sorted(sums.keys() ^ counts.keys()):
        what = COUNTS if name in sums else SUMS
        raise UserError(f"{path}: {name} has no tensor {name}{what}\n{AGAIN}")
    entries = {name: _gguf_entry(name, sums[name], counts[name]) for name in sorted(sums)}
    return Imatrix(entries, tuple(datasets), chunks, chunk_size)


def _gguf_entry(name: str, sums: GgufTensor, counts: GgufTensor) -> ImatrixEntry:
    for tensor in (sums, counts):
        if tensor.type != "F32":
            raise UserError(f"{tensor.path}: {tensor.name} is {tensor.type}, expected F32\n{AGAIN}")
    values, tokens = _values(sums), _values(counts)
    if not tokens.size or not values.size or values.size % tokens.size:
        raise UserError(f"{sums.path}: {name} has {values.size} sums and {tokens.size} counts\n{AGAIN}")
    return ImatrixEntry(values.reshape(tokens.size, -1), np.rint(tokens))


def _values(tensor: GgufTensor) -> NDArray[np.float32]:
    return np.fromfile(tensor.path, "<f4", tensor.nbytes // 4, offset=tensor.start).astype(np.float32)


def _read_dat(file: BinaryIO, path: Path) -> Imatrix:
    size = os.fstat(file.fileno()).st_size
    file.seek(0)

    def damaged(what: str) -> UserError:
        return UserError(f"{path}: {what} at byte {file.tell()} of {size}; not an importance matrix, or cut\n{AGAIN}")

    def take(count: int, most: int, what: str) -> bytes:
        if not 0 <= count <= min(most, size - file.tell()):
            raise damaged(f"{what} of {count} bytes")
        return file.read(count)

    def number(what: str) -> int:
        return struct.unpack("<i", take(4, 4, what))[0]

    def text(what: str) -> str:
        return take(number(what), LONGEST_NAME, what).decode(errors="replace")

    entries: dict[str, ImatrixEntry] = {}
    total = number("the number of entries")
    if not 0 < total <= size // 12:
        raise damaged(f"{total} entries")
    for _ in range(total):
        name, calls, count = text("a name"), number("a count"), number("a number of values")
        if count < 1 or calls < 0 or name in entries:
            raise damaged(
                f"{name!r} a second time" if name in entries else f"{name!r} with {count} values, {calls} calls"
            )
        values = np.frombuffer(take(4 * count, size, f"the values of {name!r}"), "<f4").astype(np.float32)
        entries[name] = ImatrixEntry(values[None], np.array([max(calls, 1)], np.float32))  # llama.cpp: 0 counts as 1
    chunks, datasets = 0, ()
    if file.tell() < size:  # older files end here
        chunks = number("the number of chunks")
        datasets = (text("the name of the text"),) if file.tell() < size else ()
    return Imatrix(entries, datasets, max(chunks, 0))


def _write_gguf(path: Path, imatrix: Imatrix) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "")
    writer.kv_data[0].clear()  # no general.architecture: llama-imatrix writes none
    writer.add_string("general.type", "imatrix")
    writer.add_array(DATASETS, list(imatrix.datasets) or ["unknown"])
    writer.add_uint32(CHUNKS, imatrix.chunks)
    writer.add_uint32(CHUNK_SIZE, imatrix.chunk_size)
    for name, entry in sorted(imatrix.entries.items()):
        writer.add_tensor(name + SUMS, np.ascontiguousarray(entry.sums, np.float32))
        writer.add_tensor(name + COUNTS, np.ascontiguousarray(entry.counts[:, None], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_dat(path: Path, imatrix: Imatrix) -> None:
    """One count of chunks for an entry, and the means times it: which tokens reached which expert is not kept."""
    parts = [struct.pack("<i", len(imatrix.entries))]
    for name, entry in sorted(imatrix.entries.items()):
        calls = -(-int(entry.counts.max()) // (imatrix.chunk_size or 1))
        values = (entry.importance() * np.float32(max(calls, 1))).astype("<f4")
        parts += [_dat_text(name), struct.pack("<ii", calls, values.size), values.tobytes()]
    parts += [struct.pack("<i", imatrix.chunks), _dat_text(imatrix.datasets[-1] if imatrix.datasets else "unknown")]
    path.write_bytes(b"".join(parts))


def _dat_text(text: str) -> bytes:
    return struct.pack("<i", len(text.encode())) + text.encode()
