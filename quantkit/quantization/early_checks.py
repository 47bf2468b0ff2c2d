"""Refusals that need neither torch nor transformers: a mistake is answered in a fraction of a second.

The command asks before it imports torch, the pipeline asks again for those who call it from Python.
"""

import sys
from pathlib import Path
from typing import Any

from quantkit.checkpoint.header import read_json
from quantkit.checkpoint.hub import locate_config, locate_model
from quantkit.checkpoint.journal import read_key, refuse_changed, refuse_foreign
from quantkit.checkpoint.model_folder import check_tokenizer, local_folder
from quantkit.checkpoint.model_kind import check_causal
from quantkit.checkpoint.output_folder import check_output, side_files, versions
from quantkit.checkpoint.quantization_config import refuse_quantized
from quantkit.checkpoint.reader import Checkpoint
from quantkit.device_names import check_device_name
from quantkit.errors import UserError
from quantkit.formats.gguf.tensor_names import architecture
from quantkit.quantization.calibration.sources import check_reachable, check_sources
from quantkit.quantization.gguf_checks import check_gguf
from quantkit.recipe.recipe import Recipe

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")


def check_before_torch(
    recipe: Recipe, output: Path, *, device: str = "auto", restart: bool = False, calibrated: bool = True
) -> Path:
    """The model's folder; UserError for whatever is wrong with a run that paths, names and JSON show.

    calibrated: the recipe's own calibration text will be read (False: tokens are given in its place).
    The Hub is asked last, after all that can be answered here.
    """
    check_output(output)
    check_device_name(device)
    if recipe.model is None:
        raise UserError("no model: pass --model FOLDER_OR_HUB_ID, or set `model:` in the recipe")
    calibrated = calibrated and recipe.calibration is not None
    if (folder := local_folder(recipe.model)) is not None:
        check_output(output, folder)
        check_folder(recipe, folder, calibrated)
    if calibrated and recipe.calibration is not None:
        check_sources(recipe.calibration)
    refuse_foreign(partial_folder(output))
    if not restart:
        _check_unfinished(recipe, partial_folder(output), device)
    if folder is None:
        folder = locate_model(recipe.model)
        check_folder(recipe, folder, calibrated)
    if calibrated and recipe.calibration is not None and "torch" not in sys.modules:  # else reading it is as fast
        check_reachable(recipe.calibration)
    return folder


def check_plan(recipe: Recipe) -> Path:
    """The model's folder, of which config.json is enough; UserError for a model that `quantize` would refuse by it."""
    folder = locate_config(recipe.model)
    check_planned(recipe, folder)
    if recipe.calibration is not None:
        check_sources(recipe.calibration)
    return folder


def check_planned(recipe: Recipe, folder: Path) -> None:
    """As `check_folder`, for one that may hold config.json alone."""
    if has_weights(folder):
        check_folder(recipe, folder, recipe.calibration is not None)
    else:
        check_causal(folder)
        config = read_json(folder / "config.json", "give a model folder")
        refuse_quantized(Checkpoint(folder, config, {}))
        if recipe.gguf is not None:
            architecture(config)


def has_weights(folder: Path) -> bool:
    """Whether a model folder holds any file of weights."""
    return any(any(folder.glob(pattern)) for pattern in WEIGHTS)


def check_given(recipe: Recipe, output: Path, checkpoint: Checkpoint, *, device: str, restart: bool) -> None:
    """The same for a model that is not read from recipe.model: UserError for whatever is wrong with it or `output`."""
    check_output(output)
    check_device_name(device)
    check_causal(checkpoint.folder)
    refuse_quantized(checkpoint)
    check_gguf(recipe, checkpoint.config, checkpoint.tensors)
    refuse_foreign(partial_folder(output))
    if not restart:
        _check_unfinished(recipe, partial_folder(output), device)


def partial_folder(output: Path) -> Path:
    """Where a run works until it is finished."""
    return output.with_name(output.name + ".partial")


def check_folder(recipe: Recipe, folder: Path, calibrated: bool) -> None:
    """UserError for a model folder that a run would refuse; calibrated: it needs a tokenizer to read text."""
    check_causal(folder)
    checkpoint = Checkpoint.open(folder)
    refuse_quantized(checkpoint)
    side_files(folder)
    check_gguf(recipe, checkpoint.config, checkpoint.tensors)
    if calibrated or recipe.gguf is not None:  # a GGUF holds its tokenizer
        check_tokenizer(folder)


def _check_unfinished(recipe: Recipe, partial: Path, device: str) -> None:
    """UserError where an unfinished run of the same name had another recipe, other versions or another device."""
    if (old := read_key(partial)) is None:
        return
    new: dict[str, Any] = {"recipe": recipe.settings(), "versions": versions()}
    if device != "auto":
        new["device"] = device.partition(":")[0]
    refuse_changed({name: old.get(name) for name in new}, new, partial)
