"""A quantized folder of any format: what its configuration says, and its weights one module at a time."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.quantization_config import _settings
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import UserError
from quantkit.formats import FORMATS, format_name
from quantkit.formats.common import natural
from quantkit.types import KVSpec, QuantizedWeight, Scheme

SCALES = ("weight_scale", "scales", "weight_scale_inv")  # what formats call the plain scales of a module
EMBEDDINGS = ("embed_tokens", "wte", "wpe")  # by these names never linears


@dataclass(frozen=True, slots=True)
class QuantizedFolder:
    """A quantized checkpoint, the format it is in by name, its modules' schemes and the format of its KV cache."""

    checkpoint: Checkpoint
    name: str
    schemes: dict[str, Scheme]
    kv: KVSpec | None

    @classmethod
    def open(cls, path: Path) -> "QuantizedFolder":
        """UserError for a folder that is not quantized, or whose tensors and configuration contradict each other."""
        checkpoint = Checkpoint.open(path)
        settings = _settings(checkpoint)
        name = format_name(settings)
        if name is None:
            raise UserError(
                f"{path}: quantized by {settings.get('quant_method')!r}; convert reads {', '.join(FORMATS)}"
            )
        form = FORMATS[name]
        mark = f".{form.MARK}"
        marked = [tensor.removesuffix(mark) for tensor in checkpoint.tensors if tensor.endswith(mark)]
        try:
            schemes, kv = form.read_config(settings, marked), form.read_kv(settings)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        if not marked:
            raise UserError(f"{path}: quantized by {name}, but no tensor is a {form.MARK}")
        if hidden := [module for module in marked if module not in schemes]:
            raise UserError(f"{path}: {hidden[0]} is stored quantized, but quantization_config leaves it out")
        known = {*form.SUFFIXES, "bias", *(name.rpartition(".")[2] for name in form.KV_NAMES or ())}
        for tensor in checkpoint.tensors:
            module, _, suffix = tensor.rpartition(".")
            if module in schemes and suffix not in known:
                raise UserError(f"{path}: {tensor} is nothing that {name} knows; it cannot be carried over")
        return cls(checkpoint, name, dict(sorted(schemes.items(), key=lambda item: natural(item[0]))), kv)

    def own(self, module: str) -> dict[str, str]:
        """Suffix -> name of the tensors of a quantized module, without its bias."""
        return own_tensors(self.checkpoint, module, FORMATS[self.name].SUFFIXES)

    def shape(self, module: str) -> tuple[int, int]:
        """(N, K) of a module from headers."""
        form = FORMATS[self.name]
        return form.check_tensors(outline(self.checkpoint, module, form.SUFFIXES), self.schemes[module])

    def scale_dtype(self, module: str) -> torch.dtype:
        """What `weight(module)` has its scales in."""
        names = [f"{module}.{suffix}" for suffix in SCALES]
        dtypes = {self.checkpoint.info(name).dtype for name in names if name in self.checkpoint.tensors}
        return next(iter(dtypes & {torch.float16, torch.bfloat16}), torch.float32)

    def weight(self, module: str) -> QuantizedWeight:
        """A module's weight, unpacked; UserError for numbers that are not finite."""
        tensors = {suffix: self.checkpoint.read(name) for suffix, name in self.own(module).items()}
        q = FORMATS[self.name].unpack(tensors, self.schemes[module])
        if not q.scale_NG.isfinite().all() or (q.input is not None and not q.input.scale.isfinite().all()):
            raise UserError("a scale is NaN or infinite; the folder is damaged, or was quantized wrongly")
        if q.spec.element == "float" and q.spec.bits == 8 and (q.codes_NK & 127 == 127).any():
            raise UserError("a weight is NaN; the folder is damaged, or was quantized wrongly")
        return q

    def dense_linears(self) -> list[str]:
        """Modules with a plain matrix as weight, and the head, which may have none of its own."""
        found = {"lm_head"}
        for name, info in self.checkpoint.tensors.items():
            module = name.removesuffix(".weight")
            if module != name and len(info.shape) == 2 and module.rpartition(".")[2] not in EMBEDDINGS:
                found.add(module)
        return sorted(found - self.schemes.keys())

    def renamed(self, target: Any) -> dict[str, str]:
        """Name here -> name in the target format of every tensor that is copied as it is."""
        own = {name for module in self.schemes for name in self.own(module).values()}
        names = {name: name for name in self.checkpoint.tensors if name not in own}
        if self.kv is None:
            return names
        if target.KV_NAMES is None:
            raise UserError(f"the format has no place for the scales of a KV cache ({self.kv}); compressed-tensors has")
        moved = {
            name: name.removesuffix(here) + there
            for here, there in zip(FORMATS[self.name].KV_NAMES, target.KV_NAMES, strict=True)
            for name in names
            if name.endswith(f".{here}")
        }
        if not moved:
            raise UserError(f"{self.checkpoint.folder}: the KV cache is to be {self.kv}, but its scales are missing")
        return names | moved


def own_tensors(checkpoint: Checkpoint, module: str, suffixes: Iterable[str]) -> dict[str, str]:
    """Suffix -> name of the tensors with these suffixes that a module has."""
    names = {suffix: f"{module}.{suffix}" for suffix in suffixes}
    return {suffix: name for suffix, name in names.items() if name in checkpoint.tensors}


def outline(checkpoint: Checkpoint, module: str, suffixes: Iterable[str]) -> dict[str, Tensor]:
    """A module's tensors by suffix without their data; only the two numbers of a weight_shape are read."""
    found = {}
    for suffix, name in own_tensors(checkpoint, module, suffixes).items():
        info = checkpoint.info(name)
        empty = torch.empty(info.shape, dtype=info.dtype, device="meta")
        found[suffix] = checkpoint.read(name) if suffix == "weight_shape" else empty
    return found
