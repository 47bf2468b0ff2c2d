"""Sizes as people write them: 3600000, 3.6MB, 4G, 4 GiB."""

import re

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?|)B?\s*", re.IGNORECASE)


def bytes_in(text: str) -> int | None:
    """The bytes that `text` stands for, powers of 1000 but for KiB, MiB, GiB, TiB; None where it is no size above 0."""
    read = _SIZE.fullmatch(text)
    size = int(float(read[1]) * _UNITS[read[2].upper()]) if read else 0
    return size or None
