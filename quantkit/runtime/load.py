"""Load a model folder as a transformers model; the linears of a quantized one keep their weights packed."""

import os
import warnings
from collections.abc import Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Cache,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from quantkit.cache_spec import CacheSpec
from quantkit.checkpoint.gguf_path import find_gguf
from quantkit.checkpoint.hub import locate_model
from quantkit.checkpoint.quantization_config import CHANNEL_NAMES, INLINE_KEYS, quantization_config
from quantkit.checkpoint.reader import Checkpoint
from quantkit.device_names import torch_device
from quantkit.errors import RunError, UserError
from quantkit.formats.described_folder import DescribedFolder
from quantkit.formats.quantized_folder import QuantizedFolder
from quantkit.grids.activations import KVRange, stored_scale
from quantkit.library_output import quiet_libraries
from quantkit.model.expert_stacks import stacked_sources
from quantkit.model.meta_model import build_meta_model, find_blocks, read_config
from quantkit.model.ties import settle_ties
from quantkit.model.weight_sources import TensorSlice, assemble
from quantkit.runtime.definition import multiplied_weight
from quantkit.runtime.fused_experts import round_inputs
from quantkit.runtime.gguf_model import load_gguf
from quantkit.runtime.quant_linear import QuantLinear, is_linear
from quantkit.runtime.quantized_cache import round_entries
from quantkit.runtime.save import Origin, remember
from quantkit.types import ActivationRange, ActivationSpec

if TYPE_CHECKING:

    class CausalLM(PreTrainedModel):
        """What a loaded model is: a model of transformers that generates."""

        def generate(self, inputs: Tensor | None = None, **options: Any) -> Any: ...
else:
    CausalLM = PreTrainedModel


def load(
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    *,
    trust_remote_code: bool = False,
    simulate_cache: bool = True,
) -> CausalLM:
    """The model of a folder, a Hub id or a GGUF file, ready for generate and evaluation.

    dtype   what the model computes in and keeps its unquantized weights in (None: as its config says; of a GGUF file,
            which is decoded whole, float32)
    device  cpu, cuda, cuda:1 ..., or auto: a GPU where there is one
    simulate_cache  round what enters the model's cache as a checkpoint with a quantized cache says

    A model that is not quantized loads as it is. Packed weights stay packed where a plain linear uses them. Those of
    fused experts do not: transformers runs all
    experts of a layer from one 3-D parameter, so they are dequantized while loading and take the memory of the
    original. The model can be moved, cast and copied; `quantkit.save` and `save_pretrained` write its folder again.

    UserError where the model cannot be found or read, or its tensors contradict its configuration.
    """
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"path is {path!r}; expected a model folder or a Hub id")
    wanted = _dtype(dtype)
    place = torch_device(str(device))
    if (file := find_gguf(os.fspath(path))) is not None:
        return cast(CausalLM, load_gguf(file, place, wanted))
    return load_quantized(
        locate_model(os.fspath(path)), place, wanted, trust_remote_code=trust_remote_code, simulate_cache=simulate_cache
    )


def _dtype(dtype: Any) -> torch.dtype | None:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is None or dtype == "auto":
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize == 1:
        raise UserError(f"dtype is {dtype!r}; expected float32, bfloat16, float16 or None")
    return found


def load_quantized(
    path: Path,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    trust_remote_code: bool = False,
    owner: Any = None,
    simulate_cache: bool = True,
) -> CausalLM:
    """`load` of a folder. owner: what keeps a temporary one alive, for as long as the model lives."""
    checkpoint = Checkpoint.open(path)
    quantized = quantization_config(checkpoint) is not None
    config = read_config(str(checkpoint.folder), trust_remote_code=trust_remote_code)
    for part, key in product((config, config.get_text_config()), INLINE_KEYS):
        if hasattr(part, key):
            delattr(part, key)
    if not quantized:
        return _load_plain(checkpoint.folder, config, dtype, device, trust_remote_code)
    if dtype is None:
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else checkpoint.dtype
    config.dtype = dtype
    model = build_meta_model(config, trust_remote_code=trust_remote_code)
    transposed = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    folder = QuantizedFolder.open(checkpoint, transposed)
    sources = stacked_sources(model, folder.shapes())
    for remark in settle_ties(model, sources, partial(_equal, folder, dtype)):
        warnings.warn(f"{checkpoint.folder}: {remark}", stacklevel=2)
    plain = {name: pieces[0].name for name, pieces in sources.items() if pieces == [TensorSlice(pieces[0].name)]}
    plain = {name: tensor for name, tensor in plain.items() if not folder.is_packed(tensor)}
    _fill(model, folder, sources, dtype, device)
    spec = folder.cache
    own_cache = None if spec is None else (spec, cache_ranges(folder, spec))
    if own_cache is not None and simulate_cache:
        _simulate_cache(model, folder, *own_cache)
    vars(model)["quantkit_cache"] = own_cache  # what the paged engine keeps its cache as
    model.name_or_path = config._name_or_path = str(checkpoint.folder)
    if (checkpoint.folder / "generation_config.json").exists() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    remember(model, Origin.of(checkpoint.folder, plain, owner))
    return cast(CausalLM, model.eval())


