"""What is measured of a quantized folder after its run, most of it beside the original.

What was not measured is None or empty.
"""

from dataclasses import dataclass
from typing import Literal

from quantkit.report.text_results import Interval, TextResult


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second of one model at batch size 1: reading a prompt, and generating behind it."""

    prefill: float
    decode: float


@dataclass(frozen=True, slots=True)
class SpeedComparison:
    """Both models in turn, in one process: medians over prompts of `prompt_tokens`, with new tokens behind each."""

    model: Speed
    reference: Speed
    prompts: int
    prompt_tokens: int
    new_tokens: int
    device: str
    dtype: str


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a model wrote: the part both wrote, its first token that differs ("" without any), and what follows."""

    shared: str
    differing: str
    rest: str


@dataclass(frozen=True, slots=True)
class Sample:
    """Greedy continuations of a prompt. shared_tokens: how many of `tokens` are equal before the first that differs."""

    prompt: str
    tokens: int
    shared_tokens: int
    reference: Continuation
    model: Continuation


@dataclass(frozen=True, slots=True)
class TaskResult:
    """One metric of one task. What a file of results does not hold is None.

    value, stderr         of the model; reference, reference_stderr: of the original
    recovery              value by the reference's; chance: what guessing gives
    difference            model less original, paired by question, with its 95 % interval and its standard error
    lost, gained          questions that the original alone answers rightly, and the model alone
    """

    task: str
    metric: str
    value: float
    stderr: float | None = None
    questions: int | None = None
    reference: float | None = None
    reference_stderr: float | None = None
    recovery: float | None = None
    chance: float | None = None
    difference: Interval | None = None
    difference_stderr: float | None = None
    lost: int | None = None
    gained: int | None = None
    verdict: str | None = None


@dataclass(frozen=True, slots=True)
class OriginalOutliers:
    """How far the largest values of a linear of the original stand out; see `Outliers` of a run's record."""

    name: str
    weight: float | None
    input: float | None


@dataclass(frozen=True, slots=True)
class EngineVerdict:
    """Whether an engine loads the folder, and why not."""

    engine: str
    verdict: Literal["loads", "refused", "unknown"]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Measurements:
    """All of it. Nothing of it is needed: a report says what is missing.

    ref       the original, as it was named; context: tokens of a window of `texts`
    files     sha256 by name of the weights that were measured: other weights make all of this worthless
    notes     what is worth knowing about the figures, and why some are absent
    """

    ref: str | None = None
    context: int | None = None
    bos: bool | None = None
    device: str | None = None
    dtype: str | None = None
    texts: tuple[TextResult, ...] = ()
    speed: SpeedComparison | None = None
    samples: tuple[Sample, ...] = ()
    tasks: tuple[TaskResult, ...] = ()
    original_outliers: tuple[OriginalOutliers, ...] = ()
    engines: tuple[EngineVerdict, ...] = ()
    versions: dict[str, str] | None = None
    files: dict[str, str] | None = None
    notes: tuple[str, ...] = ()
