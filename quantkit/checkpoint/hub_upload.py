"""Uploads a folder to the Hub. The Hub's library is imported only when it is asked, torch never."""

import os
from pathlib import Path

from quantkit.errors import RunError, UserError
from quantkit.library_output import quiet_logs

NOT_UPLOADED = [".*", "*/.*", "*.unfinished", "*.partial/*"]
LOGIN = "hint: log in with `hf auth login`, or set HF_TOKEN to a token that may write"


def upload(folder: Path, repository: str, *, private: bool = False) -> str:
    """Make the model repository on the Hub, or take the one that is there, and upload the folder; returns its address.

    private: what a new repository is; one that is there stays as it is. The Hub is the one of HF_ENDPOINT.
    UserError for a name that no repository can have, without a login, and where the Hub refuses; RunError where it
    cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"{repository!r}: not a name of a Hub repository\nhint: give USER/NAME") from error
    hub = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    try:
        with quiet_logs():
            address = hub.create_repo(repository, private=private, exist_ok=True)
            hub.upload_folder(
                repo_id=address.repo_id,
                folder_path=folder,
                commit_message="Upload by quantkit push",
                ignore_patterns=NOT_UPLOADED,
            )
    except LocalTokenNotFoundError as error:
        raise UserError(f"{repository}: the Hub takes files from those who are logged in\n{LOGIN}") from error
    except OfflineModeIsEnabled as error:
        raise UserError(f"{repository}: HF_HUB_OFFLINE is set, and an upload needs the Hub\nhint: unset it") from error
    except HfHubHTTPError as error:
        code = error.response.status_code
        if code in (401, 403) or isinstance(error, RepositoryNotFoundError):
            raise UserError(f"{repository}: the Hub refuses ({code}): {_first_line(error)}\n{LOGIN}") from error
        raise RunError(f"{repository}: the Hub did not take it ({code}): {_first_line(error)}") from error
    except Exception as error:  # no network, no answer: each library beneath has errors of its own
        raise RunError(f"{repository}: the upload failed: {_first_line(error)}") from error
    return str(address)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
