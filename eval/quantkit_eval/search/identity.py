"""What a run's row depends on, as hashes: the same ones give the same row, wherever the files lie."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.checkpoint.model_folder import TOKENIZERS
from quantkit.checkpoint.output_folder import file_hash
from quantkit.checkpoint.reader import Checkpoint
from quantkit.quantization.calibration.sources import check_sources
from quantkit.recipe.recipe import Recipe

WHOLE = 4 << 30  # bytes of a model that are all hashed; of a larger one, samples of each tensor
LENGTH = 16  # characters of a row's name


def model_hash(folder: Path) -> str:
    """sha256 over config, weights and tokenizer of a model's folder."""
    checkpoint = Checkpoint.open(folder)
    digest = hashlib.sha256(checkpoint.fingerprint().encode())
    files = {info.file for info in checkpoint.tensors.values()}
    if sum(file.stat().st_size for file in files) > WHOLE:
        files = set()
    names = {*TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"}
    files |= {path for name in names if (path := folder / name).is_file()}
    for file in sorted(files):
        digest.update(f"\n{file.name} {file_hash(file)}".encode())
    return digest.hexdigest()


def recipe_hash(recipe: Recipe) -> str:
    """sha256 over a recipe with all defaults filled in, and over the files that it names, wherever they lie."""
    content: dict[str, Any] = {"settings": recipe.settings()}
    if recipe.calibration is not None:
        section = recipe.resolved()["calibration"]
        places = check_sources(recipe.calibration)
        content["calibration"] = section | {"data": [_source(place.path, str(place.data)) for place in places]}
        content["weights"] = [source.weight for source in recipe.calibration.sources()]
    if recipe.gguf is not None and recipe.gguf.imatrix is not None:
        content["imatrix"] = _source(Path(recipe.gguf.imatrix), recipe.gguf.imatrix)
    return _digest(content)


def row_name(model: str, recipe: str, text: str, options: Mapping[str, Any]) -> str:
    """The name of a run's row: of the three hashes, and of whatever else its figures depend on."""
    return _digest({"model": model, "recipe": recipe, "text": text, "options": options})[:LENGTH]


def _source(path: Path | None, name: str) -> str:
    """A file by its content, a folder by its files' names, sizes and times, a data set of the Hub by its name."""
    if path is None:
        return name
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        listed = [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return _digest(listed)
    return file_hash(path) if path.is_file() else name


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
