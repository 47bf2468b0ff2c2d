"""Numbers of a tensor, read with numpy: verify answers without torch, whose import alone takes a second."""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from quantkit.checkpoint.reader import Checkpoint

_NUMPY = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "u1",
}
# exponent bits, mantissa bits, exponent bias, the codes that are NaN
_BYTES = {
    "F8_E4M3": (4, 3, 7, (0x7F, 0xFF)),
    "F8_E4M3FNUZ": (4, 3, 8, (0x80,)),
    "F8_E5M2FNUZ": (5, 2, 16, (0x80,)),
}


def read_values(checkpoint: Checkpoint, name: str) -> NDArray[np.float64]:
    """All numbers of a tensor as float64, flat; UserError where the file cannot be read."""
    return decode(checkpoint.info(name).tag, checkpoint.raw(name))


def decode(tag: str, raw: bytes) -> NDArray[np.float64]:
    """The numbers of a tensor's bytes, by safetensors' name of its dtype; complex ones are not read (KeyError)."""
    with np.errstate(invalid="ignore"):  # a NaN is a finding, not a warning of numpy's
        return _decode(tag, raw)


def _decode(tag: str, raw: bytes) -> NDArray[np.float64]:
    if tag == "BF16":
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    if tag == "F8_E5M2":  # the upper half of a float16
        return (np.frombuffer(raw, "u1").astype("<u2") << 8).view("<f2").astype(np.float64)
    if tag in _BYTES or tag == "F8_E8M0":
        return _table(tag)[np.frombuffer(raw, "u1")]
    return np.frombuffer(raw, _NUMPY[tag]).astype(np.float64)


@cache
def _table(tag: str) -> NDArray[np.float64]:
    """The value of each of the 256 codes."""
    codes = np.arange(256)
    if tag == "F8_E8M0":
        return np.where(codes == 255, np.nan, np.exp2(codes - 127.0))
    exponent_bits, mantissa_bits, bias, nan = _BYTES[tag]
    exponent, mantissa = codes >> mantissa_bits & (1 << exponent_bits) - 1, codes & (1 << mantissa_bits) - 1
    fraction = mantissa / (1 << mantissa_bits) + (exponent > 0)
    values = np.where(codes < 128, 1.0, -1.0) * fraction * np.exp2(np.maximum(exponent, 1) - float(bias))
    values[list(nan)] = np.nan
    return values
