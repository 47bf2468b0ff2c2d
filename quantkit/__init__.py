"""quantkit: quantize Hugging Face causal language models into checkpoints real engines load, and prove what was kept.

    report = quantkit.quantize("path/or/hub-id", "gptq-w4a16", "out/folder")
    model = quantkit.load("out/folder")

Names are imported on first use: `import quantkit` alone loads neither torch nor transformers.

api.py        quantize, quantize_module, auto, save, plan, verify, inspect, convert, imatrix, recipes from Python
conversion.py   a quantized folder in another format
errors.py     UserError, RunError
paths.py      `~` in paths
suggestions.py    the name that was meant
sizes.py          3.6MB as a number of bytes, 4.5bpw as a limit
types.py      TensorSpec, Scheme, KVSpec, QuantizedWeight
cache_spec.py   CacheSpec: the formats of cached keys and of cached values
ggml_types.py   the types of GGUF tensors and files
progress.py   what a run is doing: a bar, or lines of the log
device_names.py   devices by name, checked without torch as far as that goes
library_output.py   bars and warnings of other libraries
packages: cli/ recipe/ grids/ algorithms/ formats/ checkpoint/ model/ quantization/ verification/ planner/ runtime/
          inspection/ report/ texts/ gguf_conversion/
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantkit_eval.evaluation import evaluate

    from quantkit.api import auto, convert, imatrix, inspect, plan, quantize, quantize_module, save, verify
    from quantkit.cli.recipe_table import recipes
    from quantkit.errors import RunError, UserError
    from quantkit.recipe.recipe import Recipe
    from quantkit.report.records import Report
    from quantkit.runtime.engine.llm import LLM
    from quantkit.runtime.engine.request import SamplingParams
    from quantkit.runtime.load import load

    __version__: str

__all__ = [
    "LLM",
    "Recipe",
    "Report",
    "RunError",
    "SamplingParams",
    "UserError",
    "__version__",
    "auto",
    "convert",
    "evaluate",
    "imatrix",
    "inspect",
    "load",
    "plan",
    "quantize",
    "quantize_module",
    "recipes",
    "save",
    "verify",
]

_API = ("auto", "convert", "imatrix", "inspect", "plan", "quantize", "quantize_module", "save", "verify")
_HOMES = {name: ("quantkit.api", name) for name in _API} | {
    "LLM": ("quantkit.runtime.engine.llm", "LLM"),
    "Recipe": ("quantkit.recipe.recipe", "Recipe"),
    "Report": ("quantkit.report.records", "Report"),
    "RunError": ("quantkit.errors", "RunError"),
    "SamplingParams": ("quantkit.runtime.engine.request", "SamplingParams"),
    "UserError": ("quantkit.errors", "UserError"),
    "evaluate": ("quantkit_eval.evaluation", "evaluate"),
    "load": ("quantkit.runtime.load", "load"),
    "recipes": ("quantkit.cli.recipe_table", "recipes"),
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
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
