"""Refusals that need neither torch nor transformers: a mistake is answered in a fraction of a second."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantkit.checkpoint.header import read_json
from quantkit.checkpoint.hub import locate_model
from quantkit.checkpoint.model_folder import check_tokenizer, local_folder
from quantkit.checkpoint.model_kind import check_causal
from quantkit.device_names import check_device_name
from quantkit.errors import UserError
from quantkit_eval.texts import check_text

BOS = ("auto", "always", "never")


def check_before_torch(
    model: str | Path,
    ref: str | Path | None,
    texts: Sequence[str | Path],
    *,
    context: int,
    tokens: int | None = None,
    device: str = "auto",
    bos: str = "auto",
) -> tuple[Path, Path | None]:
    """The folders of the model and of its original; UserError for what paths, names and JSON show to be wrong.

    The Hub is asked last, after all that can be answered here.
    """
    for what, value in (("model", model), ("ref", ref), *(("text", text) for text in texts)):
        if not isinstance(value, str | Path) and not (what == "ref" and value is None):
            raise UserError(f"{what}: found {type(value).__name__}, expected a path or a name")
    for what, value in (("context", context), ("tokens", tokens)):
        if (not isinstance(value, int) or isinstance(value, bool)) and not (what == "tokens" and value is None):
            raise UserError(f"{what}: found {value!r}, expected a whole number")
    if not texts:
        raise UserError("no text to evaluate on\nhint: give a text file, or `general`")
    for text in texts:
        check_text(text)
    if context < 2:
        raise UserError(f"context must be at least 2 tokens, got {context}")
    if tokens is not None and tokens < 2 * context:
        raise UserError(
            f"tokens: {tokens}, but two windows of {context} need {2 * context}\nhint: give more, or a smaller context"
        )
    if bos not in BOS:
        raise UserError(f"bos is {bos!r}; expected {', '.join(BOS[:-1])} or {BOS[-1]}")
    check_device_name(device)
    names = [model] if ref is None else [model, ref]
    for name in names:
        if (folder := local_folder(str(name))) is not None:
            _check_folder(name, folder, context)
    folders = [locate_model(str(name)) for name in names]
    for name, folder in zip(names, folders, strict=True):
        _check_folder(name, folder, context)
    return folders[0], None if ref is None else folders[1]


def _check_folder(name: str | Path, folder: Path, context: int) -> None:
    check_causal(folder)
    config: dict[str, Any] = read_json(folder / "config.json", "give a model folder")
    text_config = config.get("text_config") or config
    limit = text_config.get("max_position_embeddings") or text_config.get("n_positions")
    if isinstance(limit, int) and context > limit:
        raise UserError(f"context {context} is longer than the {limit} positions of {name}")
    check_tokenizer(folder)
