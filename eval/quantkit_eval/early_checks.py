"""Refusals that need neither torch nor transformers: a mistake is answered in a fraction of a second."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quantkit.api import is_module
from quantkit.cache_spec import cache_named
from quantkit.checkpoint.gguf_header import GgufFile
from quantkit.checkpoint.gguf_path import open_found
from quantkit.checkpoint.header import read_json
from quantkit.checkpoint.hub import locate_model
from quantkit.checkpoint.model_folder import check_tokenizer, local_folder
from quantkit.checkpoint.model_kind import check_causal
from quantkit.device_names import check_device_name
from quantkit.errors import UserError
from quantkit.formats.gguf.described_file import describe_file
from quantkit.suggestions import unknown
from quantkit_eval.texts import check_text

ENGINES = ("llama.cpp", "paged")
ACCEPTANCE_CONTEXT = 8  # half of it is a prompt, and the first and the last token behind that are not guessed
BOS = ("auto", "always", "never")
INSTALL = (
    "--engine llama.cpp needs llama-cpp-python, which is not installed\n"
    "hint: pip install llama-cpp-python (it compiles llama.cpp), or leave out --engine"
)


def check_before_torch(
    model: Any,
    ref: Any,
    texts: Sequence[str | Path],
    *,
    context: int,
    tokens: int | None = None,
    device: str = "auto",
    bos: str = "auto",
    engine: str | None = None,
    kv_cache: str | None = None,
    acceptance: bool = False,
) -> tuple[Path | None, Path | None]:
    """The folders (of GGUF: the files) of the model and of its original; UserError for what names and JSON show.

    model, ref: paths or names, or modules in memory, which have no folder: None. ref None: there is no original.
    The Hub is asked last, after all that can be answered here.
    """
    for what, value in (("model", model), ("ref", ref)):
        if not isinstance(value, str | Path) and not is_module(value) and not (what == "ref" and value is None):
            raise UserError(f"{what}: found {type(value).__name__}, expected a path or a name")
    check_windows(texts, context, tokens)
    if bos not in BOS:
        raise UserError(f"bos is {bos!r}; expected {', '.join(BOS[:-1])} or {BOS[-1]}")
    if kv_cache is not None:
        if not isinstance(kv_cache, str):
            raise UserError(f"kv_cache: found {type(kv_cache).__name__}, expected a name like int8")
        cache_named(kv_cache)
        if engine == "llama.cpp":
            raise UserError("llama.cpp has a cache of its own\nhint: leave out --kv-cache, or leave out --engine")
    if acceptance:
        _check_acceptance(ref, engine, context)
    check_device_name(device)
    names = [value for value in (model, ref) if value is not None and not is_module(value)]
    for what, value in (("model", model), ("ref", ref)):
        if is_module(value):
            _check_module(what, value, context, {"engine": engine, "kv_cache": kv_cache, "acceptance": acceptance})
    opened = [open_found(name) for name in names]
    files = [None if file is None else file.path for file in opened]
    _check_engine(engine, model, files[0] if names else None)
    for name, file in zip(names, opened, strict=True):
        if file is not None:
            _check_file(name, file, context, decoded=engine != "llama.cpp" or name is not model)
        elif (folder := local_folder(str(name))) is not None:
            _check_folder(name, folder, context)
    folders = [file or locate_model(str(name)) for name, file in zip(names, files, strict=True)]
    for name, folder, file in zip(names, folders, files, strict=True):
        if file is None:
            _check_folder(name, folder, context)
    found = iter(folders)
    return tuple(None if value is None or is_module(value) else next(found) for value in (model, ref))  # type: ignore[return-value]


def text_names(text: Any) -> list[Any]:
    """One text or several, as a list."""
    return list(text) if isinstance(text, Sequence) and not isinstance(text, str) else [text]


def check_windows(texts: Sequence[Any], context: Any, tokens: Any) -> None:
    """UserError for texts that do not exist, and for windows that cannot be cut."""
    for what, value in (("context", context), ("tokens", tokens)):
        if (not isinstance(value, int) or isinstance(value, bool)) and not (what == "tokens" and value is None):
            raise UserError(f"{what}: found {value!r}, expected a whole number")
    if not texts:
        raise UserError("no text to evaluate on\nhint: give a text file, or `general`")
    for text in texts:
        if not isinstance(text, str | Path):
            raise UserError(f"text: found {type(text).__name__}, expected a path or a name")
        check_text(text)
    if context < 2:
        raise UserError(f"context must be at least 2 tokens, got {context}")
    if tokens is not None and tokens < 2 * context:
        raise UserError(
            f"tokens: {tokens}, but two windows of {context} need {2 * context}\nhint: give more, or a smaller context"
        )


def _check_module(what: str, module: Any, context: int, options: dict[str, Any]) -> None:
    """UserError for a module that is no language model of transformers, and for what only folders can be given."""
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "get_text_config"):
        hint = f"pass {what}.module" if hasattr(module, "module") else "pass a causal language model, or a folder"
        raise UserError(f"{what} is a {type(module).__name__}, not a model of transformers\nhint: {hint}")
    if given := next((name for name, value in options.items() if value), None):
        raise UserError(f"{given}= is for folders, and {what} is a module\nhint: leave it out, or save the model first")
    _check_positions(what, getattr(config.get_text_config(), "max_position_embeddings", None), context)


def positions_of(config: dict[str, Any]) -> int | None:
    """How many tokens a model reads, by its config.json; None where that does not say."""
    text_config = config.get("text_config") or config
    found = text_config.get("max_position_embeddings") or text_config.get("n_positions")
    return found if isinstance(found, int) else None


def _check_positions(name: str | Path, limit: Any, context: int) -> None:
    """UserError for windows longer than what a model reads, where it says how much that is."""
    if isinstance(limit, int) and context > limit:
        raise UserError(f"context {context} is longer than the {limit} positions of {name}")


def _check_acceptance(ref: Any, engine: str | None, context: int) -> None:
    if ref is None:
        raise UserError("acceptance is of guesses for an original, and there is none\nhint: name it with --ref")
    if engine == "llama.cpp":
        raise UserError("acceptance is found by the paged engine, not by llama.cpp\nhint: leave out --engine")
    if context < ACCEPTANCE_CONTEXT:
        raise UserError(f"context must be at least {ACCEPTANCE_CONTEXT} tokens for acceptance, got {context}")


def _check_engine(engine: str | None, model: str | Path, file: Path | None) -> None:
    if engine in (None, "paged"):
        return
    if engine != "llama.cpp":
        raise unknown("engine", engine, ENGINES)
    if file is None:
        raise UserError(
            f"--engine llama.cpp runs GGUF files, and {model} is none\n"
            "hint: leave out --engine; `quantkit quantize --recipe gguf-q4_k_m` makes a GGUF file"
        )
    check_installed()


def check_installed() -> None:
    """UserError where llama-cpp-python cannot be found; nothing is imported."""
    if find_spec("llama_cpp") is None:
        raise UserError(INSTALL)


def _check_file(name: str | Path, file: GgufFile, context: int, *, decoded: bool) -> None:
    """A GGUF file that is long enough; decoded: whether it must also be one that quantkit decodes."""
    if decoded:
        describe_file(file)
    _check_positions(name, file.metadata.get(f"{file.metadata['general.architecture']}.context_length"), context)


def _check_folder(name: str | Path, folder: Path, context: int) -> None:
    check_causal(folder)
    config: dict[str, Any] = read_json(folder / "config.json", "give a model folder")
    _check_positions(name, positions_of(config), context)
    check_tokenizer(folder)