def _equal(folder: QuantizedFolder, dtype: torch.dtype, one: str, other: str) -> bool:
    return torch.equal(_dense(folder, one).to(dtype), _dense(folder, other).to(dtype))


def _dense(folder: QuantizedFolder, name: str) -> Tensor:
    """A tensor of the plain checkpoint: dequantized as products use it where it is packed, read where it is not."""
    if not folder.is_packed(name):
        return folder.checkpoint.read(name)
    module = name.removesuffix(".weight")
    weight_NK = multiplied_weight(folder.weight(module), folder.schemes[module])
    return weight_NK.T if module in folder.transposed else weight_NK


def _quant_linear(folder: QuantizedFolder, name: str) -> QuantLinear:
    """A QuantLinear without bias from the packed tensors of the plain checkpoint's tensor `name`."""
    module = name.removesuffix(".weight")
    with folder.naming(module):
        return QuantLinear(folder.form, folder.tensors(module), folder.schemes[module])


def _rounding(
    folder: QuantizedFolder, pieces: list[TensorSlice]
) -> dict[int | None, tuple[ActivationSpec, ActivationRange | None]]:
    """How the inputs of a dense parameter made of these pieces are rounded, by expert (None: it is one matrix)."""
    found = {}
    for piece in pieces:
        module = piece.name.removesuffix(".weight")
        scheme = folder.schemes.get(module)
        if scheme is not None and scheme.activations is not None:
            index = piece.where[0] if piece.where and isinstance(piece.where[0], int) else None
            found[index] = (scheme.activations, folder.weight(module).input)
    return found


def _simulate_cache(
    model: PreTrainedModel, folder: QuantizedFolder, spec: CacheSpec, ranges: Mapping[int, KVRange]
) -> None:
    """Make the model round what enters its cache as its folder describes, whichever cache it runs on."""
    checkpoint = folder.checkpoint

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


def cache_ranges(folder: DescribedFolder, spec: CacheSpec) -> dict[int, KVRange]:
    """What calibration found for the cache of each layer, on the CPU; empty where the spec needs nothing.

    UserError where the folder holds none of it.
    """
    found: dict[int, list[Tensor | None]] = {}
    for at, side in enumerate((spec.keys, spec.values)):
        if side is None or not side.calibrated:
            continue
        names = CHANNEL_NAMES if side.channels else folder.described.KV_NAMES
        assert names is not None, "a cache of static scales was read from them"
        own = [name for name in folder.checkpoint.tensors if name.endswith(f".{names[at]}")]
        if not own:
            raise UserError(
                f"{folder.checkpoint.folder}: config.json describes a {spec} KV cache, but there are no "
                f"{names[at]} tensors"
            )
        for name in own:
            layer = next(int(part) for part in name.split(".") if part.isdigit())
            found.setdefault(layer, [None, None])[at] = stored_scale(folder.checkpoint.read(name))
    return {layer: KVRange(*pair) for layer, pair in found.items()}


def _fill(
    model: PreTrainedModel,
    folder: QuantizedFolder,
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
            linear = _quant_linear(folder, pieces[0].name).to(device)
            linear.bias = owner.get_parameter("bias") if owner.bias is not None else None  # on meta till its turn comes
            model.set_submodule(source.rpartition(".")[0], linear)
            continue
        path, _, leaf = source.rpartition(".")
        for index, found in _rounding(folder, pieces).items():
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
    folder: QuantizedFolder,
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
    return assemble(pieces, out, partial(_dense, folder))


def _load_plain(
    folder: Path,
    config: PretrainedConfig,
    dtype: torch.dtype | None,
    device: str | torch.device,
    trust_remote_code: bool,
) -> CausalLM:
    """An unquantized model by transformers itself; UserError where it would leave weights random."""
    try:
        # with output_loading_info it returns a pair, which its annotation does not say
        settings: dict[str, Any] = {"dtype": dtype or "auto", "output_loading_info": True}
        with quiet_libraries():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, config=config, trust_remote_code=trust_remote_code, **settings
            )
    except Exception as error:  # anything that transformers or safetensors make of a broken folder
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: transformers cannot load this model: {first}") from error
    model, info = loaded
    absent = sorted(info["missing_keys"]) + [str(mismatch[0]) for mismatch in info["mismatched_keys"]]
    if absent:  # transformers fills these with random numbers and only warns
        raise UserError(f"{folder}: {len(absent)} weights are missing or of the wrong shape: {', '.join(absent[:5])}")
    return model.to(device).eval()
