"""Refusals that need neither torch nor transformers: a mistake is answered in a fraction of a second."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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
    model: str | Path,
    ref: str | Path | None,
    texts: Sequence[str | Path],
    *,
    context: int,
    tokens: int | None = None,
    device: str = "auto",
    bos: str = "auto",
    engine: str | None = None,
    kv_cache: str | None = None,
    acceptance: bool = False,
) -> tuple[Path, Path | None]:
    """The folders (of GGUF: the files) of the model and of its original; UserError for what names and JSON show.

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
    if kv_cache is not None:
        if not isinstance(kv_cache, str):
            raise UserError(f"kv_cache: found {type(kv_cache).__name__}, expected a name like int8")
        cache_named(kv_cache)
        if engine == "llama.cpp":
            raise UserError("llama.cpp has a cache of its own\nhint: leave out --kv-cache, or leave out --engine")
    if acceptance:
        _check_acceptance(ref, engine, context)
    check_device_name(device)
    names = [model] if ref is None else [model, ref]
    opened = [open_found(name) for name in names]
    files = [None if file is None else file.path for file in opened]
    _check_engine(engine, model, files[0])
    for name, file in zip(names, opened, strict=True):
        if file is not None:
            _check_file(name, file, context, decoded=engine != "llama.cpp" or name is not model)
        elif (folder := local_folder(str(name))) is not None:
            _check_folder(name, folder, context)
    folders = [file or locate_model(str(name)) for name, file in zip(names, files, strict=True)]
    for name, folder, file in zip(names, folders, files, strict=True):
        if file is None:
            _check_folder(name, folder, context)
    return folders[0], None if ref is None else folders[1]


def _check_acceptance(ref: str | Path | None, engine: str | None, context: int) -> None:
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
    limit = file.metadata.get(f"{file.metadata['general.architecture']}.context_length")
    if isinstance(limit, int) and context > limit:
        raise UserError(f"context {context} is longer than the {limit} positions of {name}")


def _check_folder(name: str | Path, folder: Path, context: int) -> None:
    check_causal(folder)
    config: dict[str, Any] = read_json(folder / "config.json", "give a model folder")
    text_config = config.get("text_config") or config
    limit = text_config.get("max_position_embeddings") or text_config.get("n_positions")
    if isinstance(limit, int) and context > limit:
        raise UserError(f"context {context} is longer than the {limit} positions of {name}")
    check_tokenizer(folder)
