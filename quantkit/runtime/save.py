"""Save a loaded model again, at any time and on any device: as the checkpoint it came from, file by file.

A loaded model remembers its folder. Nothing is packed again, so codes, scales, tokenizer and report come out as they
were; what a user has changed in the model since then is refused, not lost.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantkit.checkpoint.output_folder import REPORT
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import RunError, UserError
from quantkit.paths import user_path

ORIGIN = "_quantkit_origin"


@dataclass(frozen=True)
class Origin:
    """The quantized folder a model was loaded from.

    files   size and time of change of its files, to know it again
    plain   parameter -> tensor of the checkpoint that it is, unchanged but for its dtype
    owner   what keeps a temporary folder alive, None for a folder of the user's
    """

    folder: Path
    files: dict[str, tuple[int, int]]
    plain: dict[str, str]
    owner: Any = None

    @classmethod
    def of(cls, folder: Path, plain: dict[str, str], owner: Any = None) -> "Origin":
        """The folder as it is now."""
        return cls(folder.absolute(), _files(folder), plain, owner)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Origin":
        return self  # copies of the model share the folder

    def __reduce__(self) -> Any:
        return Origin, (self.folder, self.files, self.plain)  # a temporary folder does not outlive the process


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            state = path.stat()
            found[str(path.relative_to(folder))] = state.st_size, state.st_mtime_ns
    return found


def remember(model: PreTrainedModel, origin: Origin) -> None:
    """Make the model's own `save_pretrained` and `save` write the checkpoint it came from."""
    setattr(model, ORIGIN, origin)
    if not isinstance(model, _Packed):
        model.__class__ = _packed_class(type(model))


class _Packed:
    """What a class of quantized models adds to its transformers class."""

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write the packed checkpoint, as `quantkit.save` does; no other argument has an effect, so none is taken."""
        given = [name for name, value in options.items() if value not in (None, False) or name == "state_dict"]
        if given:
            raise UserError(
                f"save_pretrained({given[0]}=...): a packed model is saved as the files it came from; expected the "
                "folder alone\nhint: `hf upload` sends a folder to the Hub"
            )
        assert isinstance(self, PreTrainedModel)
        save(self, save_directory)

    def __reduce_ex__(self, protocol: Any) -> Any:
        base = type(self).__mro__[2]
        return _revive, (base,), self.__dict__


@cache
def _packed_class(base: type) -> type:
    """`base` with _Packed before it, under the same name: transformers looks at names of classes."""
    return type(base.__name__, (_Packed, base), {"__module__": base.__module__, "__doc__": base.__doc__})


def _revive(base: type) -> Any:
    made: Any = _packed_class(base)
    return made.__new__(made)


def save(model: PreTrainedModel, folder: str | Path) -> None:
    """Write the checkpoint of a model that `quantkit.load` or `quantkit.quantize_module` returned into `folder`.

    Works before and after the model ran, on any device and in any dtype: the files are those it was loaded from,
    packed tensors, configuration, tokenizer and report, byte for byte. A model that is not quantized is saved by
    transformers.
    folder  new, or one that holds no model yet (a tokenizer, say); all or nothing is written

    UserError where the folder holds a model or cannot be written to, where weights of the model were changed since it
    was loaded, and where its own folder is gone or was changed; RunError where writing fails.
    """
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"quantkit.save takes a transformers model, got a {type(model).__name__}")
    target = _target(folder)
    origin: Origin | None = getattr(model, ORIGIN, None)
    if origin is None:
        with _arriving(target) as partial:
            model.save_pretrained(partial)
        return
    _check_origin(origin)
    _check_unchanged(model, origin)
    with _arriving(target) as partial:
        for name in origin.files:
            place = partial / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(origin.folder / name, place)


def _target(folder: str | Path) -> Path:
    if not isinstance(folder, str | os.PathLike):
        raise UserError(f"quantkit.save needs a folder, got {folder!r}")
    target = user_path(folder)
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} exists and is not a folder; choose another")
    held = [name for name in ("config.json", REPORT) if (target / name).exists()]
    held += [path.name for path in target.glob("*.safetensors*")]
    if held:
        raise UserError(f"{target} exists, holds a model ({held[0]}) and is never overwritten; choose another folder")
    return target


@contextmanager
def _arriving(target: Path) -> Iterator[Path]:
    """A folder beside `target` whose files become target's when the block ends; nothing of it is left otherwise."""
    partial: Path | None = None
    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.absolute().parent))
        partial.chmod(0o777 & ~_umask())
        yield partial
        if not target.exists():
            partial.rename(target)
            return
        for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):  # last: it makes a model
            if not (target / path.name).exists():
                path.rename(target / path.name)
    except OSError as error:
        raise RunError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _check_origin(origin: Origin) -> None:
    found = _files(origin.folder) if origin.folder.is_dir() else {}
    for name, state in origin.files.items():
        if found.get(name) != state:
            what = "was changed" if name in found else "is gone"
            raise UserError(
                f"{origin.folder / name} {what} since the model was loaded from there, and its packed weights with it"
                "\nhint: load the model from another copy of its folder, and save that"
            )


@torch.no_grad()
def _check_unchanged(model: PreTrainedModel, origin: Origin) -> None:
    """UserError naming a weight that is not what the checkpoint says: it would be lost."""
    checkpoint = Checkpoint.open(origin.folder)
    for name, tensor in origin.plain.items():
        now = _parameter(model, name)
        if now is None or now.is_meta:
            continue
        stored, now = checkpoint.read(tensor), now.cpu()
        # What was cast to 16 bits and back is rounded, not changed.
        ways = (stored, stored.to(torch.float16), stored.to(torch.bfloat16))
        if not any(torch.equal(way.to(now.dtype), now) for way in ways):
            raise UserError(
                f"{name} was changed since the model was loaded from {origin.folder}; a packed model is saved as it "
                "was loaded\nhint: make the change in the original model, and quantize that"
            )


def _parameter(model: PreTrainedModel, name: str) -> Tensor | None:
    try:
        return model.get_parameter(name)
    except AttributeError:
        return None
