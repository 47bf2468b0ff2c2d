"""quantkit: quantize Hugging Face causal language models into checkpoints real engines load, and prove what was kept.

    report = quantkit.quantize("path/or/hub-id", "gptq-w4a16", "out/folder")
    model = quantkit.load("out/folder")

Names are imported on first use: `import quantkit` alone loads neither torch nor transformers.

api.py        quantize, quantize_module, save, plan, verify, inspect, convert, recipes from Python
convert.py    a quantized folder in another format
inspect.py    what a folder holds
errors.py     UserError, RunError
paths.py      `~` in paths
suggestions.py    the name that was meant
types.py      TensorSpec, Scheme, KVSpec, QuantizedWeight
progress.py   what a run is doing: a bar, or lines of the log
device_names.py   devices by name, checked without torch as far as that goes
library_output.py   bars and warnings of other libraries
cli/ recipe/ grids/ algorithms/ formats/ checkpoint/ model/ quantization/ verify/ planner/ runtime/ report/   packages
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantkit.api import quantize, quantize_module
    from quantkit.errors import RunError, UserError
    from quantkit.recipe.recipe import Recipe
    from quantkit.report.records import Report
    from quantkit.runtime.load import load

    __version__: str

__all__ = ["Recipe", "Report", "RunError", "UserError", "__version__", "load", "quantize", "quantize_module"]

_HOMES = {
    "Recipe": "quantkit.recipe.recipe",
    "Report": "quantkit.report.records",
    "RunError": "quantkit.errors",
    "UserError": "quantkit.errors",
    "load": "quantkit.runtime.load",
    "quantize": "quantkit.api",
    "quantize_module": "quantkit.api",
}

logging.getLogger(__name__).addHandler(logging.NullHandler())  # silent until whoever imports it sets up logging


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("quantkit")
        except PackageNotFoundError:  # run from a checkout that was never installed
            return "checkout"
    if name not in _HOMES:
        raise AttributeError(f"module 'quantkit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
