"""What a user should know of a GGUF file: what the model loses in it, and what it does not hold. No torch."""

from collections.abc import Collection, Mapping
from typing import Any

from quantkit.formats.gguf.metadata import notes
from quantkit.formats.gguf.tensor_names import left_out


def file_remarks(config: Mapping[str, Any], tensors: Collection[str]) -> list[str]:
    """One line each: settings that llama.cpp computes otherwise, and the tensors of the checkpoint that are left out.

    config, tensors: config.json and the names of the tensors that the file is made of.
    """
    reasons: dict[str, list[str]] = {}
    for name, why in left_out(config, tensors).items():
        reasons.setdefault(why, []).append(name)
    return notes(config) + [f"not in the file: {_list(names)}: {why}" for why, names in reasons.items()]


def _list(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
