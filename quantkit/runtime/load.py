"""Load a quantized folder as a transformers model whose linears keep their weights packed."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quantkit.checkpoint.quantization_config import OWN_CACHE
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import RunError, UserError
from quantkit.formats import FORMATS, format_name
from quantkit.formats.quantized_folder import outline
from quantkit.grids.activations import KVRange
from quantkit.model.meta_model import build_meta_model, find_blocks, read_config
from quantkit.model.weight_sources import TensorSlice, assemble, weight_sources
from quantkit.runtime.definition import multiplied_weight
from quantkit.runtime.fused_experts import round_inputs
from quantkit.runtime.quant_linear import QuantLinear, is_linear
from quantkit.runtime.quantized_cache import round_entries
from quantkit.types import ActivationRange, ActivationSpec, KVSpec, Scheme


def load(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model of a folder, ready for generate and evaluation; a folder that is not quantized loads as it is.

    dtype is what the model computes in and keeps its unquantized weights in (None: as its config says). Packed weights
    stay packed where a plain linear uses them. Those of fused experts do not: transformers runs all experts of a layer
    from one 3-D parameter, so they are dequantized while loading and take the memory of the original.
    UserError where the folder cannot be read, or its tensors contradict its configuration.
    """
    checkpoint = Checkpoint.open(path)
    settings = checkpoint.config.get("quantization_config")
    if settings is None:
        return _load_plain(checkpoint.folder, dtype, device, trust_remote_code)
    config = read_config(str(checkpoint.folder), trust_remote_code=trust_remote_code)
    delattr(config, "quantization_config")
    if dtype is None:
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else checkpoint.dtype
    config.dtype = dtype
    model = build_meta_model(config, trust_remote_code=trust_remote_code)
    packed = PackedFolder(checkpoint, settings, model)
    sources = weight_sources(model, packed.shapes())
    _fill(model, packed, sources, dtype, torch.device(device))
    _simulate_cache(model, checkpoint, settings, packed.format)
    model.name_or_path = config._name_or_path = str(checkpoint.folder)
    if (checkpoint.folder / "generation_config.json").exists() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    return model.eval()


class PackedFolder:
    """A quantized checkpoint seen as the dense one of `model` that it stands for: module.weight for the packed tensors.

    The format knows [N, K] alone; where the model stores [K, N] (Conv1D), so does the dense checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint, settings: Mapping[str, Any], model: nn.Module) -> None:
        self.checkpoint = checkpoint
        self.format = _format_of(settings, checkpoint.folder)
        modules = packed_modules(checkpoint.tensors, self.format)
        if not modules:
            method = settings.get("quant_method")
            raise UserError(f"{checkpoint.folder}: config.json says {method}, but no tensor is packed that way")
        try:
            self.schemes: dict[str, Scheme] = self.format.read_config(settings, modules)
        except UserError as error:
            raise UserError(f"{checkpoint.folder / 'config.json'}: {error}") from error
        if hidden := [name for name in modules if name not in self.schemes]:
            raise UserError(f"{checkpoint.folder}: {hidden[0]} is packed, but quantization_config does not target it")
        self._own = {
            f"{name}.{suffix}" for name in modules for suffix in self.format.SUFFIXES if self._has(f"{name}.{suffix}")
        }

        transposed = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
        tails = {tail for name in transposed for tail in _tails(name)}
        self._transposed = {name for name in self.schemes if name in tails or transposed & _tails(name)}

    def _has(self, name: str) -> bool:
        return name in self.checkpoint.tensors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the dense checkpoint."""
        found = {name: info.shape for name, info in self.checkpoint.tensors.items() if name not in self._own}
        for module, scheme in self.schemes.items():
            with self._named(module):
                shape = self.format.check_tensors(outline(self.checkpoint, module, self._suffixes(module)), scheme)
            found[f"{module}.weight"] = shape[::-1] if module in self._transposed else shape
        return found

    def _suffixes(self, module: str) -> list[str]:
        return [suffix for suffix in self.format.SUFFIXES if f"{module}.{suffix}" in self._own]

    @contextmanager
    def _named(self, module: str) -> Iterator[None]:
        """Errors inside name the folder and the module."""
        try:
            yield
        except UserError as error:
            raise UserError(f"{self.checkpoint.folder}: {module}: {error}") from error

    def is_packed(self, name: str) -> bool:
        """Whether the dense tensor `name` lies packed here."""
        return name.removesuffix(".weight") in self.schemes and name.endswith(".weight")

    def tensors(self, module: str) -> dict[str, Tensor]:
        """The packed tensors of a module by suffix."""
        return {suffix: self.checkpoint.read(f"{module}.{suffix}") for suffix in self._suffixes(module)}

    def linear(self, name: str) -> QuantLinear:
        """A QuantLinear without bias from the packed tensors of the dense tensor `name`."""
        module = name.removesuffix(".weight")
        with self._named(module):
            return QuantLinear(self.format, self.tensors(module), self.schemes[module])

    def rounding(self, pieces: list[TensorSlice]) -> dict[int | None, tuple[ActivationSpec, ActivationRange | None]]:
        """How the inputs of a dense parameter made of these pieces are rounded, by expert (None: it is one matrix)."""
        found = {}
        for piece in pieces:
            scheme = self.schemes.get(piece.name.removesuffix(".weight"))
            if scheme is not None and scheme.activations is not None:
                index = piece.where[0] if piece.where and isinstance(piece.where[0], int) else None
                found[index] = (scheme.activations, self.linear(piece.name).quantized().input)
        return found

    def dense(self, name: str) -> Tensor:
        """A tensor of the dense checkpoint: dequantized where it is packed, read where it is not."""
        if not self.is_packed(name):
            return self.checkpoint.read(name)
        linear = self.linear(name)
        weight_NK = multiplied_weight(linear.quantized(), linear.scheme)
        return weight_NK.T if name.removesuffix(".weight") in self._transposed else weight_NK


