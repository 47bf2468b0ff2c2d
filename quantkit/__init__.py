"""quantkit: quantize Hugging Face causal language models into checkpoints real engines load, and prove what was kept.

    report = quantkit.quantize("path/or/hub-id", "gptq-w4a16", "out/folder")
    model = quantkit.load("out/folder")

Names are imported on first use: `import quantkit` alone loads neither torch nor transformers.

api.py        quantize from Python (quantkit.quantize, quantkit.load)
convert.py    a quantized folder in another format
inspect.py    what a folder holds
errors.py     UserError, RunError
paths.py      `~` in paths
types.py      TensorSpec, Scheme, KVSpec, QuantizedWeight
progress.py   one progress line
device_names.py   names of devices, checked without torch
cli/ recipe/ grids/ algorithms/ formats/ checkpoint/ model/ quantization/ verify/ planner/ runtime/ report/ texts/
    packages
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantkit.api import quantize, quantize_module
    from quantkit.errors import RunError, UserError
    from quantkit.recipe.recipe import Recipe
    from quantkit.runtime.load import load

__all__ = ["Recipe", "RunError", "UserError", "load", "quantize", "quantize_module"]

_HOMES = {
    "Recipe": "quantkit.recipe.recipe",
    "RunError": "quantkit.errors",
    "UserError": "quantkit.errors",
    "load": "quantkit.runtime.load",
    "quantize": "quantkit.api",
    "quantize_module": "quantkit.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'quantkit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
