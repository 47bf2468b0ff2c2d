"""NaN and infinity among a file's scales and numbers, read with numpy a few megabytes at a time."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from quantkit.checkpoint.gguf_file import GgufFile, GgufTensor
from quantkit.ggml_types import GGML_TYPES
from quantkit.verification.findings import Finding, error
from quantkit.verification.subject import some

CHUNK_BYTES = 8 << 20
# Where a block has float16 scales: bytes from its start.
_HALVES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "Q1_0", "Q2_0"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q8_1", "Q4_K", "Q5_K"), (0, 2)),
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ4_NL", "IQ4_XS"), (0,)),
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,), "F16": (0,)},
}
_EXPONENT = {"F32": (np.uint32, 0x7F800000), "BF16": (np.uint16, 0x7F80), "F64": (np.uint64, 0x7FF0000000000000)}


def check_values(file: GgufFile) -> list[Finding]:
    """Tensors with a scale or a number that is NaN or infinite: their product with anything is."""
    wrong = [tensor.name for tensor in file.tensors.values() if not _finite(tensor)]
    if not wrong:
        return []
    of_scales = file.tensors[wrong[0]].type not in (*_EXPONENT, "F16")
    message = f"it holds a {'scale' if of_scales else 'number'} that is NaN or infinite: all results will be NaN"
    return [error("gguf-nan", some(wrong), message, "the file is damaged, or was quantized wrongly: make it again")]


def _finite(tensor: GgufTensor) -> bool:
    return all(_finite_blocks(tensor.type, blocks) for blocks in _blocks(tensor))


def _blocks(tensor: GgufTensor) -> Iterator[NDArray[np.uint8]]:
    """The tensor's blocks as rows of bytes."""
    size = GGML_TYPES[tensor.type].nbytes
    step = CHUNK_BYTES // size * size
    with tensor.path.open("rb") as stream:
        stream.seek(tensor.start)
        for start in range(0, tensor.nbytes, step):
            raw = stream.read(min(step, tensor.nbytes - start))
            yield np.frombuffer(raw[: len(raw) // size * size], np.uint8).reshape(-1, size)


def _finite_blocks(type_name: str, blocks: NDArray[np.uint8]) -> bool:
    if type_name in _EXPONENT:
        kind, mask = _EXPONENT[type_name]
        return not ((blocks.view(kind) & kind(mask)) == kind(mask)).any()
    if type_name == "MXFP4":  # the exponent 255 is NaN
        return not (blocks[:, 0] == 255).any()
    if type_name == "NVFP4":  # 127 is NaN, and nothing has a sign
        return not (blocks[:, :4] >= 127).any()
    if type_name == "Q8_K":
        return _finite_blocks("F32", np.ascontiguousarray(blocks[:, :4]))
    if type_name == "IQ1_M":  # the four upper nibbles of its scales
        words = np.ascontiguousarray(blocks[:, 48:56]).view("<u2").astype(np.uint16)
        scale = words[:, 0] >> 12 | words[:, 1] >> 8 & 0xF0 | words[:, 2] >> 4 & 0xF00 | words[:, 3] & 0xF000
        return not (scale & 0x7C00 == 0x7C00).any()
    for start in _HALVES.get(type_name, ()):
        halves = np.ascontiguousarray(blocks[:, start : start + 2]).view("<u2")
        if (halves & 0x7C00 == 0x7C00).any():
            return False
    return True
