"""What a path given as a model is, from names and JSON alone; what is not a model folder is refused by its name.

No torch here: the command line asks before it loads anything heavy.
"""

import difflib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import UserError
from quantkit.paths import user_path

NEEDED = "give a Hugging Face model folder: config.json beside *.safetensors"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
HUB_URL = re.compile(r"(?:(?:https?|hf):/{1,2})?(?:www\.)?(?:huggingface\.co/|hf\.co/|(?<=hf:/)/?)(.+)")
# What wraps a model while it trains, and how to save the model without it.
WRAPPERS = {
    "_orig_mod.": "torch.compile's wrapper: save with `model._orig_mod.save_pretrained(FOLDER)`",
    "module.": "the wrapper of DataParallel or DDP: save with `model.module.save_pretrained(FOLDER)`",
    "_fsdp_wrapped_module.": "FSDP's wrapper: save a full state dict of the unwrapped model",
    "base_model.model.": "PEFT's wrapper: save with `model.merge_and_unload().save_pretrained(FOLDER)`",
}
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
COPY_TOKENIZER = (
    "copy the tokenizer files of the original model (tokenizer.json, tokenizer_config.json) into the folder"
)
PYTORCH, FLAX = (".bin", ".pth", ".pt", ".ckpt"), (".h5", ".msgpack", ".keras", ".pb", ".tflite", ".npz")
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".zst", ".xz", ".bz2", ".7z")
ORIGINAL = "give the folder of the original model, as Hugging Face transformers saves it"
MERGE = (
    "merge it into its base model first: `AutoPeftModelForCausalLM.from_pretrained(ADAPTER).merge_and_unload()"
    ".save_pretrained(FOLDER)`, save the tokenizer there too, and give FOLDER"
)


@dataclass(frozen=True, slots=True)
class NoModel:
    """Why a path is not a model folder: what it is, and what to do. damaged: it is one, but a part is missing."""

    what: str
    hint: str
    damaged: bool = False

    def __str__(self) -> str:
        return f"{self.what}\nhint: {self.hint}"


def local_folder(name: str) -> Path | None:
    """The model folder `name` is; None where `name` can only be a Hub id.

    UserError for a path that does not exist, for what is not a model folder, and for what cannot be a Hub id either.
    """
    path = user_path(name)
    if path.exists() or path.is_symlink() or name.startswith((".", "/", "~")):
        check_model_folder(path)
        return path
    if url := HUB_URL.fullmatch(name):
        raise UserError(f"{name}: a web address, not a folder or a Hub id\nhint: give the id: {_hub_id(url)}")
    if re.match(r"[a-z0-9]{2,}:/", name):
        raise UserError(f"{name}: a web address\nhint: download the model, and give its folder; or give a Hub id")
    if path.suffix.lower() in (".gguf", ".safetensors", ".json", *PYTORCH, *ARCHIVES):
        raise UserError(f"{path}: no such file or folder{nearby(path)}\nhint: {NEEDED}")
    if "\\" in name or name.count("/") > 1:
        check_model_folder(path)
    if not HUB_ID.fullmatch(name) or len(name) > 96 or re.search(r"--|\.\.|(^|/)[-.]|[-.]($|/)", name):
        raise UserError(
            f"{name}: no such folder{nearby(path)}, and not a Hub id: those are ORG/NAME of letters, digits, `-`, `_` "
            "and `.`\nhint: check the name, or give the path of a Hugging Face model folder"
        )
    return None


def nearby(path: Path) -> str:
    """`; did you mean ...?` with the names beside `path` that resemble its own; nothing where none does."""
    try:
        names = [entry.name for entry in path.absolute().parent.iterdir() if entry.is_dir() or _loadable(entry)]
    except OSError:
        return f"; the folder {str(path.parent)!r} does not exist"
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(str(path.with_name(name)) for name in sorted(near))}?" if near else ""


def _loadable(file: Path) -> bool:
    return file.suffix in (".safetensors", ".gguf")


def check_model_folder(folder: Path) -> None:
    """UserError unless `folder` is a folder with a config.json; the message names what it is, and what to do."""
    if (found := other_kind(folder)) is not None:
        raise UserError(f"{folder}: {found}")
    if not (folder / "config.json").exists():
        raise UserError(f"{folder}: {not_a_model(folder)}")


def other_kind(path: Path) -> NoModel | None:
    """What `path` is where it is not a folder of a whole or damaged model; None where it is one."""
    if path.is_symlink() and not path.exists():
        return NoModel(
            f"a link to {os.readlink(path)}, which does not exist", "repair the link, or give another folder"
        )
    if path.is_file():
        return _file_kind(path)
    if not path.is_dir():
        return _absent(path)
    if not os.access(path, os.R_OK | os.X_OK):
        return NoModel("the folder cannot be read", "check its permissions")
    if (path / "config.json").exists() and not _without_weights(path):
        return None
    found = not_a_model(path)
    return None if found.damaged else found


def _absent(path: Path) -> NoModel:
    if url := HUB_URL.fullmatch(str(path)):
        return NoModel("a web address, not a folder", f"fetch it first: `hf download {_hub_id(url)}` prints its folder")
    hint = "give the path of a Hugging Face model folder"
    if path.suffix.lower() == ".gguf":
        return NoModel(f"no such file{nearby(path)}", "give the path of a GGUF file, or of a Hugging Face model folder")
    if not path.is_absolute() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path), re.ASCII):
        hint += f"; `hf download {path}` fetches one from the Hub and prints where it lies"
    return NoModel(f"no such folder{nearby(path)}", hint)


