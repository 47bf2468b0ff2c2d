"""What evaluation needs from a model folder, each with one clear error: tokenizers that agree, a model."""

from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint.tokenizer import locate_tokenizer
from quantkit.errors import RunError, UserError
from quantkit.quantization.calibration.bos import starts_with_bos


def check_tokenizers(
    path: str | Path, tokenizer: Any, ref: str | Path, other: Any, content: str, why: str = "KL would mean nothing"
) -> None:
    """UserError unless both cut `content` alike: a divergence between distributions over other tokens means nothing."""
    if tokenizer.get_vocab() != other.get_vocab():
        raise UserError(f"the tokenizers of {path} and {ref} have different vocabularies: {why}")
    ids, other_ids = (t(content, add_special_tokens=False, verbose=False)["input_ids"] for t in (tokenizer, other))
    if ids != other_ids:
        raise UserError(f"the tokenizers of {path} and {ref} cut this text differently: {why}")


def bos_token(tokenizer: Any, bos: str, name: str) -> int | None:
    """The token that begins each window by the rule `bos` (auto, always, never); None where none does.

    UserError where it is asked for and the tokenizer has none.
    """
    if bos == "always" and getattr(tokenizer, "bos_token_id", None) is None:
        raise UserError(f"{name}: its tokenizer has no begin-of-sequence token\nhint: take bos: auto")
    return starts_with_bos(tokenizer, {"always": True, "never": False}.get(bos, "auto"))


def load_tokenizer(folder: Path, trust_remote_code: bool) -> tuple[Any, list[str]]:
    """The tokenizer of a model's folder, or of a GGUF file, and remarks on where it came from."""
    if folder.is_dir():
        return locate_tokenizer(folder, trust_remote_code), []
    from quantkit.runtime.gguf_tokenizer import gguf_tokenizer

    tokenizer, remark = gguf_tokenizer(folder)
    return tokenizer, [] if remark is None else [remark]


def remarks(folder: Path, engine: str | None) -> list[str]:
    """What a reader of the figures should know about how they were computed."""
    if engine == "llama.cpp":
        return [f"{engine} computed the logits, with the inputs of each product rounded to 8 bits"]
    if folder.is_dir():
        return []
    from quantkit.runtime.gguf_model import ROUNDED_INPUTS

    return [ROUNDED_INPUTS]


def load_model(
    folder: Path, device: torch.device, trust_remote_code: bool = False, dtype: torch.dtype | str | None = None
) -> Any:
    """The model of a folder or a GGUF file, plain or quantized: in float32 on a CPU, in its own dtype elsewhere.

    dtype: another one. UserError where the folder cannot be loaded, or some of its weights would be random.
    """
    from quantkit.library_output import quiet_libraries
    from quantkit.runtime.load import load

    if dtype is None and device.type == "cpu":
        dtype = torch.float32
    try:
        with quiet_libraries():
            return load(folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    except (UserError, RunError):
        raise
    except Exception as error:  # anything that transformers makes of a broken folder
        raise UserError(f"{folder}: not a model that transformers can load: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
