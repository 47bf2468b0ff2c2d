"""How codes and scales lie in a file: one module per format, pure functions, no files opened here.

The names here are imported on first use: what reads configurations and headers alone does without torch.

registry.py          FORMATS: all of them by name
interface.py         class Format: the names every value of FORMATS has
compressed_tensors/ awq.py gptq.py fp8.py modelopt.py   one module per format
gguf/                 the file of llama.cpp
config/              what a quantization_config says, and which tensors belong to it, without torch
bitstream.py         codes of any width in words
common.py            what several formats share
described_folder.py  a quantized folder of any format: its schemes and shapes, without torch
quantized_folder.py  the same, with its weights
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantkit.formats.config import format_name
    from quantkit.formats.interface import Format
    from quantkit.formats.registry import FORMATS, holders

__all__ = ["FORMATS", "Format", "format_name", "holders"]

_HOMES = {"FORMATS": "registry", "Format": "interface", "format_name": "config", "holders": "registry"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
