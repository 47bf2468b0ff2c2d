"""The Python entry: `quantkit.quantize` for a folder or a Hub id, `quantkit.quantize_module` for a module in memory."""

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from quantkit.errors import UserError
from quantkit.progress import Mode
from quantkit.quantization import pipeline
from quantkit.recipe import load as recipes
from quantkit.recipe.recipe import Recipe
from quantkit.report.records import Report
from quantkit.runtime.load import load


def quantize(
    model: str | Path | nn.Module | None,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    output: str | Path | None = None,
    *,
    tokenizer: Any = None,
    calibration: Tensor | None = None,
    device: str = "auto",
    restart: bool = False,
    trust_remote_code: bool = False,
    progress: Mode = True,
) -> Report:
    """The report of quantizing `model` by `recipe` (a shipped name, a file, plain data or a Recipe) into `output`.

    model   folder or Hub id (None: the recipe's own). A module is quantized as by `quantize_module`, of which the
            report alone comes back.
    calibration  [samples, seq] token ids that stand in for the recipe's calibration text
    Raises UserError for bad input, RunError for a failed run.
    """
    options = {
        "device": device,
        "restart": restart,
        "trust_remote_code": trust_remote_code,
        "progress": progress,
        "calibration": calibration,
    }
    if isinstance(model, nn.Module):
        return quantize_module(model, recipe, output, tokenizer=tokenizer, **options)[0]
    if output is None:
        raise UserError("quantize needs an output folder when the model is a folder or a Hub id")
    return pipeline.quantize(_recipe(recipe, None if model is None else str(model)), Path(output), **options)


def quantize_module(
    model: nn.Module,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    output: str | Path | None = None,
    *,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> tuple[Report, PreTrainedModel]:
    """The report, and the quantized module with packed weights, of a transformers module; it is left as it was.

    output     folder for the checkpoint; None: it is not kept
    tokenizer  its own, where the recipe calibrates on text; options: as in `quantize`
    Raises UserError for bad input, RunError for a failed run.
    """
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"{type(model).__name__} is not a transformers model; pass a PreTrainedModel, or a folder to quantize"
        )
    # transformers alone knows how to name and split its parameters in files, so a module goes through a folder.
    with tempfile.TemporaryDirectory(prefix="quantkit-") as scratch:
        source = Path(scratch) / "source"
        _save(model, source)
        if tokenizer is not None:
            tokenizer.save_pretrained(source)
        target = Path(scratch) / "quantized" if output is None else Path(output)
        plain = _recipe(recipe, str(source))
        report = pipeline.quantize(plain, target, trust_remote_code=trust_remote_code, **options)
        quantized = load(target, device=str(model.device), trust_remote_code=trust_remote_code)
        if model.can_generate():
            quantized.generation_config = copy.deepcopy(model.generation_config)
        return report, quantized


def _save(model: PreTrainedModel, folder: Path) -> None:
    """Save a module with its generation settings as they are: transformers refuses to save what it would warn about."""
    kept = getattr(model, "generation_config", None)
    if kept is None:
        model.save_pretrained(folder)
        return
    model.generation_config = GenerationConfig()
    try:
        model.save_pretrained(folder)
    finally:
        model.generation_config = kept
    kept.to_json_file(folder / "generation_config.json", use_diff=True)


def _recipe(recipe: str | Path | Mapping[str, Any] | Recipe, model: str | None) -> Recipe:
    if isinstance(recipe, Mapping):
        recipe = recipes.from_data(recipe)
    if isinstance(recipe, Recipe):
        return recipe if model is None else recipe.model_copy(update={"model": model})
    return recipes.load(recipe, model=model)
