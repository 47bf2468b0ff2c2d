"""Sizes as people write them: 3600000, 3.6MB, 4G, 4 GiB, 4.5bpw."""

import re
from dataclasses import dataclass

from quantkit.errors import UserError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?|)B?\s*", re.IGNORECASE)
_BITS = re.compile(r"\s*(\d+(?:\.\d+)?)\s*bpw\s*", re.IGNORECASE)


def bytes_in(text: str) -> int | None:
    """The bytes that `text` stands for, powers of 1000 but for KiB, MiB, GiB, TiB; None where it is no size above 0."""
    read = _SIZE.fullmatch(text)
    size = int(float(read[1]) * _UNITS[read[2].upper()]) if read else 0
    return size or None


@dataclass(frozen=True, slots=True)
class SizeLimit:
    """At most so many bits per weight, or so many bytes: one of the two is set. text: as it was given."""

    text: str
    bits_per_weight: float | None = None
    nbytes: int | None = None


def limit_of(text: str) -> SizeLimit:
    """What `4.5bpw`, `3.6MB` or `5GB` allows; UserError for what is no size above 0."""
    read = _BITS.fullmatch(text)
    bits = float(read[1]) if read else None
    nbytes = None if read else bytes_in(text)
    if not (bits or nbytes):
        raise UserError(
            f"--max-size: `{text}` is no size\n"
            "hint: 4.5bpw (bits per weight of the linears), or 3.6MB or 5GB (bytes of all .safetensors files)"
        )
    return SizeLimit(text.strip(), bits, nbytes)
