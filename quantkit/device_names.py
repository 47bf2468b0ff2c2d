"""Names of devices, checked without torch: whether such a device exists here is for torch to say."""

import difflib
import re

from quantkit.errors import UserError

NAMES = ("auto", "cpu", "cuda", "mps", "xpu")
_PATTERN = re.compile(r"auto|cpu|mps|(?:cuda|xpu)(?::\d+)?")
_MEANT = {"gpu": "cuda", "nvidia": "cuda", "rocm": "cuda", "amd": "cuda", "hip": "cuda", "metal": "mps", "apple": "mps"}


def check_device_name(name: str) -> None:
    """UserError for what is no device's name; the message names the one that was meant."""
    if _PATTERN.fullmatch(name):
        return
    word, _, number = name.lower().strip().replace("_", ":").partition(":")
    if short := re.fullmatch(r"([a-z]*?)(\d+)", word):  # cuda0, or 0
        word, number = short[1] or "cuda", short[2]
    near = _MEANT.get(word) or next(iter(difflib.get_close_matches(word, NAMES, n=1, cutoff=0.6)), None)
    meant = f"{near}:{number}" if near in ("cuda", "xpu") and number.isdigit() else near
    hint = (
        f"did you mean `{meant}`?" if meant else f"use {', '.join(NAMES[:-1])} or {NAMES[-1]}; cuda:1 is the second GPU"
    )
    raise UserError(f"no device is called {name!r}\nhint: {hint}")
