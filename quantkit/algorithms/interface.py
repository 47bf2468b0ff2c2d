"""The interface between a block's statistics and the algorithms.

Shapes: N = out features, K = input features, G = groups of a row, g = columns of a group.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from quantkit.grids import Grid
from quantkit.types import QuantizedWeight, TensorSpec


@dataclass(frozen=True, slots=True)
class Needs:
    """What an algorithm asks calibration for.

    hessian          X^T X of the input, as it is behind everything quantized before, within its block too
    block            0, or columns of the Hessian's diagonal blocks that are enough
    original_inputs  the inputs the original model has there, to undo what was lost in the layers before
    """

    hessian: bool = False
    block: int = 0
    original_inputs: bool = False


@dataclass(frozen=True, slots=True)
class Evidence:
    """What calibration found out about an input; None: not gathered.

    tokens        that reached it
    importance_K  E[x^2] of each feature, float32 [K]
    hessian_KK    X^T X over all tokens; `consume` lets an algorithm use its memory
    drift         for each weight what its outputs lack, (Y0 - X W^T)^T X [N_i, K]; None: there is nothing to undo
    """

    tokens: int = 0
    importance_K: Tensor | None = None
    hessian_KK: Tensor | None = None
    drift: Sequence[Tensor] | None = None
    consume: bool = False


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantized weight and how it went.

    error     squared output error over output energy; error_rounding that of rounding alone, where it was measured
    damping   of the Hessian, `raised` where it had to be; dead_columns were never active in calibration
    """

    weight: QuantizedWeight
    error: float
    error_rounding: float | None = None
    damping: float | None = None
    raised: bool = False
    dead_columns: int = 0


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One way to choose codes.

    needs     needs(options, spec): what it asks for with these options on this number format
    quantize  quantize(weights, evidence, grid, options): weights [N_i, K] with one common input, one result for each;
              RunError where a weight or the evidence holds NaN or Inf
    refusal   refusal(options, spec): why such options are impossible on this number format; None: they are possible

    options are those of the recipe's section, by name.
    """

    needs: Callable[[Mapping[str, Any], TensorSpec], Needs]
    quantize: Callable[[Sequence[Tensor], Evidence, Grid, Mapping[str, Any]], list[Quantized]]
    refusal: Callable[[Mapping[str, Any], TensorSpec], str | None] = lambda *_: None
