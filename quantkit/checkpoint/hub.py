"""Finds a model's folder, here or on the Hub, and its tokenizer."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from quantkit.errors import UserError

WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]


def locate_config(model: str | None) -> Path:
    """The folder of a model, of which config.json is enough; for a Hub id only its JSON and Python files are fetched.

    UserError as in `locate_model`.
    """
    return locate_model(model, weights=False)


def locate_model(model: str | None, *, weights: bool = True) -> Path:
    """The folder of a model: the folder itself, or for a Hub id the snapshot downloaded from there.

    UserError where there is no model, no such folder, or where the Hub does not deliver it.
    """
    if model is None:
        raise UserError("no model: pass --model FOLDER_OR_HUB_ID or set `model:` in the recipe")
    path = Path(model).expanduser()
    if path.exists():
        return path
    if model.count("/") > 1 or model.startswith((".", "/", "~")) or model.endswith("/"):
        raise UserError(f"model folder {model} does not exist")
    try:
        if not weights:
            return Path(snapshot_download(model, allow_patterns=["*.json", "*.py"]))
        found = Path(snapshot_download(model, allow_patterns=WEIGHT_FILES))
        if not any(found.glob("*.safetensors")):
            found = Path(snapshot_download(model, allow_patterns=[*WEIGHT_FILES, "pytorch_model*.bin"]))
        return found
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"model {model!r} is no folder here, and the Hub does not deliver it ({reason}); check the name or the path"
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
