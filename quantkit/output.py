"""Where a run reads from and what it leaves beside the weights: config, tokenizer files, report."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.writer import copy_side_files
from quantkit.errors import RunError, UserError
from quantkit.plan import Plan
from quantkit.recipe import Recipe
from quantkit.rotate import Rotator
from quantkit.runtime.load import OWN_CACHE

REPORT = "quantkit-report.json"
WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]


def check_output(output: Path) -> None:
    """Refuse a target that exists (nothing is ever overwritten) or cannot be made."""
    if output.exists():
        what = "a finished quantkit run" if (output / REPORT).exists() else "not ours"
        raise UserError(f"{output} exists ({what}) and is never overwritten; choose another --output or move it away")
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{output} cannot be made: {parent} is not a folder that may be written to")


def locate_config(recipe: Recipe) -> Path:
    """The folder of recipe.model; of a Hub id its JSON files alone are downloaded."""
    return locate_model(recipe, weights=False)


def locate_model(recipe: Recipe, *, weights: bool = True) -> Path:
    """The folder of recipe.model, downloaded from the Hub where it is an id and not a folder."""
    if recipe.model is None:
        raise UserError("no model: pass --model FOLDER_OR_HUB_ID or set `model:` in the recipe")
    path = Path(recipe.model).expanduser()
    if path.exists():
        return path
    if recipe.model.count("/") > 1 or recipe.model.startswith((".", "/", "~")) or recipe.model.endswith("/"):
        raise UserError(f"model folder {recipe.model} does not exist")
    try:
        if not weights:
            return Path(snapshot_download(recipe.model, allow_patterns=["*.json", "*.py"]))
        found = Path(snapshot_download(recipe.model, allow_patterns=WEIGHT_FILES))
        if not any(found.glob("*.safetensors")):
            found = Path(snapshot_download(recipe.model, allow_patterns=[*WEIGHT_FILES, "pytorch_model*.bin"]))
        return found
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"model {recipe.model!r} is neither a folder here nor a model the Hub gave us ({reason})"
        ) from error


def locate_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The model folder's own tokenizer; UserError where it has none that loads."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizer files fail in many ways, all of them the folder's
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{folder}: the tokenizer needs its own Python code; pass --trust-remote-code if you trust it"
            ) from error
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: the tokenizer does not load ({first}); calibration needs it") from error


def write_side_files(
    checkpoint: Checkpoint,
    folder: Path,
    format_: Any,
    plan: Plan,
    rotation: Rotator | None = None,
) -> None:
    """config.json with quantization_config, tokenizer and generation files byte for byte."""
    copy_side_files(checkpoint.folder, folder)
    schemes = {linear.name: linear.scheme for linear in plan.linears}
    config = dict(checkpoint.config) if rotation is None else rotation.config(checkpoint.config)
    skipped = [name for name, _ in plan.skipped]
    stored = plan.kv if plan.kv_scales else None
    config["quantization_config"] = format_.config(schemes, skipped, stored)
    if plan.kv is not None and stored is None:  # no engine's format speaks of it: for quantkit's own runtime
        config[OWN_CACHE] = asdict(plan.kv)
    said = format_.read_config(config["quantization_config"], [*schemes, *skipped])
    if said != schemes:
        wrong = sorted(name for name in said.keys() | schemes if said.get(name) != schemes.get(name))
        raise RunError(f"config.json would describe {', '.join(wrong[:3])} as something else than what was written")
    for name, content in format_.files(config["quantization_config"]).items():
        write_json(folder / name, content)
    write_json(folder / "config.json", config)


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """quantkit-report.json beside the checkpoint."""
    write_json(folder / REPORT, report)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file and return once it is on the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def versions() -> dict[str, str]:
    """Versions that may change a run's bytes."""
    try:
        own = version("quantkit")
    except PackageNotFoundError:  # run from a checkout that was never installed
        own = "checkout"
    return {"quantkit": own, "torch": torch.__version__, "transformers": transformers.__version__}
