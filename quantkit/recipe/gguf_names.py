"""What a name of llama.cpp's types means here: the shipped recipe of that mix, or why there is none."""

import re
from collections.abc import Collection

from quantkit.ggml_types import SHORT_MIXES
from quantkit.recipe.gguf import MIXES
from quantkit.suggestions import plain

NEAREST = "gguf-q4_k_m"  # what a setting of the mix is added to
_MIXES = {plain(name): mix.lower() for name, mix in ({name: name for name in MIXES} | SHORT_MIXES).items()}
_PREFIX = re.compile(r"gguf[:-]")
_TYPE = re.compile(r"(?:ud-)?(?:i?q|tq)([1-8])(?:-[0-9a-z]+)*")
_BITS = re.compile(r"\d+(?:\.\d+)?(?=-?bpw$)")
_IK_LLAMA = re.compile(r"iq\d-(?:kss|ks|kl|kt|k)(?:-r[48])?|.*-r[48]|q6-0|q8-kv")
_LATTICE = re.compile(r"iq[123]-.*")
_BY_BITS = {1: "q2_k", 2: "q2_k", 3: "q3_k_m", 4: "q4_k_m", 5: "q5_k_m", 6: "q6_k"}  # else q8_0


def recipe_of(name: str, shipped: Collection[str]) -> str | None:
    """The shipped recipe of a mix in any spelling (Q4_K_M, gguf:q4_k_m, gguf-q4-k-m, 4.5bpw); None where none is."""
    wanted = _PREFIX.sub("", plain(name), count=1)
    found = f"gguf-{_MIXES.get(wanted, wanted)}"
    return found if found in shipped else None


def explain(name: str, shipped: Collection[str]) -> str | None:
    """What to say of a name of llama.cpp's for which no recipe is shipped, with its hint; None for any other name."""
    wanted = _PREFIX.sub("", plain(name), count=1)
    if wanted == "gguf":
        return f"`{name}` is a file format, and no mix of its types\nhint: pass `--recipe {NEAREST}`"
    if bits := _BITS.match(wanted):
        setting = f"'gguf.mix={{bits_per_weight: {bits[0]}}}'"
        return f"no recipe is shipped for {bits[0]} bits per weight\nhint: pass {_setting(setting)}"
    if mix := _MIXES.get(wanted):
        return f"no recipe is shipped for `{name}`, a mix of llama.cpp's\nhint: pass {_use(mix, shipped)}"
    found = _TYPE.fullmatch(wanted)
    if not found and wanted != "mxfp4-moe" and wanted == plain(name):
        return None
    near = _use(_BY_BITS.get(int(found[1]), "q8_0") if found else "q4_k_m", shipped)
    return f"`{name}` {_refusal(wanted)}\nhint: the nearest is {near}"


def _refusal(wanted: str) -> str:
    if _IK_LLAMA.fullmatch(wanted):
        return "is a type of ik_llama.cpp's, which llama.cpp does not load and quantkit does not write"
    if wanted.startswith("tq"):
        return "is a ternary type of llama.cpp's, for models trained with three values; quantkit does not write it"
    if _LATTICE.fullmatch(wanted):
        return "is a lattice type of llama.cpp's (IQ1, IQ2, IQ3), which quantkit does not write"
    if wanted.startswith("ud-") or wanted.endswith(("-xl", "-xxl")):
        return "is another maker's mix of llama.cpp's types, made for single models; quantkit has no such list"
    if wanted.startswith(("mxfp4", "nvfp4")):
        return "is no mix that quantkit chooses codes for; `quantkit convert DIR OUT.gguf` carries such a folder over"
    return "is not a mix of llama.cpp's types that quantkit writes"


def _use(mix: str, shipped: Collection[str]) -> str:
    return f"`--recipe gguf-{mix}`" if f"gguf-{mix}" in shipped else _setting(f"gguf.mix={mix}")


def _setting(setting: str) -> str:
    return f"`--recipe {NEAREST} --set {setting}`"
