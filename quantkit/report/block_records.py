"""What was done to the linears of a decoder block, and what was left as it is: lines of a run's report.

Fields that are None in a record are left out of its JSON. A journal stores the JSON of a block's record and reads it
back.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class GptqErrors:
    """How GPTQ went.

    rounding      the error that rounding to nearest would have had, as LinearRecord.error
    damping       of the Hessian, over its mean diagonal; tokens: how many it saw; dead_columns: inputs never active
    """

    rounding: float
    damping: float
    tokens: int
    dead_columns: int = 0


@dataclass(frozen=True, slots=True)
class Outliers:
    """How far the largest values of a linear stand out, as it was rounded: behind folds and rotations.

    weight  the largest |w| over the root mean square of all
    input   the largest channel over the median one, each by its root mean square; None where no inputs were seen, or
            where more than half of the channels are always zero
    """

    weight: float
    input: float | None


@dataclass(frozen=True, slots=True)
class LinearRecord:
    """What was done to one linear.

    shape  (N, K); error: squared output error over output energy, from the calibration inputs where there were any
    expert_tokens  of an expert: how many calibration tokens the router sent it
    """

    name: str
    scheme: str
    shape: tuple[int, int]
    algorithm: str
    error: float
    gptq: GptqErrors | None = None
    note: str | None = None
    outliers: Outliers | None = None
    expert_tokens: int | None = None

    def to_json(self) -> Json:
        """Its line of the report."""
        found: Json = {"name": self.name, "scheme": self.scheme, "shape": list(self.shape), "algorithm": self.algorithm}
        if self.gptq is not None:
            found["error_rounding"] = self.gptq.rounding
        found["error"] = self.error
        if self.gptq is not None:
            found |= {"damping": self.gptq.damping, "tokens": self.gptq.tokens}
        if self.expert_tokens is not None:
            found["expert_tokens"] = self.expert_tokens
        if self.note is not None:
            found["note"] = self.note
        if self.gptq is not None and self.gptq.dead_columns:
            found["dead_columns"] = self.gptq.dead_columns
        if self.outliers is not None:
            found["outliers"] = {"weight": self.outliers.weight, "input": self.outliers.input}
        return found

    @staticmethod
    def from_json(line: Mapping[str, Any]) -> "LinearRecord":
        """The inverse of `to_json`."""
        gptq = None
        if "error_rounding" in line:
            dead = line.get("dead_columns", 0)
            gptq = GptqErrors(line["error_rounding"], line["damping"], line["tokens"], dead)
        N, K = line["shape"]
        outliers = None if (seen := line.get("outliers")) is None else Outliers(seen["weight"], seen["input"])
        return LinearRecord(
            line["name"],
            line["scheme"],
            (N, K),
            line["algorithm"],
            line["error"],
            gptq,
            line.get("note"),
            outliers,
            line.get("expert_tokens"),
        )


@dataclass(frozen=True, slots=True)
class FoldRecord:
    """The scale an algorithm folded into a producer of channels and the linears that read it.

    exponents  (a, b) of AWQ's scale x^a / w^b; alpha: SmoothQuant's. Losses are absent where nothing was searched.
    """

    producer: str
    consumers: tuple[str, ...]
    exponents: tuple[float, float] | None = None
    alpha: float | None = None
    loss_unscaled: float | None = None
    loss: float | None = None

    def to_json(self) -> Json:
        """Its line of the report, less the block."""
        found: Json = {"producer": self.producer, "consumers": list(self.consumers)}
        if self.exponents is not None:
            found["exponents"] = list(self.exponents)
        for name in ("alpha", "loss_unscaled", "loss"):
            if (value := getattr(self, name)) is not None:
                found[name] = value
        return found

    @staticmethod
    def from_json(line: Mapping[str, Any]) -> "FoldRecord":
        """The inverse of `to_json`; a block's number is ignored."""
        a_b = line.get("exponents")
        return FoldRecord(
            line["producer"],
            tuple(line["consumers"]),
            None if a_b is None else (a_b[0], a_b[1]),
            *(line.get(name) for name in ("alpha", "loss_unscaled", "loss")),
        )


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """What was done to one decoder block: an entry of the journal."""

    block: int
    folds: tuple[FoldRecord, ...]
    linears: tuple[LinearRecord, ...]

    def to_json(self) -> Json:
        """Its entry of the journal."""
        folds, linears = ([record.to_json() for record in records] for records in (self.folds, self.linears))
        return {"block": self.block, "folds": folds, "linears": linears}

    @staticmethod
    def from_json(entry: Mapping[str, Any]) -> "BlockRecord":
        """The inverse of `to_json`."""
        folds, linears = map(FoldRecord.from_json, entry["folds"]), map(LinearRecord.from_json, entry["linears"])
        return BlockRecord(entry["block"], tuple(folds), tuple(linears))


@dataclass(frozen=True, slots=True)
class SkippedLinear:
    """A weight matrix that stays as it is, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class RejectedFold:
    """Two modules, "producer -> reader", between which no scale can be folded, and why."""

    pair: str
    reason: str
