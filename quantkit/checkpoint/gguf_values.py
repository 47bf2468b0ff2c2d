"""NaN and Inf in the values of a GGUF file: in floats, and in the scales of quantized blocks.

One such scale makes a whole block, and then the model's output, NaN. The blocks are those of ggml-common.h, the rules
those of llama.cpp's own check (`--check-tensors`). Data is read in parts; numpy only.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantkit.checkpoint.gguf_header import GgufFile, GgufTensor
from quantkit.checkpoint.rawio import fill, opened
from quantkit.ggml_types import GGML_TYPES

PART = 4 << 20  # bytes looked at together

# First bytes of the f16 numbers in a block, by type.
_HALVES = {name: (0,) for name in ("F16", "Q1_0", "Q2_0", "Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS", "IQ1_S")}
_HALVES |= {name: (0,) for name in ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")}
_HALVES |= {name: (0, 2) for name in ("Q4_1", "Q5_1", "Q8_1", "Q4_K", "Q5_K")}
_HALVES |= {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,)}


@dataclass(frozen=True, slots=True)
class BadValues:
    """A tensor with values that are no numbers.

    what    "NaN or Inf scales" or "NaN or Inf values"
    count   of blocks (of values, where the type has no blocks)
    blocks  of how many
    first   index of the first one
    """

    tensor: str
    type: str
    what: str
    count: int
    blocks: int
    first: int


def check_values(file: GgufFile) -> list[BadValues]:
    """Tensors of the file (all shards) that hold NaN or Inf, in file order.

    UserError when the file cannot be read any more.
    """
    return [found for tensor in file.tensors.values() if (found := _check(tensor)) is not None]


def _check(tensor: GgufTensor) -> BadValues | None:
    type_ = GGML_TYPES[tensor.type]
    if tensor.type in ("I8", "I16", "I32", "I64", "NVFP4"):  # every byte of an NVFP4 scale stands for a number there
        return None
    count, first, done = 0, -1, 0
    for blocks in _parts(tensor, type_.nbytes):
        bad = _bad(blocks, tensor.type)
        if bad.any():
            count += int(bad.sum())
            first = first if first >= 0 else done + int(bad.argmax())
        done += len(blocks)
    what = "NaN or Inf scales" if type_.columns > 1 else "NaN or Inf values"
    return BadValues(tensor.name, tensor.type, what, count, done, first) if count else None


def _parts(tensor: GgufTensor, block: int) -> Iterator[NDArray[np.uint8]]:
    """The tensor's blocks, [blocks, bytes of one], some at a time in the same memory."""
    step = PART // block * block
    memory = np.empty(min(step, tensor.nbytes), np.uint8)
    with opened(tensor.path) as fd:
        for start in range(0, tensor.nbytes, step):
            part = memory[: min(step, tensor.nbytes - start)]
            fill(fd, part.data, tensor.start + start, tensor.path)
            yield part.reshape(-1, block)


def _bad(blocks: NDArray[np.uint8], type_name: str) -> NDArray[np.bool_]:
    """Which blocks hold NaN or Inf."""
    match type_name:
        case "F32" | "Q8_K":
            return ~np.isfinite(blocks[:, :4].copy().view("<f4")[:, 0])
        case "F64":
            return ~np.isfinite(blocks.view("<f8")[:, 0])
        case "BF16":
            return (blocks.view("<u2")[:, 0] & 0x7F80) == 0x7F80
        case "MXFP4":
            return blocks[:, 0] == 0xFF
        case "IQ1_M":  # the f16 scale is in the highest 4 bits of the four words of scales
            words = blocks[:, 48:56].copy().view("<u2") >> 12
            return (words[:, 3] << 12 | words[:, 2] << 8) & 0x7C00 == 0x7C00
    exponents = np.stack([blocks[:, start + 1] for start in _HALVES[type_name]])
    return ((exponents & 0x7C) == 0x7C).any(0)
