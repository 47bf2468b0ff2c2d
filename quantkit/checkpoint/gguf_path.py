"""Which .gguf file a path means: the file itself, or that of a folder which holds no other model. No torch."""

import re
from pathlib import Path

from quantkit.checkpoint.gguf_file import open_gguf
from quantkit.checkpoint.gguf_header import MAGIC, GgufFile
from quantkit.checkpoint.model_folder import PYTORCH
from quantkit.errors import UserError
from quantkit.paths import user_path

_NOT_FIRST = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")
_NO_MODEL = re.compile(r"mmproj|imatrix")  # files that lie beside a model's


def find_gguf(path: str | Path) -> Path | None:
    """The GGUF file (of a sharded model: the first shard) that `path` means; None where it can mean none.

    A folder with safetensors or PyTorch weights is that model, whatever else lies in it. UserError where a folder
    holds several models.
    """
    place = user_path(path)
    if place.is_file():
        return place if place.suffix.lower() == ".gguf" or _begins(place) else None
    try:
        names = sorted(entry.name for entry in place.iterdir()) if place.is_dir() else []
    except OSError:
        return None
    if any(Path(name).suffix in (".safetensors", *PYTORCH) or name.startswith("adapter_") for name in names):
        return None
    files = [name for name in names if name.lower().endswith(".gguf") and not _NOT_FIRST.search(name)]
    files = [name for name in files if not _NO_MODEL.search(name.lower())] or files
    if len(files) > 1 and "model.gguf" not in files:
        some = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
        raise UserError(f"{path}: a folder of {len(files)} GGUF files: {some}\nhint: give one of the files")
    if not files:
        files = [name for name in names if name.lower().endswith(".gguf")][:1]  # shards without the first
    return place / ("model.gguf" if "model.gguf" in files else files[0]) if files else None


def open_found(path: str | Path) -> GgufFile | None:
    """The opened GGUF file that `path` means; None where it can mean none. UserError where its header is not sound."""
    if (file := find_gguf(path)) is None:
        return None
    try:
        return open_gguf(file)
    except UserError as problem:
        message = str(problem).removeprefix(f"{file}: ")
        what = "a GGUF file that cannot be read" if user_path(path).is_file() else "in a folder of GGUF files"
        raise UserError(f"{file}: {what}: {message}") from problem


def _begins(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except OSError:
        return False
