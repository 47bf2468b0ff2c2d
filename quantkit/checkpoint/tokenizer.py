"""A model folder's own tokenizer, or one message about why it does not load."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from quantkit.checkpoint.model_folder import COPY_TOKENIZER, check_tokenizer
from quantkit.errors import UserError
from quantkit.library_output import quiet_libraries


def locate_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The model folder's own tokenizer; UserError where it has none that loads."""
    try:
        with quiet_libraries():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # tokenizer files fail in many ways, all of them the folder's
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{folder}: the tokenizer needs its own Python code\nhint: pass --trust-remote-code if you trust it"
            ) from error
        check_tokenizer(folder)
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: the tokenizer does not load ({first})\nhint: {COPY_TOKENIZER}") from error
