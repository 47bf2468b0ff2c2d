"""What generation refuses before torch is imported: a mistake is answered in a fraction of a second."""

from pathlib import Path

from quantkit.cache_spec import cache_named
from quantkit.checkpoint.gguf_path import open_found
from quantkit.checkpoint.header import read_json
from quantkit.checkpoint.hub import locate_model
from quantkit.checkpoint.model_folder import check_tokenizer, local_folder
from quantkit.checkpoint.model_kind import check_causal
from quantkit.device_names import check_device_name
from quantkit.errors import UserError
from quantkit.formats.gguf.described_file import describe_file
from quantkit.suggestions import unknown

DTYPES = ("auto", "float32", "bfloat16", "float16")
SPECULATIONS = ("ngram",)
NO_TEMPLATE = "it has no chat template\nhint: leave out --chat, and give a text that it goes on with"


def check_engine_options(
    model: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    draft: str | None = None,
    speculate: str | None = None,
    kv_cache: str | None = None,
    chat: bool = False,
) -> None:
    """UserError for what names, paths and JSON files show to be wrong.

    chat: the model must have a chat template. The Hub is asked last, after all that can be answered here.
    """
    check_device_name(device)
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if speculate is not None and speculate not in SPECULATIONS:
        raise unknown("speculation", speculate, SPECULATIONS)
    if speculate is not None and draft is not None:
        raise UserError("--speculate and --draft are both given\nhint: guesses come from one of them")
    if kv_cache not in (None, "auto"):
        cache_named(kv_cache)
    names = [model] if draft is None else [model, draft]
    for name in [name for name in names if not _check_here(name, chat and name is model)]:
        _check_folder(name, locate_model(name), chat and name is model)


def _check_here(name: str, chat: bool) -> bool:
    """Judge the folder or file of this name; False where only the Hub can have it."""
    if (file := open_found(name)) is not None:
        describe_file(file)
        if chat and not file.metadata.get("tokenizer.chat_template"):
            raise UserError(f"{name}: {NO_TEMPLATE}")
        return True
    if (folder := local_folder(name)) is None:
        return False
    check_causal(folder)
    _check_folder(name, folder, chat)
    return True


def _check_folder(name: str, folder: Path, chat: bool) -> None:
    check_tokenizer(folder)
    if chat and not has_chat_template(folder):
        raise UserError(f"{name}: {NO_TEMPLATE}")


def has_chat_template(folder: Path) -> bool:
    """Whether a model folder's tokenizer says how a chat is written."""
    if (folder / "chat_template.jinja").exists() or (folder / "chat_template.json").exists():
        return True
    file = folder / "tokenizer_config.json"
    return file.exists() and bool(read_json(file, "copy it from the original model").get("chat_template"))
