"""What a GGUF file holds: types and their sizes, keys, shards, and what is odd about it."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from quantkit.checkpoint.gguf_header import GgufFile, GgufTensor
from quantkit.ggml_types import GGML_TYPES
from quantkit.verification.findings import Finding
from quantkit.verification.gguf import judge_header
from quantkit.verification.gguf.types import mix_name

SHOWN = 4  # entries of an array
SHOWN_TEXT = 200  # characters of a text


@dataclass(frozen=True, slots=True)
class TypeShare:
    """The tensors of one type. weights: numbers in them; bits_per_weight with scales."""

    tensors: int
    weights: int
    bytes: int
    bits_per_weight: float


@dataclass(frozen=True, slots=True)
class GgufInspection:
    """What `inspect_gguf` found; sizes in bytes.

    mix              what general.file_type calls the mix of types; None where no key says, or an unknown one
    bits_per_weight  of the matrices that are not float, and of all tensors
    types            by the name of the type, most bytes first
    tensors          type, shape and bytes of each
    keys             values of all keys; of long arrays the beginning and the length
    odd              what verify finds worth saying, with its rule
    """

    path: str
    architecture: str
    name: str | None
    version: int
    alignment: int
    mix: str | None
    file_type: Any
    parameters: int
    bits_per_weight: dict[str, float | None]
    bytes: int
    bf16_bytes: int
    types: dict[str, TypeShare]
    keys: dict[str, Any]
    tensors: dict[str, dict[str, Any]]
    shards: list[dict[str, Any]]
    odd: list[Finding]

    def to_json(self) -> dict[str, Any]:
        """What `quantkit inspect --json` prints."""
        plain = {name: getattr(self, name) for name in self.__slots__}
        shares = {name: asdict(share) for name, share in self.types.items()}
        plain |= {"types": shares, "odd": [asdict(finding) for finding in self.odd]}
        return {"format": "gguf", **plain}


def inspect_gguf(file: GgufFile) -> GgufInspection:
    """What an opened file, or all shards of a model, holds."""
    types = _types(file.tensors.values())
    weights = sum(share.weights for share in types.values())
    stored = sum(share.bytes for share in types.values())
    rounded = [share for name, share in types.items() if GGML_TYPES[name].columns > 1]
    count = sum(share.weights for share in rounded)
    return GgufInspection(
        path=str(file.path),
        architecture=file.metadata["general.architecture"],
        name=file.metadata.get("general.name"),
        version=file.version,
        alignment=file.alignment,
        mix=mix_name(file),
        file_type=file.metadata.get("general.file_type"),
        parameters=weights,
        bits_per_weight={
            "quantized": 8 * sum(share.bytes for share in rounded) / count if count else None,
            "model": 8 * stored / weights if weights else None,
        },
        bytes=stored,
        bf16_bytes=2 * weights,
        types=types,
        keys={key: _shortened(value) for key, value in file.metadata.items()},
        tensors={name: _tensor(tensor) for name, tensor in file.tensors.items()},
        shards=_shards(file),
        odd=judge_header(file),
    )


def _types(tensors: Iterable[GgufTensor]) -> dict[str, TypeShare]:
    found: dict[str, list[int]] = {}
    for tensor in tensors:
        counts = found.setdefault(tensor.type, [0, 0, 0])
        for i, count in enumerate((1, prod(tensor.shape), tensor.nbytes)):
            counts[i] += count
    ordered = sorted(found.items(), key=lambda item: -item[1][2])
    return {name: TypeShare(n, w, size, GGML_TYPES[name].bits_per_weight) for name, (n, w, size) in ordered}


def _tensor(tensor: GgufTensor) -> dict[str, Any]:
    return {"type": tensor.type, "shape": list(tensor.shape), "bytes": tensor.nbytes}


def _shortened(value: Any) -> Any:
    if isinstance(value, list) and len(value) > SHOWN:
        return {"length": len(value), "first": [_shortened(entry) for entry in value[:SHOWN]]}
    if isinstance(value, str) and len(value) > SHOWN_TEXT:
        return f"{value[:SHOWN_TEXT]}... ({len(value)} characters)"
    return value


def _shards(file: GgufFile) -> list[dict[str, Any]]:
    paths = sorted({file.path, *(tensor.path for tensor in file.tensors.values())})
    counts = {path: sum(tensor.path == path for tensor in file.tensors.values()) for path in paths}
    return [{"file": path.name, "bytes": path.stat().st_size, "tensors": counts[path]} for path in paths]
