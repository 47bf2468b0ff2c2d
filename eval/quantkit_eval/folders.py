"""What evaluation needs from a model folder, each with one clear error: configuration, tokenizer, model."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint.model_folder import check_model_folder
from quantkit.errors import RunError, UserError


def read_config(path: str | Path) -> dict[str, Any]:
    """config.json of a model folder; UserError when there is none."""
    folder = Path(path).expanduser()
    check_model_folder(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'}: not a JSON object")
    return config


def check_context(path: str | Path, config: dict[str, Any], context: int) -> None:
    """UserError when windows of `context` tokens have more positions than the model knows."""
    text_config = config.get("text_config") or config
    limit = text_config.get("max_position_embeddings") or text_config.get("n_positions")
    if isinstance(limit, int) and context > limit:
        raise UserError(f"context {context} is longer than the {limit} positions of {path}")


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> Any:
    """The folder's own tokenizer."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # transformers raises anything from OSError to KeyError here
        raise UserError(f"{path}: its tokenizer cannot be loaded: {_first_line(error)}") from error


def check_tokenizers(path: str | Path, tokenizer: Any, ref: str | Path, other: Any, content: str) -> None:
    """UserError unless both cut `content` alike: a divergence between distributions over other tokens means nothing."""
    if tokenizer.get_vocab() != other.get_vocab():
        raise UserError(f"the tokenizers of {path} and {ref} have different vocabularies: KL would mean nothing")
    ids, other_ids = (t(content, add_special_tokens=False, verbose=False)["input_ids"] for t in (tokenizer, other))
    if ids != other_ids:
        raise UserError(f"the tokenizers of {path} and {ref} cut this text differently: KL would mean nothing")


def load_model(path: str | Path, device: str = "cpu", trust_remote_code: bool = False) -> Any:
    """The model of a folder, plain or quantized: in float32 on a CPU, in its own dtype elsewhere.

    UserError where the folder cannot be loaded, or some of its weights would be random.
    """
    from transformers.utils.logging import disable_progress_bar

    from quantkit.runtime.load import load

    if not sys.stderr.isatty():
        disable_progress_bar()
    dtype = torch.float32 if torch.device(device).type == "cpu" else None
    try:
        return load(path, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    except (UserError, RunError):
        raise
    except Exception as error:  # anything that transformers makes of a broken folder
        raise UserError(f"{path}: not a model that transformers can load: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
