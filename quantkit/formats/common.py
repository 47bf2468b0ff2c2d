"""What several format modules need: tensors held against a layout, checks of scales, and names in configurations.

No torch is imported here: headers are enough for all but the scales.
"""

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint.header import DTYPES, tag_of, torch_dtype
from quantkit.errors import UserError
from quantkit.types import KVSpec, QuantizedWeight, Scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Layout = dict[str, tuple["torch.dtype", tuple[int, ...]]]
Stored = dict[str, tuple[str, tuple[int, ...]]]  # suffix -> (safetensors' name of the dtype, shape)


@dataclass(frozen=True, slots=True)
class Header:
    """What a file's header says of a tensor; values: those of a weight_shape, which stand in the data."""

    tag: str
    shape: tuple[int, ...]
    values: tuple[int, ...] = ()

    @property
    def single(self) -> bool:
        """One number, stored as [] or [1]."""
        return self.shape in ((), (1,))


Headers = Mapping[str, Header]


def words_for(count: int, bits: int) -> int:
    """32-bit words that `count` codes take."""
    return -(-count * bits // 32)


def headers_of(tensors: "Mapping[str, Tensor]") -> dict[str, Header]:
    """The headers that tensors in memory would have, by the same names."""
    found = {}
    for suffix, tensor in tensors.items():
        values = tuple(tensor.flatten().tolist()) if suffix == "weight_shape" else ()
        found[suffix] = Header(tag_of(tensor.dtype) or str(tensor.dtype), tuple(tensor.shape), values)
    return found


def as_layout(stored: Stored) -> Layout:
    """The same with torch's dtypes."""
    return {suffix: (torch_dtype(tag), shape) for suffix, (tag, shape) in stored.items()}


def dtype_name(tag: str | None) -> str:
    """The dtype as torch writes it."""
    return f"torch.{DTYPES[tag][0]}" if tag in DTYPES else str(tag)


def require(tensors: Headers, names: Set[str], scheme: Scheme, optional: Set[str] = frozenset()) -> None:
    """UserError unless the tensors are those named, with or without the optional ones."""
    if not names - optional <= tensors.keys() <= names | optional:
        found = ", ".join(sorted(tensors)) or "none"
        raise UserError(f"{scheme} needs the tensors {', '.join(sorted(names))}; there are {found}")


def matrix(tensors: Headers, suffix: str) -> tuple[int, int]:
    """The shape of a tensor that must be a matrix; UserError where it is none."""
    shape = tensors[suffix].shape
    if len(shape) != 2 or 0 in shape:
        raise UserError(f"{suffix} is {list(shape)}, expected a matrix")
    return shape[0], shape[1]


def check_shapes(tensors: Headers, stored: Stored, shape: tuple[int, int], scheme: Scheme) -> None:
    """UserError where a tensor is not as the layout announces it; a single number may be stored as [] or [1]."""
    for suffix, (tag, expected) in stored.items():
        if suffix not in tensors:
            continue
        found = tensors[suffix]
        single = found.single and expected in ((), (1,))
        if found.tag != tag or (found.shape != expected and not single):
            raise UserError(
                f"{suffix} is {dtype_name(found.tag)} {list(found.shape)}, expected {dtype_name(tag)} {list(expected)} "
                f"for a weight of {shape[0]} x {shape[1]} in {scheme}"
            )


def check_scales(q: QuantizedWeight, what: str) -> None:
    """UserError for scales that are not finite, or that are zero in 16 bits: too large or too small for the dtype.

    Subnormal numbers are exact, and stay.
    """
    if not q.scale_NG.isfinite().all():
        raise UserError(f"a scale is not a finite {q.scale_NG.dtype} number; {what} cannot hold it")
    if q.scale_NG.itemsize == 2 and (q.scale_NG == 0).any():
        raise UserError(f"a scale is 0 as {q.scale_NG.dtype}: the weights are too small for the scales of {what}")


def sole_scheme(schemes: Mapping[str, Scheme], what: str) -> Scheme:
    """The scheme of all modules; UserError where there are several, or none."""
    if not schemes:
        raise UserError("no module is quantized: there is nothing to describe")
    distinct = sorted(map(str, set(schemes.values())))
    if len(distinct) > 1:
        raise UserError(
            f"{what} describes one scheme for all modules, here are {'; '.join(distinct)}; "
            "compressed-tensors holds several"
        )
    return next(iter(schemes.values()))


def refuse_both(schemes: Mapping[str, Scheme], ignored: Iterable[str]) -> None:
    """UserError where a module is both quantized and ignored."""
    if both := sorted(schemes.keys() & set(ignored)):
        raise UserError(f"{both[0]} is both quantized and ignored")


def refuse_kv(kv: KVSpec | None, what: str) -> None:
    """UserError where key and value scales are to be written into a format that has no place for them."""
    if kv is not None:
        raise UserError(
            f"{what} cannot describe a quantized KV cache ({kv}); compressed-tensors and modelopt can (fp8 tensor)"
        )


def refuse_substrings(schemes: Mapping[str, Scheme], ignored: Iterable[str], what: str) -> None:
    """UserError where a reader that looks for ignored names anywhere in a module's name would skip a quantized one."""
    for entry in ignored:
        if hit := next((name for name in schemes if entry in name), None):
            raise UserError(f"{what}: readers skip whatever contains an ignored name, and {hit} contains {entry}")


def listed(module: str, entries: Iterable[str]) -> bool:
    """Whether a list of dense modules means this one: by name, by a parent's name, by its last parts, or by * ? [ ]."""
    return any(
        module == entry
        or module.startswith(entry + ".")
        or module.endswith("." + entry)
        or (any(mark in entry for mark in "*?[") and fnmatchcase(module, entry))
        for entry in entries
    )


def names_of(settings: Mapping[str, Any], *keys: str) -> list[str]:
    """The module names under the first of the keys that has any; UserError where it is not a list of strings."""
    found = next((settings[key] for key in keys if settings.get(key)), [])
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise UserError(f"quantization_config.{keys[0]} is not a list of module names")
    return found


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key of module names: numbers by value."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
