"""The engine named in a recipe: would it load what the recipe makes, and does it load what was made?"""

from pathlib import Path
from typing import Any

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import RunError, UserError
from quantkit.quantization.targets import Targets
from quantkit.recipe.recipe import Recipe
from quantkit.verify import preflight, verify_folder


def check_engine(recipe: Recipe, targets: Targets, checkpoint: Checkpoint, format_: Any) -> list[str]:
    """Before any work: UserError where the format cannot describe the result, or the recipe's engine would refuse it.

    Returns the engine's warnings for the report.
    """
    schemes = {linear.name: linear.scheme for linear in targets.linears}
    skipped = [name for name, _ in targets.skipped]
    settings = format_.config(schemes, skipped, targets.kv if targets.kv_scales else None)
    engine = recipe.output.engine
    if engine is None:
        return []
    shapes = {linear.name: linear.shape for linear in targets.linears}
    dense = {name: checkpoint.tensors.get(f"{name}.weight") for name in skipped}
    linears = shapes | {name: info.shape for name, info in dense.items() if info is not None and len(info.shape) == 2}
    found = preflight(settings, shapes, linears, checkpoint.config, engine, recipe.output.tp)
    if refused := [f"{f.where}: {f.message}; {f.remedy}" for f in found if f.level == "error"]:
        where = f"{engine}{f' on {recipe.output.tp} devices' if recipe.output.tp > 1 else ''}"
        advice = "or set output.engine to null if it is for something else"
        raise UserError("\n".join([f"{where} would not load what this recipe makes:", *refused, advice]))
    warnings = [f"{engine}: {f.where}: {f.message}; {f.remedy}" for f in found if f.level == "warning"]
    if targets.kv is not None and not targets.kv_scales:
        warnings.append(
            f"{engine} does not know of a {targets.kv} cache and keeps its own; quantkit alone simulates it"
        )
    return warnings


def check_result(recipe: Recipe, folder: Path) -> None:
    """After it: what lies in the folder is read back; RunError if the engine would refuse it after all."""
    if recipe.output.engine is None:
        return
    found = verify_folder(folder, recipe.output.engine, recipe.output.tp)
    wrong = [f"{f.where}: {f.message}" for f in found.findings if f.level == "error"]
    if wrong:
        raise RunError("\n".join([f"{folder} was written, but {recipe.output.engine} would refuse it:", *wrong]))
