"""Finds a model's folder, here or on the Hub, and its tokenizer."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from quantkit.errors import UserError
from quantkit.recipe.recipe import Recipe

WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]


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
