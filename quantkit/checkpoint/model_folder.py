"""What a path given as a model is, from names and JSON alone; what is not a model folder is refused by its name.

No torch here: the command line asks before it loads anything heavy.
"""

import difflib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from quantkit.errors import UserError

NEEDED = "quantkit reads Hugging Face model folders: config.json and *.safetensors"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# What wraps a model while it trains, and how to save the model without it.
WRAPPERS = {
    "_orig_mod.": "torch.compile's wrapper: save with `model._orig_mod.save_pretrained(FOLDER)`",
    "module.": "the wrapper of DataParallel or DDP: save with `model.module.save_pretrained(FOLDER)`",
    "_fsdp_wrapped_module.": "FSDP's wrapper: save a full state dict of the unwrapped model",
    "base_model.model.": "PEFT's wrapper: save with `model.merge_and_unload().save_pretrained(FOLDER)`",
}


def local_folder(name: str) -> Path | None:
    """The model folder `name` is; None where `name` can only be a Hub id.

    UserError for a path that does not exist, and for a file, a GGUF or an adapter folder.
    """
    path = Path(name).expanduser()
    if path.exists() or name.startswith((".", "/", "~")) or not HUB_ID.fullmatch(name):
        check_model_folder(path)
        return path
    if path.suffix.lower() in (".gguf", ".safetensors", ".bin", ".json"):
        raise UserError(f"{path}: no such file or folder{nearby(path)}; {NEEDED}")
    return None


def nearby(path: Path) -> str:
    """`; did you mean ...?` with the names beside `path` that resemble its own; nothing where none does."""
    try:
        names = [entry.name for entry in path.absolute().parent.iterdir()]
    except OSError:
        return f"; the folder {str(path.parent)!r} does not exist"
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(str(path.with_name(name)) for name in sorted(near))}?" if near else ""


def check_model_folder(folder: Path) -> None:
    """UserError unless `folder` is a folder with a config.json that can be read; the message names what it is."""
    if folder.is_file():
        raise UserError(f"{folder}: {_file_kind(folder)}")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder{nearby(folder)}; give the path of a Hugging Face model folder")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise UserError(f"{folder}: the folder cannot be read; check its permissions")
    if not (folder / "config.json").exists():
        raise UserError(f"{folder}: {not_a_model(folder)}")


def _file_kind(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            start = stream.read(4)
    except OSError as error:
        return f"this file cannot be read: {error.strerror}"
    if start == b"GGUF" or file.suffix.lower() == ".gguf":
        return _gguf("a GGUF file")
    beside = f"give the folder: {file.absolute().parent}" if (file.parent / "config.json").exists() else NEEDED
    return f"a file, not a model folder; {beside}"


def _gguf(what: str) -> str:
    return f"{what}, llama.cpp's own format, which quantkit does not read; give the folder of the original model"


def not_a_model(folder: Path) -> str:
    """What a folder without config.json or without weights holds instead, and what to do."""
    names = sorted(path.name for path in folder.iterdir())
    if any(name in names for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")):
        return _adapter(folder)
    lower = [name.lower() for name in names]
    weights = any(name.endswith((".safetensors", ".bin")) for name in lower)
    if not weights and any(name.endswith(".gguf") for name in lower):
        return _gguf("a folder of GGUF files")
    if "config.json" in names:
        return "no weights: neither model.safetensors nor pytorch_model.bin, nor an index of either; download them"
    if "model_index.json" in names:
        return f"a diffusers pipeline, not a causal language model; {NEEDED}"
    if "params.json" in names:
        return f"weights in their maker's own format (params.json); give the Hugging Face version; {NEEDED}"
    if weights:
        return "config.json is missing beside the weights; copy it from the original model"
    inner = sorted(
        str(path.parent) for path in [*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")]
    )
    if inner:
        return f"not a model folder itself, but it holds one; give {' or '.join(inner[:3])}"
    held = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "nothing"
    return f"not a model folder: no config.json (it holds {held}); {NEEDED}"


def _adapter(folder: Path) -> str:
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    return (
        f"a PEFT adapter, not a model (base model: {base or 'not named in adapter_config.json'}); merge it into its "
        "base model first: `AutoPeftModelForCausalLM.from_pretrained(ADAPTER).merge_and_unload().save_pretrained"
        "(FOLDER)`, save the tokenizer there too, and give FOLDER"
    )


def check_names(folder: Path, names: Iterable[str]) -> None:
    """UserError where tensor names carry the prefix of a wrapper: torch.compile, DDP, FSDP, PEFT."""
    found = Counter(wrapper for name in names for wrapper in WRAPPERS if _wrapped(name, wrapper))
    for wrapper, count in found.most_common(1):
        raise UserError(
            f"{folder}: {count} tensor names contain `{wrapper}`, {WRAPPERS[wrapper]}, "
            f"or rename the tensors without `{wrapper}`"
        )


def _wrapped(name: str, wrapper: str) -> bool:
    return name.startswith(wrapper) or (wrapper[0] == "_" and f".{wrapper}" in name)


def check_inside(folder: Path, path: Path, who: str) -> None:
    """UserError when path leaves folder by name or link; links into the Hub cache's own blobs are its layout."""
    roots = [folder.resolve()]
    if roots[0].parent.name == "snapshots":
        roots.append(roots[0].parent.parent / "blobs")
    named = Path(os.path.normpath(path))
    if not named.is_relative_to(os.path.normpath(folder)) or not any(path.resolve().is_relative_to(r) for r in roots):
        raise UserError(f"{who}, which lies outside {folder}; put the file itself into the folder if you trust it")
