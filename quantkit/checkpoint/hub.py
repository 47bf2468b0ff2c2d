"""Finds a model's folder, here or on the Hub, and its tokenizer."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from quantkit.checkpoint.model_folder import check_model_folder, local_folder, nearby
from quantkit.errors import UserError

WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def locate_config(name: str | None) -> Path:
    """The folder of a model; of a Hub id its JSON files alone are downloaded."""
    return locate_model(name, weights=False)


def locate_model(name: str | None, *, weights: bool = True) -> Path:
    """The folder of a model, downloaded from the Hub where `name` is an id and not a folder.

    UserError for a path that is not a model folder, and for an id that the Hub does not deliver.
    """
    if name is None:
        raise UserError("no model: pass --model FOLDER_OR_HUB_ID or set `model:` in the recipe")
    folder = local_folder(name)
    if folder is not None:
        return folder
    try:
        if not weights:
            folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.py"]))
        else:
            folder = Path(snapshot_download(name, allow_patterns=WEIGHT_FILES))
            if not any(folder.glob("*.safetensors")):
                folder = Path(snapshot_download(name, allow_patterns=[*WEIGHT_FILES, "pytorch_model*.bin"]))
    except (HFValidationError, HfHubHTTPError, OSError) as error:  # offline it is a LocalEntryNotFoundError, an OSError
        raise UserError(f"model {name!r}: no folder here{nearby(Path(name))}; {_refusal(name, error)}") from error
    check_model_folder(folder)
    return folder


def revision(folder: Path) -> str | None:
    """The commit of a folder in the Hub's cache; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def _refusal(name: str, error: Exception) -> str:
    match error:
        case GatedRepoError():
            return f"the Hub gives it only to those who accepted its terms: see https://huggingface.co/{name}"
        case RepositoryNotFoundError():
            return "the Hub has no such model, or it is private: check the name, or log in with `hf auth login`"
        case LocalEntryNotFoundError():
            return (
                "the Hub cannot be reached and the cache does not hold it: "
                f"check the name and the connection, or fetch it elsewhere with `hf download {name}`"
            )
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"the Hub did not give it to us ({reason})"


def locate_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The model folder's own tokenizer; UserError where it has none that loads."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizer files fail in many ways, all of them the folder's
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{folder}: the tokenizer needs its own Python code; pass --trust-remote-code if you trust it"
            ) from error
        if not any((folder / name).exists() for name in TOKENIZERS):
            raise UserError(
                f"{folder}: no tokenizer (tokenizer.json or tokenizer.model), and calibration needs one; copy the "
                "tokenizer files of the original model into the folder"
            ) from error
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: the tokenizer does not load ({first}); calibration needs it") from error
