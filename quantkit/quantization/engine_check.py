"""The engine named in a recipe: would it load what the recipe makes, and does it load what was made?"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.checkpoint.header import TensorInfo, TensorLayout
from quantkit.errors import RunError, UserError
from quantkit.formats import FORMATS
from quantkit.quantization.output_layout import file_layout, quantization_config
from quantkit.quantization.targets import Targets
from quantkit.recipe.recipe import Recipe
from quantkit.verification import Finding, verify_folder, verify_layout


def check_engine(
    recipe: Recipe, targets: Targets, tensors: Mapping[str, TensorInfo | TensorLayout], config: Mapping[str, Any]
) -> list[str]:
    """The engine's warnings about the planned output, for the report; nothing is read or written.

    tensors: those of the source; config: the output's config.json without quantization_config.
    UserError where the format cannot describe the result, or the recipe's engine would refuse it.
    """
    if recipe.gguf is not None:  # each tensor's header says its type, and llama.cpp alone reads it
        return []
    format_, engine = FORMATS[recipe.output.format], recipe.output.engine
    settings = quantization_config(targets, format_)
    if engine is None:
        return []
    found = planned_findings(recipe, targets, tensors, {**config, "quantization_config": settings}, engine)
    if refused := [f"{f.where}: {f.message}; {f.remedy}" for f in found if f.level == "error"]:
        where = f"{engine}{f' on {recipe.output.tp} devices' if recipe.output.tp > 1 else ''}"
        advice = "or set output.engine to null if it is for something else"
        raise UserError("\n".join([f"{where} would not load what this recipe makes:", *refused, advice]))
    warnings = [f"{engine}: {f.where}: {f.message}; {f.remedy}" for f in found if f.level == "warning"]
    if targets.kv is not None and targets.stored_kv is None:
        warnings.append(f"{engine} does not read a {targets.kv} cache and keeps its own; only quantkit simulates it")
    return warnings


def planned_findings(
    recipe: Recipe,
    targets: Targets,
    tensors: Mapping[str, TensorInfo | TensorLayout],
    config: Mapping[str, Any],
    engine: str,
    hardware: str | None = None,
) -> list[Finding]:
    """What `verify` will find in the folder that a recipe makes, in that engine and on that hardware; worst first.

    config: of the output, its quantization_config included
    """
    planned = {
        layout.name: layout for unit in file_layout(tensors, targets, FORMATS[recipe.output.format]) for layout in unit
    }
    shapes = {linear.name: linear.shape for linear in targets.linears}
    return verify_layout(planned, shapes, config, engine, recipe.output.tp, hardware=hardware)


def check_result(recipe: Recipe, folder: Path) -> None:
    """RunError if the engine would refuse what lies in the folder: the values of its scales, or a fault of ours."""
    if recipe.output.engine is None:
        return
    found = verify_folder(folder, recipe.output.engine, recipe.output.tp)
    wrong = [f"{f.where}: {f.message}" for f in found.findings if f.level == "error"]
    if wrong:
        raise RunError("\n".join([f"{folder} was written, but {recipe.output.engine} would refuse it:", *wrong]))
