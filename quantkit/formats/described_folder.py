"""A quantized folder of any format, from its configuration and headers: the scheme and the shape of each module.

No torch: a header is enough for all that is asked here.

Shapes: N = out features, K = in features of a linear.
"""

import struct
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from quantkit.cache_spec import CacheSpec
from quantkit.checkpoint.quantization_config import CHANNEL_NAMES, OWN_CACHE, quantization_config, quantized_tensor
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import UserError
from quantkit.formats.common import Header, natural
from quantkit.formats.config import CONFIGS, FormatConfig, format_name
from quantkit.types import KVSpec, Scheme

EMBEDDINGS = ("embed_tokens", "wte", "wpe")  # modules of these names are never linears


@dataclass(frozen=True, slots=True)
class DescribedFolder:
    """A quantized checkpoint, and the plain one that it stands for: MODULE.weight for the tensors of each module.

    name        the format, a key of FORMATS; schemes: module -> Scheme, in natural order
    kv          the KV cache as the format describes it; own_cache: as quantkit's own key of config.json does
    transposed  modules whose weight the plain checkpoint stores as [K, N], which formats do not know of
    """

    checkpoint: Checkpoint
    name: str
    schemes: dict[str, Scheme]
    kv: KVSpec | None
    own_cache: CacheSpec | None
    transposed: frozenset[str]

    @classmethod
    def open(cls, source: Path | Checkpoint, transposed: Collection[str] = ()) -> Self:
        """A folder's configuration and headers, read and compared.

        transposed: names that the model gives to modules with [K, N] weights; the checkpoint's may lack their first
        parts, or have more of them. UserError for a folder that is not quantized, one of an unknown format, and where
        tensors and configuration contradict each other.
        """
        checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
        folder, settings = checkpoint.folder, quantization_config(checkpoint)
        if settings is None:
            raise UserError(f"{folder}: this model is not quantized; `quantkit quantize` does that")
        method, name = settings["quant_method"], format_name(settings)
        if name is None:
            raise UserError(f"{folder}: quantized by {method!r}, which quantkit does not read; it reads {_readable()}")
        form = CONFIGS[name]
        modules = _packed_modules(checkpoint.tensors, form)
        if not modules:
            raise UserError(f"{folder}: the configuration says {method}, but no tensor is packed that way")
        try:
            schemes, kv = form.read_config(settings, modules), form.read_kv(settings)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error
        if hidden := [module for module in modules if module not in schemes]:
            raise UserError(f"{folder}: {hidden[0]} is packed, but quantization_config does not target it")
        tails = {tail for module in transposed for tail in _tails(module)}
        swapped = frozenset(name for name in schemes if name in tails or _tails(name) & set(transposed))
        schemes = dict(sorted(schemes.items(), key=lambda item: natural(item[0])))
        opened = cls(checkpoint, name, schemes, kv, _own_cache(checkpoint), swapped)
        if odd := quantized_tensor({name: checkpoint.tensors[name] for name in opened.plain_tensors()}):
            raise UserError(f"{folder}: {odd} is stored quantized, but quantization_config does not describe it")
        return opened

    @property
    def described(self) -> FormatConfig:
        """What the format says without its tensors: a value of CONFIGS."""
        return CONFIGS[self.name]

    def own(self, module: str) -> dict[str, str]:
        """Suffix -> name of the tensors of a quantized module, without its bias."""
        names = {suffix: f"{module}.{suffix}" for suffix in self.described.SUFFIXES}
        return {suffix: name for suffix, name in names.items() if name in self.checkpoint.tensors}

    def plain_tensors(self) -> list[str]:
        """Names of the tensors that belong to no quantized weight; scales of a KV cache are left out too."""
        own = {name for module in self.schemes for name in self.own(module).values()}
        return [name for name in self.checkpoint.tensors if name not in own and not self.of_cache(name)]

    def of_cache(self, name: str) -> bool:
        """Whether a tensor is what calibration found for the KV cache."""
        return name.endswith(tuple(f".{leaf}" for leaf in (*(self.described.KV_NAMES or ()), *CHANNEL_NAMES)))

    @property
    def cache(self) -> CacheSpec | None:
        """The KV cache, whoever describes it."""
        return self.own_cache or (None if self.kv is None else CacheSpec(self.kv, self.kv))

    def shape(self, module: str) -> tuple[int, int]:
        """(N, K) of a module, from headers; UserError naming the module where its tensors do not fit its scheme."""
        outline = {}
        for suffix, name in self.own(module).items():
            info = self.checkpoint.info(name)
            values = self._small(name) if suffix == "weight_shape" else ()
            outline[suffix] = Header(info.tag, info.shape, values)
        with self.naming(module):
            return self.described.shape_of(outline, self.schemes[module])

    def _small(self, name: str) -> tuple[int, ...]:
        """The numbers of a weight_shape."""
        info = self.checkpoint.info(name)
        kind = {"I64": "q", "I32": "i"}.get(info.tag)
        if kind is None or info.nbytes > 64:
            return ()
        return struct.unpack(f"<{info.nbytes // info.itemsize}{kind}", self.checkpoint.raw(name))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor of the plain checkpoint."""
        own = {name for module in self.schemes for name in self.own(module).values()}
        found = {name: info.shape for name, info in self.checkpoint.tensors.items() if name not in own}
        for module in self.schemes:
            shape = self.shape(module)
            found[f"{module}.weight"] = shape[::-1] if module in self.transposed else shape
        return found

    def is_packed(self, name: str) -> bool:
        """Whether the plain checkpoint's tensor `name` is stored packed."""
        return name.endswith(".weight") and name.removesuffix(".weight") in self.schemes

    def dense_linears(self) -> list[str]:
        """Modules with a plain matrix as weight, and the head, which may have no tensor of its own."""
        found = {"lm_head"}
        for name, info in self.checkpoint.tensors.items():
            module = name.removesuffix(".weight")
            if module != name and len(info.shape) == 2 and module.rpartition(".")[2] not in EMBEDDINGS:
                found.add(module)
        return sorted(found - self.schemes.keys())

    @contextmanager
    def naming(self, module: str) -> Iterator[None]:
        """A UserError raised inside names the folder and the module."""
        try:
            yield
        except UserError as error:
            raise UserError(f"{self.checkpoint.folder}: {module}: {error}") from error


def _readable() -> str:
    return ", ".join(CONFIGS)


def _packed_modules(names: Iterable[str], form: FormatConfig) -> list[str]:
    """The modules that have a tensor which no plain linear has."""
    own = {suffix for suffix in form.SUFFIXES if suffix != "weight"}
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names if name.rpartition(".")[2] in own))


def _own_cache(checkpoint: Checkpoint) -> CacheSpec | None:
    settings = checkpoint.config.get(OWN_CACHE)
    if settings is None:
        return None
    try:
        return CacheSpec.from_json(settings)
    except ValueError as error:
        raise UserError(
            f"{checkpoint.folder / 'config.json'}: {OWN_CACHE} describes no KV cache that quantkit writes ({error}); "
            "quantize the model again"
        ) from error


def _tails(module: str) -> set[str]:
    """The name and what is left of it without its first parts: checkpoints may omit or add the base model's prefix."""
    parts = module.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}