def _hub_id(url: re.Match[str]) -> str:
    return "/".join(url[1].split("?")[0].split("/")[:2])


def _without_weights(folder: Path) -> bool:
    return not any(path.suffix == ".safetensors" or path.suffix in PYTORCH for path in folder.iterdir())


def _file_kind(file: Path) -> NoModel:
    try:
        with file.open("rb") as stream:
            start = stream.read(512)
    except OSError as error:
        return NoModel(f"this file cannot be read: {error.strerror}", "check its permissions")
    suffix, folder = file.suffix.lower(), file.absolute().parent
    if start[:4] == b"GGUF" or suffix == ".gguf":
        return _gguf("a GGUF file")
    if file.name.startswith("adapter_model.") or (folder / "adapter_config.json").exists():
        return NoModel(f"a PEFT adapter's file, not a model{_base_model(folder)}", MERGE)
    if suffix == ".safetensors":
        what = "a single safetensors file, not a model folder"
    elif suffix in PYTORCH:
        what = "a single PyTorch file, not a model folder"
    elif suffix in (".yaml", ".yml"):
        return NoModel("a YAML file, not a model folder", "a recipe is given as --recipe; the model is a folder")
    elif suffix == ".onnx":
        return NoModel("an ONNX model, which quantkit does not read", ORIGINAL)
    elif suffix in FLAX:
        return NoModel("weights of TensorFlow, Flax or MLX, which quantkit does not read", ORIGINAL)
    elif suffix in ARCHIVES:
        return NoModel("an archive, not a model folder", "unpack it, and give the folder")
    else:
        what = f"a {'text ' if _is_text(start) else ''}file, not a model folder"
    if (folder / "config.json").exists():
        return NoModel(what, f"give the folder: {folder}")
    return NoModel(f"{what}, and there is no config.json beside it", NEEDED)


def _is_text(start: bytes) -> bool:
    return b"\0" not in start and start.decode("utf-8", "replace").count("\ufffd") <= 1


def _gguf(what: str) -> NoModel:
    return NoModel(
        f"{what}, llama.cpp's own format: its weights were rounded already, and are not quantized again",
        f"{ORIGINAL}; `quantkit inspect`, `verify` and `eval` read GGUF files, and llama.cpp loads them",
    )


def not_a_model(folder: Path) -> NoModel:
    """What a folder without config.json or without weights holds instead, and what to do."""
    names = sorted(path.name for path in folder.iterdir())
    ends = {Path(name).suffix.lower() for name in names}
    weights, config = ".safetensors" in ends or not ends.isdisjoint(PYTORCH), "config.json" in names
    if any(name.startswith(("adapter_config.", "adapter_model.")) for name in names):
        return NoModel(f"a PEFT adapter (LoRA), not a model{_base_model(folder)}", MERGE)
    if not weights and ".gguf" in ends:
        return _gguf("a folder of GGUF files")
    if "model_index.json" in names:
        return NoModel("a diffusers pipeline (images, video or sound), not a causal language model", NEEDED)
    if not weights and (".onnx" in ends or any(folder.glob("onnx/*.onnx"))):
        return NoModel("an ONNX model, which quantkit does not read", ORIGINAL)
    if not weights and not ends.isdisjoint(FLAX):
        return NoModel("weights of TensorFlow, Flax or MLX, which quantkit does not read", ORIGINAL)
    if config:
        what = "no weights: neither model.safetensors nor pytorch_model.bin, nor an index of either"
        return NoModel(what, "download or copy the weights into the folder", damaged=True)
    if "modules.json" in names or "config_sentence_transformers.json" in names:
        return NoModel("a sentence-transformers model (text embeddings), not a causal language model", NEEDED)
    if "params.json" in names or any(name.startswith("consolidated.") for name in names):
        return NoModel(
            "weights in their maker's own format (params.json, consolidated.*: Mistral's or Meta's)",
            "give the Hugging Face version of the model: config.json beside model*.safetensors",
        )
    if weights:
        return NoModel("config.json is missing beside the weights", "copy it from the original model", damaged=True)
    places = ("*", "snapshots/*", "*/snapshots/*")
    if inner := sorted(str(path.parent) for place in places for path in folder.glob(f"{place}/config.json")):
        held = "one" if len(inner) == 1 else f"{len(inner)} of them"
        more = ", ..." if len(inner) > 3 else ""
        return NoModel(f"not a model folder itself, but it holds {held}", f"give {' or '.join(inner[:3])}{more}")
    if any(name in (*TOKENIZERS, "tokenizer_config.json") for name in names):
        return NoModel("a tokenizer alone, without a model", NEEDED)
    if not names:
        return NoModel("an empty folder", f"was the download finished? {NEEDED}")
    held = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return NoModel(f"not a model folder: no config.json (it holds {held})", NEEDED)


def check_tokenizer(folder: Path) -> None:
    """UserError where the folder holds nothing a tokenizer could be read from; its own Python code may need nothing."""
    own_code = any(folder.glob("*.tiktoken")) or any(folder.glob("*.py"))
    if not own_code and not any((folder / name).exists() for name in TOKENIZERS):
        what = "no tokenizer: neither tokenizer.json nor tokenizer.model, and text needs one"
        raise UserError(f"{folder}: {what}\nhint: {COPY_TOKENIZER}")


def _base_model(folder: Path) -> str:
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    return f" (base model: {base or 'not named in adapter_config.json'})"


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
