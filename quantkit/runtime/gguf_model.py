"""A GGUF file as a transformers model: every tensor decoded to float32, names and rows as transformers has them.

An engine also rounds the inputs of each product to 8 bits, in blocks of 32; this model does not.
"""

from functools import partial
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from quantkit.checkpoint.gguf_file import GgufFile, GgufTensor, open_gguf
from quantkit.checkpoint.rawio import fill, opened
from quantkit.errors import UserError
from quantkit.formats.gguf.described_file import describe_file
from quantkit.formats.gguf.tensor_names import Place, row_order
from quantkit.model.meta_model import build_meta_model
from quantkit.model.ties import settle_ties
from quantkit.model.weight_sources import assemble, weight_sources

ROUNDED_INPUTS = (
    "the weights were decoded to float32; llama.cpp also rounds the inputs of each product to 8 bits, so that its "
    "logits differ from these by one to four per cent"
)


def load_gguf(path: Path, device: torch.device, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of a GGUF file, or of all shards of which `path` is one; dtype None: float32.

    UserError for a file whose architecture, keys, tensors or types cannot be decoded, and for NaN among its numbers.
    """
    file = open_gguf(path)
    settings, places = describe_file(file)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings, dtype="float32")
    model = build_meta_model(config)
    shapes = {name: _checkpoint_shape(file.tensors[place.tensor], place) for name, place in places.items()}
    try:
        sources = weight_sources(model, shapes)
    except UserError as problem:
        raise UserError(f"{path}: {problem}") from problem
    settle_ties(model, sources, lambda one, other: one == other)
    read = partial(_read, file, places)
    alike: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        alike.setdefault(id(param), []).append(name)
    for names in alike.values():
        source = next(name for name in names if name in sources)
        like = model.get_parameter(source)
        value = assemble(sources[source], torch.empty(like.shape, dtype=dtype or torch.float32), read).to(device)
        _set(model, names, nn.Parameter(value, requires_grad=False))
    for name, buffer in list(model.named_buffers()):
        setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], buffer.to(device))
    model.name_or_path = config._name_or_path = str(path)
    if model.can_generate():
        model.generation_config = GenerationConfig.from_model_config(model.config)
    return model.eval()


def _checkpoint_shape(tensor: GgufTensor, place: Place) -> tuple[int, ...]:
    return tensor.shape if place.expert is None else tensor.shape[1:]


def _read(file: GgufFile, places: dict[str, Place], name: str) -> Tensor:
    """A checkpoint tensor, float32."""
    place = places[name]
    tensor = file.tensors[place.tensor]
    values = _decode(tensor, place.expert)
    if (scale := file.tensors.get(f"{place.tensor.removesuffix('.weight')}.scale")) is not None:
        values = values * _decode(scale).reshape(-1)[0 if place.expert is None else place.expert]
    if place.plus_one:
        values = values - np.float32(1)
    if place.heads is not None:
        rows = np.empty_like(values)
        rows[row_order(len(values), place.heads)] = values
        values = rows
    if not np.isfinite(values).all():
        raise UserError(
            f"{tensor.path}: {tensor.name}: a number is NaN or infinite\n"
            "hint: the file is damaged, or was quantized wrongly: make it again"
        )
    return torch.from_numpy(values)


def _decode(tensor: GgufTensor, expert: int | None = None) -> NDArray[np.float32]:
    """The numbers of a tensor, or of one expert's part of it; UserError for a type that nothing here decodes."""
    shape, start, size = tensor.shape, tensor.start, tensor.nbytes
    if expert is not None:
        size //= shape[0]
        shape, start = shape[1:], start + expert * size
    raw = np.empty(size, np.uint8)
    with opened(tensor.path) as fd:
        fill(fd, raw.data, start, tensor.path)
    try:
        type_ = gguf.GGMLQuantizationType[tensor.type]
        values = dequantize(raw.reshape(_byte_shape(shape, size)), type_)
    except (KeyError, NotImplementedError) as error:
        raise UserError(
            f"{tensor.path}: {tensor.name} is {tensor.type}, which quantkit does not decode\n"
            "hint: quantize the original model to a type it does, such as Q4_K"
        ) from error
    return np.asarray(values, np.float32).reshape(shape)


def _byte_shape(shape: tuple[int, ...], size: int) -> tuple[int, int]:
    rows = int(np.prod(shape[:-1]))
    return rows, size // rows


def _set(model: nn.Module, names: list[str], value: nn.Parameter) -> None:
    for name in names:
        setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], value)
