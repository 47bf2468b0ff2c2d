"""What was found on tasks. Everything is a plain number; `to_json` is what `quantkit eval --tasks a --json` prints."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["recovered", "lost", "cannot tell"]


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """A model minus its original on the same questions.

    difference, stderr  mean over questions and its standard error
    low, high           95 % interval of the difference (see comparison.py)
    lost, gained        questions whose score is lower, and higher: answers that flipped
    """

    difference: float
    stderr: float | None
    low: float
    high: float
    lost: int
    gained: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """A model beside its original on one task.

    value, stderr       the original's
    recovery            the model's value / the original's; None where the original's is 0 or lower is better
    above_chance        the model's value minus chance, and the original's
    paired, verdict     None where a task's value is not the mean of its questions' scores
    """

    value: float
    stderr: float | None
    recovery: float | None
    above_chance: tuple[float, float]
    paired: PairedDifference | None
    verdict: Verdict | None


@dataclass(frozen=True, slots=True)
class TaskResult:
    """One metric of one task. filter: of answers, as lm-eval names it; chance: the value of guessing, or 0."""

    task: str
    metric: str
    filter: str
    questions: int
    shots: int
    value: float
    stderr: float | None
    chance: float
    higher_is_better: bool
    comparison: Comparison | None


@dataclass(frozen=True, slots=True)
class TaskEvaluation:
    """What was found of one model on tasks. ref None: no original; seconds: of the model alone, loading included."""

    model: str
    ref: str | None
    results: tuple[TaskResult, ...]
    rule: str
    limit: int | None
    device: str
    engine: str | None
    kv_cache: str | None
    seconds: float
    ref_seconds: float | None
    versions: dict[str, str]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What `quantkit eval --tasks a --json` prints."""
        return asdict(self)
