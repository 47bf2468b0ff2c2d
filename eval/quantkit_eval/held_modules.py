"""Modules in memory that are evaluated: their names, device and tokenizer, and how they are left as they were."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from quantkit.api import is_module
from quantkit.errors import UserError
from quantkit_eval.folders import load_tokenizer


def model_name(model: Any) -> str:
    """What messages and results call it: a path or an id as it was given, of a module where it came from."""
    if not is_module(model):
        return str(model)
    return getattr(model, "name_or_path", None) or f"a {type(model).__name__} in memory"


def module_device(modules: Sequence[Any], asked: str) -> torch.device:
    """Where the modules are; UserError where that is two places, or not the one that was asked for."""
    devices = {module.device for module in modules}
    if len(devices) > 1:
        raise UserError(f"model is on {modules[0].device}, ref on {modules[1].device}\nhint: move one of them")
    (found,) = devices
    if asked != "auto" and torch.device(asked).type != found.type:
        raise UserError(f"device is {asked!r}, but the module you passed is on {found}\nhint: leave device out")
    return found


def given_tokenizer(
    given: Any, folder: Path | None, ref_folder: Path | None, modules: Sequence[Any], trust_remote_code: bool
) -> tuple[Any, list[str]]:
    """The tokenizer and remarks on where it came from: the one given, a folder's, or that of a module's own folder."""
    if given is not None:
        if not callable(given):
            raise UserError(f"tokenizer is a {type(given).__name__}; expected a tokenizer of transformers")
        return given, []
    own = (Path(name) for module in modules if (name := getattr(module, "name_or_path", None)))
    place = folder or ref_folder or next((path for path in own if path.is_dir()), None)
    if place is None:
        raise UserError(
            "the module you passed comes without a tokenizer, and a text needs one\n"
            "hint: pass tokenizer=AutoTokenizer.from_pretrained(...)"
        )
    return load_tokenizer(place, trust_remote_code)


@contextmanager
def without_training(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards every part of the modules in the mode it was in."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def same_randomness() -> Iterator[None]:
    """Afterwards the random numbers of Python, numpy and torch, on all devices, go on as if none had been drawn."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
