"""A result's folder: never overwritten; its JSON files, side files, hashes and the report's name."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from quantkit.checkpoint.model_folder import check_inside
from quantkit.errors import RunError, UserError
from quantkit.report.records import REPORT

# Weights in any framework's form, what describes them, and what describes another quantization or the source's repo.
WEIGHTS = (
    r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|ot|onnx|onnx_data|gguf|ggml|npz|npy|nemo|tflite|pkl)|.*\.index\.json"
)
STALE = r"(config|quantize_config|quant_config|quantization_config|hf_quant_config|params|adapter_config)\.json"
STALE += r"|recipe\.yaml|quantkit-report\.(json|html)|quantkit-evaluation\.json|readme\.md|\..*"
FOLDERS = {"additional_chat_templates"}

ANOTHER = "hint: choose another --output"


def check_output(output: Path, model: Path | None = None) -> None:
    """Refuse a target that exists (nothing is ever overwritten) or cannot be made; nothing is left behind.

    model: the folder that is read, in which the result may not lie. Folders above the target are made by the run.
    """
    if model is not None and output.resolve() == model.resolve():
        raise UserError(f"{output} is the model itself, which is never overwritten\n{ANOTHER}")
    try:
        exists = output.exists() or output.is_symlink()
    except OSError as error:
        raise UserError(f"{output} cannot be made: {error.strerror}\n{ANOTHER}") from error
    if exists:
        raise UserError(f"{output} exists ({_held(output)}) and is never overwritten\n{ANOTHER}, or move it away")
    if model is not None and output.resolve().is_relative_to(model.resolve()):
        raise UserError(f"{output} lies in the model's own folder {model}, which is only read\n{ANOTHER}")
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"{output} cannot be made: {parent} is a file, not a folder\n{ANOTHER}")
    problem: str | None = None if os.access(parent, os.W_OK | os.X_OK) else "you may not write into that folder"
    try:
        if problem is None:  # a name as long as that of the .partial folder
            os.rmdir(tempfile.mkdtemp(prefix=output.name, dir=parent))
    except OSError as error:
        kernel = parent.parts[1:2] in (("proc",), ("sys",), ("dev",))
        problem = "that is no place for files" if kernel else str(error.strerror)
    if problem is not None:
        raise UserError(f"{output} cannot be made in {parent}: {problem}\n{ANOTHER}, in a folder you may write to")


def _held(output: Path) -> str:
    if not output.exists():
        return "a link to nowhere"
    if output.is_file():
        return "a file"
    if (output / REPORT).exists():
        return "a finished quantkit run"
    return "not written by quantkit" if any(output.iterdir()) else "an empty folder"


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file and return once it is on the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def versions() -> dict[str, str]:
    """Versions that may change a run's bytes, from what is installed: nothing is imported."""
    return {name: _version(name) for name in ("quantkit", "torch", "transformers")}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "checkout"


def side_files(source: Path) -> list[Path]:
    """What is copied beside the weights: all but weights, config.json and what an earlier quantization left; sorted.

    Tokenizers come in too many files to list (spiece.model, *.tiktoken, tekken.json, ...), so everything at the top
    level is copied but weights, indices, and files of an earlier quantization, which engines would pick up.
    UserError for a link that leaves the folder or leads nowhere, and for a file that cannot be read.
    """
    files = [path for path in source.iterdir() if _goes_along(path.name)]
    for folder in FOLDERS:
        files += (source / folder).glob("*")
    kept = []
    for path in sorted(files):
        if path.is_symlink():
            check_inside(source, path, f"{path} is a link to {path.resolve()}")
            if not path.exists():
                raise UserError(f"{path}: a link to {os.readlink(path)}, which does not exist; remove or replace it")
        if path.is_file():
            check_inside(source, path, f"{path} is {path.resolve()}")  # its folder may be a link
            if not os.access(path, os.R_OK):
                raise UserError(f"{path}: cannot be read, and would be copied; check its permissions, or move it away")
            kept.append(path)
    return kept


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy what is neither weights nor config.json byte for byte; returns the sorted names. Errors as `side_files`."""
    names = []
    for path in side_files(source):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(path, place)
        except OSError as error:
            raise RunError(f"{place}: {error.strerror}") from error
        names.append(str(path.relative_to(source)))
    return sorted(names)


def _goes_along(name: str) -> bool:
    return not re.fullmatch(f"{WEIGHTS}|{STALE}", name.lower())


def file_hashes(folder: str | Path) -> dict[str, str]:
    """File name -> sha256 of every safetensors and GGUF file of a folder; it reads them all, a block at a time."""
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix in (".safetensors", ".gguf"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing lets other threads run
        return dict(zip((path.name for path in paths), pool.map(file_hash, paths), strict=True))


def file_hash(path: Path) -> str:
    """sha256 of a file, read a block at a time."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
