"""The Python entry: `quantkit.quantize` for a folder, a Hub id, or a module in memory."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from quantkit.errors import UserError
from quantkit.quantization import pipeline
from quantkit.recipe import load as recipes
from quantkit.recipe.recipe import Recipe
from quantkit.runtime.load import load


def quantize(
    model: str | Path | nn.Module | None,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    output: str | Path | None = None,
    *,
    tokenizer: Any = None,
    calibration_ids: Tensor | None = None,
    device: str = "auto",
    restart: bool = False,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> dict[str, Any] | tuple[dict[str, Any], nn.Module]:
    """Quantize `model` by `recipe` (a shipped name, a file, plain data or a Recipe).

    model   folder or Hub id (None: the recipe's own): writes `output`, returns the report.
            A transformers module: it is left as it was; returns (report, quantized module) with packed weights.
            It needs a `tokenizer` or calibration_ids where the recipe calibrates. `output` may then be None.
    calibration_ids  [samples, seq] token ids that stand in for the recipe's calibration text
    Raises UserError for bad input, RunError for a failed run.
    """
    plain = _recipe(recipe, None if isinstance(model, nn.Module) or model is None else str(model))
    options = {
        "device": device,
        "restart": restart,
        "trust_remote_code": trust_remote_code,
        "progress": progress,
        "calibration_ids": calibration_ids,
    }
    if not isinstance(model, nn.Module):
        if output is None:
            raise UserError("quantize needs an output folder when the model is a folder or a Hub id")
        return pipeline.quantize(plain, Path(output), **options)
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"{type(model).__name__} is not a transformers model: pass a PreTrainedModel, a folder or a Hub id"
        )
    # transformers alone knows how to name and split its parameters in files, so a module goes through a folder.
    with tempfile.TemporaryDirectory(prefix="quantkit-") as scratch:
        source = Path(scratch) / "source"
        model.save_pretrained(source)
        if tokenizer is not None:
            tokenizer.save_pretrained(source)
        target = Path(scratch) / "quantized" if output is None else Path(output)
        report = pipeline.quantize(plain.model_copy(update={"model": str(source)}), target, **options)
        quantized = load(target, device=str(model.device), trust_remote_code=trust_remote_code)
        return report, quantized


def _recipe(recipe: str | Path | Mapping[str, Any] | Recipe, model: str | None) -> Recipe:
    if isinstance(recipe, Mapping):
        recipe = recipes.from_data(recipe)
    if isinstance(recipe, Recipe):
        return recipe if model is None else recipe.model_copy(update={"model": model})
    return recipes.load(recipe, model=model)