def packed_modules(names: Iterable[str], format_: Any) -> list[str]:
    """The modules that have a tensor no dense linear has."""
    own = {suffix for suffix in format_.SUFFIXES if suffix != "weight"}
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names if name.rpartition(".")[2] in own))


def _simulate_cache(model: PreTrainedModel, checkpoint: Checkpoint, settings: Mapping[str, Any], format_: Any) -> None:
    """Make the model round what enters its cache as its folder describes, whichever cache it runs on."""
    own = checkpoint.config.get(OWN_CACHE)
    spec = KVSpec(**own) if own else format_.read_kv(settings)
    if spec is None:
        return
    ranges: dict[int, KVRange] = {}
    if spec.per != "token":
        k_name, v_name = format_.KV_NAMES
        for name in (name for name in checkpoint.tensors if name.endswith(f".{k_name}")):
            layer = next(int(part) for part in name.split(".") if part.isdigit())
            names = (name, f"{name.removesuffix(k_name)}{v_name}")
            ranges[layer] = KVRange(*(checkpoint.read(n).float().reshape(-1).squeeze().to(model.device) for n in names))
        if not ranges:
            raise UserError(
                f"{checkpoint.folder}: config.json speaks of a {spec} cache, but there are no {k_name} tensors"
            )

    def use_cache(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, kwargs | {"use_cache": True}  # without a cache nothing would be rounded

    def round_cache(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
        if not caches:
            raise RunError(
                f"{type(module).__name__} was called without a cache, so that its keys and values would not be rounded "
                f"to {spec}, as {checkpoint.folder / 'config.json'} says"
            )
        for cache in caches:
            round_entries(cache, spec, ranges)

    model.register_forward_pre_hook(use_cache, with_kwargs=True)
    for block in find_blocks(model)[1]:
        block.register_forward_pre_hook(round_cache, with_kwargs=True)


def _fill(
    model: PreTrainedModel,
    folder: PackedFolder,
    sources: Mapping[str, list[TensorSlice]],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Give every parameter and persistent buffer of the meta model its value, tied ones one value together."""
    kept = model._get_dtype_plan(dtype)  # what transformers keeps in float32 whatever is asked
    alike: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        alike.setdefault(id(param), []).append(name)
    rounding: dict[str, dict[tuple[str, int | None], Any]] = {}
    for names in alike.values():
        source = next(name for name in names if name in sources)
        owner = model.get_submodule(source.rpartition(".")[0])
        pieces = sources[source]
        if (
            len(names) == 1
            and is_linear(owner)
            and pieces == [TensorSlice(pieces[0].name)]
            and folder.is_packed(pieces[0].name)
        ):
            linear = folder.linear(pieces[0].name).to(device)
            linear.bias = owner.get_parameter("bias") if owner.bias is not None else None  # on meta till its turn comes
            model.set_submodule(source.rpartition(".")[0], linear)
            continue
        path, _, leaf = source.rpartition(".")
        for index, found in folder.rounding(pieces).items():
            rounding.setdefault(path, {})[leaf, index] = found
        value = _put_together(folder, pieces, model.get_parameter(source), dtype, kept, source).to(device)
        param = nn.Parameter(value, requires_grad=False)
        for name in names:
            setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], param)
    for path, inputs in rounding.items():
        round_inputs(model.get_submodule(path), inputs)
    for name, buffer in list(model.named_buffers()):
        owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if not isinstance(owner, QuantLinear):
            stored = _put_together(folder, sources[name], buffer, None, kept, name) if name in sources else buffer
            setattr(owner, leaf, stored.to(device))


def _put_together(
    folder: PackedFolder,
    pieces: list[TensorSlice],
    like: Tensor,
    dtype: torch.dtype | None,
    kept: Mapping[str, torch.dtype],
    name: str,
) -> Tensor:
    """One parameter from its checkpoint tensors, of like's shape; floating ones as `dtype` (None: as like's)."""
    target = like.dtype
    if dtype is not None and target.is_floating_point:
        target = next((wide for pattern, wide in kept.items() if pattern in name), dtype)
    out = torch.empty(like.shape, dtype=target)
    return assemble(pieces, out, folder.dense)


def _tails(module: str) -> set[str]:
    """The name and what is left of it without its first parts: checkpoints may omit or add the base model's prefix."""
    parts = module.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}


def _format_of(settings: Mapping[str, Any], folder: Path) -> Any:
    name = format_name(settings)
    if name is None:
        raise UserError(f"{folder}: quantized by {settings.get('quant_method')!r}; quantkit loads {', '.join(FORMATS)}")
    return FORMATS[name]


def _load_plain(
    folder: Path, dtype: torch.dtype | None, device: str | torch.device, trust_remote_code: bool
) -> PreTrainedModel:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: transformers cannot load this model: {first}") from error
    return model.to(device).eval()  # type: ignore[arg-type]
