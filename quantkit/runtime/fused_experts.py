"""Inputs of weights that no QuantLinear holds: a layer's experts run from one 3-D parameter, dequantized.

What an engine does to an expert's input is done here as well: each product of the module with such a parameter is seen
as it happens (`products`), and its input is rounded first.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from quantkit.grids.activations import fake_quantize
from quantkit.model.matmul_tracing import TraceMatmuls, WeightKey
from quantkit.types import ActivationRange, ActivationSpec

Rounding = Mapping[tuple[str, int | None], tuple[ActivationSpec, ActivationRange | None]]


def round_inputs(module: nn.Module, rounding: Rounding) -> None:
    """Make the module round the inputs of its own parameters, given by (name, expert's index or None)."""
    # A partial, not a function defined here: a copy of the module must run its own weights.
    module.forward = partial(_rounded_forward, module, rounding)


def _rounded_forward(module: nn.Module, rounding: Rounding, *args: Any, **kwargs: Any) -> Any:
    def on_product(weight: WeightKey, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        found = rounding.get((weight.param, weight.index))
        return run(x) if found is None else run(fake_quantize(x, *found))

    with TraceMatmuls(module, on_product):
        return type(module).forward(module, *args, **kwargs)
