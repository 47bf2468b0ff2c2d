"""Which shipped recipe a name means: its own in any spelling, a scheme's, or a word of another tool."""

from collections.abc import Mapping
from pathlib import Path

from quantkit.errors import UserError
from quantkit.paths import user_path
from quantkit.recipe import gguf_names
from quantkit.recipe.number_formats import PRESETS
from quantkit.suggestions import nearest, plain

# The recipe that a scheme without a recipe stands for: the smallest error at the scheme's usual size, and for
# FP8_DYNAMIC, whose point it is, no calibration.
BEST = {
    "W4A16": "gptq-w4a16",
    "W4A16_ASYM": "awq-gptq-w4a16",
    "W8A16": "rtn-w8a16",
    "W8A8": "w8a8",
    "W4A8": "w4a8",
    "FP8": "fp8",
    "FP8_DYNAMIC": "fp8-dynamic",
    "FP8_BLOCK": "fp8-block",
    "NVFP4": "nvfp4",
    "NVFP4A16": "nvfp4a16",
    "MXFP4": "mxfp4",
    "MXFP8": "mxfp8",
}
# Words that mean one recipe here, in the spelling of `plain`.
WORDS = {
    **dict.fromkeys(("gptq", "int4", "4bit", "4-bit", "w4", "gptq-int4", "w4a16-g128"), "gptq-w4a16"),
    **dict.fromkeys(("w4a16-g32", "gptq-g32"), "gptq-w4a16-g32"),
    **dict.fromkeys(("int3", "3bit", "3-bit", "w3", "w3a16"), "gptq-w3a16"),
    **dict.fromkeys(("w8", "8bit", "8-bit", "int8-weight-only"), "rtn-w8a16"),
    **dict.fromkeys(("int8", "smoothquant", "w8a8-int8", "int8-dynamic"), "w8a8"),
    **dict.fromkeys(("int8-static", "w8a8-int8-static"), "w8a8-static"),
    **dict.fromkeys(("rtn", "int4-weight-only"), "rtn-w4a16"),
    **dict.fromkeys(("awq-w4a16", "awq-int4"), "awq"),
    **dict.fromkeys(("awq-gptq",), "awq-gptq-w4a16"),
    **dict.fromkeys(("rotation", "quarot", "spinquant"), "rotation-gptq-w4a16"),
    **dict.fromkeys(("fp8-static", "w8a8-fp8"), "fp8"),
    **dict.fromkeys(("fp8-e4m3", "w8a8-fp8-dynamic"), "fp8-dynamic"),
    **dict.fromkeys(("fp8-kv-cache", "kv-fp8"), "fp8-kv"),
    **dict.fromkeys(("w4a16-nvfp4", "nvfp4-weight-only"), "nvfp4a16"),
    **dict.fromkeys(("mxfp4-weight-only",), "mxfp4a16"),
}
# What other tools do and quantkit does not, with the recipe to take instead.
ELSEWHERE = {
    **dict.fromkeys(("nf4", "fp4", "bnb", "bnb-4bit", "bitsandbytes", "hqq", "eetq"), "gptq-w4a16"),
    **dict.fromkeys(("autoround", "auto-round", "aqlm", "quip", "exl2", "exl3", "omniquant"), "gptq-w4a16"),
}


def shipped() -> dict[str, Path]:
    """Name -> file of the recipes that come along: inside the wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    folder = next((f for f in (package / "recipes", package.parent / "recipes") if f.is_dir()), package)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def find(path_or_name: str | Path) -> Path:
    """The file of a recipe given by name or path; UserError with the name that may be meant."""
    known, name = shipped(), str(path_or_name)
    if name in known:
        return known[name]
    path = user_path(path_or_name)
    if path.is_file():
        return path
    if (meant := _meant(name)) in known:
        return known[meant]
    if path.is_dir():
        report = path / "quantkit-report.json"
        hint = f"`{report}` repeats its run" if report.is_file() else "`quantkit recipes` lists the shipped recipes"
        raise UserError(f"{path} is a folder, not a recipe file\nhint: {hint}")
    raise UserError(_unknown(name, path, known))


def scheme_named(text: str) -> str:
    """The scheme that `text` names in any spelling; UserError with the one, or the recipe, that may be meant."""
    wanted = plain(text)
    for scheme in PRESETS:
        if plain(scheme) == wanted:
            return scheme
    known = shipped()
    meant = WORDS.get(wanted) or (wanted if wanted in known else None) or gguf_names.recipe_of(text, known)
    if meant is None and (problem := gguf_names.explain(text, known)):
        raise UserError(problem)
    scheme = next((scheme for scheme, recipe in BEST.items() if recipe == meant), None)
    if meant is not None:
        hint = f"`--scheme {scheme}`, or `--recipe {meant}`" if scheme else f"pass `--recipe {meant}` in its place"
    else:
        near = nearest(text, PRESETS)
        hint = f"did you mean `{near}`? " if near else ""
        hint += f"there are {', '.join(PRESETS)}"
    raise UserError(f"no scheme named `{text}`\nhint: {hint}")


def _meant(name: str) -> str | None:
    """The shipped recipe that a name in another spelling, a scheme or a word stands for."""
    wanted, known = plain(name), shipped()
    by_scheme = {plain(scheme): recipe for scheme, recipe in BEST.items()}
    by_name = {plain(recipe): recipe for recipe in known}
    return by_name.get(wanted) or by_scheme.get(wanted) or WORDS.get(wanted) or gguf_names.recipe_of(name, known)


def _unknown(name: str, path: Path, known: Mapping[str, Path]) -> str:
    if problem := gguf_names.explain(name, known):
        return problem
    if other := ELSEWHERE.get(plain(name)):
        return f"`{name}` is no recipe of quantkit's\nhint: the nearest is `{other}`; `quantkit recipes` lists all"
    near = nearest(path.stem, known) or _meant(nearest(path.stem, [*WORDS, *BEST]) or "")
    hint = f"did you mean `{near}`? `quantkit recipes` lists all" if near else "`quantkit recipes` lists the names"
    return f"no recipe or file named `{name}`\nhint: {hint}"


def taken(name: str | None, scheme: str | None) -> str | None:
    """Which shipped recipe is taken, in a line for the user; None where it was named as it is, or is a file."""
    if not name:
        return None if scheme is None else f"recipe: {BEST[scheme_named(scheme)]} (for {scheme_named(scheme)})"
    found = find(name)
    return f"recipe: {found.stem} (for {name})" if found.stem != name and shipped().get(found.stem) == found else None
