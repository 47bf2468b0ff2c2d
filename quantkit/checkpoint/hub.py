"""Finds a model's folder, here or on the Hub. The Hub's library is imported only when it is asked, torch never."""

from functools import cache
from pathlib import Path

from quantkit.checkpoint.model_folder import check_model_folder, local_folder, nearby
from quantkit.checkpoint.model_kind import check_causal
from quantkit.errors import UserError
from quantkit.library_output import quiet_logs
from quantkit.paths import user_path

ANSWER_SECONDS = 5.0
SETTINGS = ("*.json", "*.py")
WEIGHT_FILES = ("*.safetensors", *SETTINGS, "*.txt", "*.model", "*.jinja")


def locate_config(name: str | None) -> Path:
    """The folder of a model; of a Hub id its JSON files alone are downloaded."""
    return locate_model(name, weights=False)


def locate_model(name: str | None, *, weights: bool = True) -> Path:
    """The folder of a causal language model, downloaded from the Hub where `name` is an id and not a folder.

    Weights are fetched only after config.json has shown that the model is of the right kind.
    UserError for a path that is not a model folder, for another kind of model, and for an id that the Hub does not
    deliver.
    """
    if name is None:
        raise UserError("no model: pass --model FOLDER_OR_HUB_ID, or set `model:` in the recipe")
    if (folder := local_folder(name)) is not None:
        check_causal(folder)
        return folder
    folder = _download(name, SETTINGS)
    if not (folder / "config.json").exists():
        what, more = "no config.json", ""
        if "gguf" in name.lower():
            what = "GGUF files, whose weights were rounded already"
            more = f"; `hf download {name}` fetches the files, which `quantkit inspect`, `verify` and `eval` read"
        raise UserError(f"{name}: this Hub repository holds {what}\nhint: give the id of the original model{more}")
    check_causal(folder)
    if weights:
        folder = _download(name, WEIGHT_FILES)
        if not any(folder.glob("*.safetensors")):
            folder = _download(name, (*WEIGHT_FILES, "pytorch_model*.bin"))
        check_model_folder(folder)
    return folder


@cache
def _download(name: str, patterns: tuple[str, ...]) -> Path:
    """The snapshot of a Hub id with these files; asked for once in a process, which then works on one revision."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        with quiet_logs():  # retries and the like; what comes of them is said below
            there = _answers(name)
            return Path(snapshot_download(name, allow_patterns=list(patterns), local_files_only=not there))
    except (HFValidationError, HfHubHTTPError, OSError) as error:  # offline it is a LocalEntryNotFoundError, an OSError
        near = nearby(Path(name)) if Path(name).parent.is_dir() else ""
        raise UserError(f"model {name!r}: no folder here{near}; {_refusal(name, error)}") from error


def readme_of(name: str) -> str | None:
    """The model card of a folder or a Hub id; None where there is none, or the Hub does not answer."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        if (folder := user_path(name)).is_dir():
            file: object = folder / "README.md"
        elif not isinstance(file := try_to_load_from_cache(name, "README.md"), str) and _answers(name):
            with quiet_logs():
                file = hf_hub_download(name, "README.md")
        return Path(file).read_text(encoding="utf-8") if isinstance(file, str | Path) else None
    except (HFValidationError, HfHubHTTPError, OSError, ValueError):  # no such name, no such file, not UTF-8
        return None


def revision(folder: Path) -> str | None:
    """The commit of a folder in the Hub's cache; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


@cache
def _answers(name: str) -> bool:
    """Whether the Hub answers within seconds; HfHubHTTPError where it refuses. Downloads retry for minutes."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().model_info(name, timeout=ANSWER_SECONDS)
    except HFValidationError:
        raise
    except HfHubHTTPError as error:
        if error.response.status_code >= 500:  # the Hub is down: what the cache holds may do
            return False
        raise
    except Exception:  # no network, no answer, or offline by choice: each library beneath has errors of its own
        return False
    return True


def _refusal(name: str, error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    match error:
        case GatedRepoError():
            return (
                "the Hub gives it only to those who accepted its terms"
                f"\nhint: accept them at https://huggingface.co/{name} and log in with `hf auth login`"
            )
        case RepositoryNotFoundError():
            return (
                "the Hub has no such model, or it is private"
                "\nhint: check the name, or log in with `hf auth login` where it is private"
            )
        case LocalEntryNotFoundError():
            return (
                "the Hub cannot be reached and the cache does not hold it"
                f"\nhint: check the name and the connection, or fetch it elsewhere with `hf download {name}`"
            )
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"the Hub did not deliver it ({reason})\nhint: check the name, or give the path of a model folder"
