"""A module in memory as a checkpoint: the tensors that `save_pretrained` would write, read where they lie."""

import copy
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantkit.checkpoint.header import TensorInfo, read_json, tag_of
from quantkit.checkpoint.model_folder import check_names
from quantkit.checkpoint.rawio import as_bytes, write_at
from quantkit.checkpoint.reader import SAMPLE, Checkpoint
from quantkit.model.weight_sources import weight_sources

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ModuleCheckpoint(Checkpoint):
    """`folder` holds config.json and side files alone; the tensors, by their names in a checkpoint, stay in memory."""

    def __init__(self, folder: Path, held: Mapping[str, Tensor]) -> None:
        nowhere = folder / "tensors in memory"
        infos = {}
        for name, tensor in held.items():
            tag = tag_of(tensor.dtype)
            assert tag is not None, "held_tensors leaves no such dtype"
            infos[name] = TensorInfo(tag, tuple(tensor.shape), nowhere, 0, tensor.numel() * tensor.itemsize)
        super().__init__(folder, read_json(folder / "config.json", "a model has one"), infos)
        check_names(folder, infos)
        self._held = held

    def read(self, name: str) -> Tensor:
        """The tensor, in memory of its own, contiguous, on the CPU."""
        self.info(name)
        return self._held[name].detach().cpu().clone(memory_format=torch.contiguous_format)

    def rows(self, name: str, index: Tensor) -> Tensor:
        """tensor[index] for index int64 [R], on the CPU."""
        self.info(name)
        table = self._held[name].detach()
        if table.itemsize == 1:  # float8 has no indexing kernels on every device, bytes do
            return table.view(torch.uint8)[index.to(table.device)].view(table.dtype).cpu()
        return table[index.to(table.device)].cpu()

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes [start, stop) of a tensor."""
        return bytes(as_bytes(self.read(name))[start:stop])

    def copy(self, name: str, fd: int, offset: int) -> None:
        """Copy the tensor's bytes to `offset` of the open file `fd`; OSError when that cannot be written."""
        write_at(fd, self.read(name), offset)

    def _samples(self, name: str, info: TensorInfo) -> Iterator[memoryview | bytes]:
        raw, size = as_bytes(self.read(name)), info.nbytes
        starts = [0] if size <= 3 * SAMPLE else [0, size // 2, size - SAMPLE]
        yield from (raw[start : start + (size if len(starts) == 1 else SAMPLE)] for start in starts)


def held_tensors(model: "PreTrainedModel") -> dict[str, Tensor] | str:
    """The tensors of a checkpoint of the module, none of them copied; or why they cannot be read where they lie.

    transformers merges, splits and renames tensors as it saves some models. It is asked what it makes of tensors
    without values; where each of those is a part of one parameter, that part is the tensor.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
        from transformers.modeling_utils import remove_tied_weights_from_state_dict
    except ImportError:
        return "this version of transformers names tensors while it writes them"
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return "it is spread over several devices"
    if model.is_remote_code():
        return "its Python code comes with it"
    state = model.state_dict()
    if any(type(tensor) is not Tensor for tensor in state.values()):
        return "its parameters are no plain tensors"
    if any(tensor.is_meta for tensor in state.values()):
        return "some of its parameters are offloaded"
    if any(tag_of(tensor.dtype) is None for tensor in state.values()):
        return "some of its tensors have a dtype that files do not have"
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    state = remove_tied_weights_from_state_dict(state, model)
    saved = revert_weight_conversion(model, {name: tensor.to("meta") for name, tensor in state.items()})
    shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    if shapes == {name: tuple(tensor.shape) for name, tensor in state.items()}:
        return state
    held: dict[str, Tensor] = {}
    for parameter, pieces in weight_sources(model, shapes).items():
        for piece in pieces:
            if parameter in state and not piece.part:
                view = state[parameter][piece.where]
                held[piece.name] = view.mT if piece.transposed else view
    if {name: tuple(tensor.shape) for name, tensor in held.items()} != shapes:
        return "transformers puts its tensors together from several as it saves them"
    return held


def write_config(model: "PreTrainedModel", folder: Path) -> None:
    """config.json and generation_config.json as `save_pretrained` writes them; the module's own stay as they are."""
    os.makedirs(folder, exist_ok=True)
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    settings = getattr(model, "generation_config", None)
    if settings is not None:  # as they are: transformers refuses to save what it would warn about
        settings.to_json_file(folder / "generation_config.json", use_diff=True)
