"""The lines of a run's report as dataclasses; what is None has nothing to say and is left out of the JSON."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Record:
    """A line of the report."""

    def to_json(self) -> dict[str, Any]:
        """Field name -> value, of those that are not None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class LinearRecord(Record):
    """One quantized linear.

    error  squared output error over output energy, on the calibration inputs where there are any; error_rounding: that
           of rounding alone, where it was measured
    damping, tokens, dead_columns  of the Hessian: its ridge, the calibration tokens behind it, inputs never active
    """

    name: str
    scheme: str
    shape: list[int]
    algorithm: str
    error: float
    error_rounding: float | None = None
    damping: float | None = None
    tokens: int | None = None
    dead_columns: int | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True)
class FoldRecord(Record):
    """One fold that a transform scaled: from its producer into its consumers.

    alpha, exponents      what SmoothQuant or AWQ chose
    loss_unscaled, loss   of the search, without and with the scale
    """

    producer: str
    consumers: list[str]
    exponents: tuple[float, ...] | None = None
    alpha: float | None = None
    loss_unscaled: float | None = None
    loss: float | None = None
