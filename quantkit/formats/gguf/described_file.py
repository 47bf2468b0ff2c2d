"""A GGUF file as the checkpoint it was made from: config.json and the names of its tensors. No torch."""

from typing import Any

import numpy as np

from quantkit.checkpoint.gguf_header import GgufFile, GgufTensor
from quantkit.errors import UserError
from quantkit.formats.gguf.metadata import config_of
from quantkit.formats.gguf.rope import TENSORS
from quantkit.formats.gguf.tensor_names import Place, checkpoint_names


def describe_file(file: GgufFile) -> tuple[dict[str, Any], dict[str, Place]]:
    """(config.json, checkpoint name -> its place in the file); UserError naming the file where it cannot be decoded."""
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    try:
        config = config_of(
            file.metadata, shapes, {name: _values(file.tensors[name]) for name in TENSORS if name in shapes}
        )
        return config, checkpoint_names(config, shapes)
    except UserError as problem:
        raise UserError(f"{file.path}: {problem}") from problem


def _values(tensor: GgufTensor) -> list[float]:
    """A few float32 numbers."""
    if tensor.type != "F32":
        raise UserError(f"{tensor.name}: is {tensor.type}, expected F32\nhint: convert the model again")
    count = tensor.nbytes // 4
    return np.fromfile(tensor.path, "<f4", count, offset=tensor.start).astype(float).tolist()
