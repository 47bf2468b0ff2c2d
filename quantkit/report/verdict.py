"""Is the quantized model to be recommended? Every threshold, what was measured, and what follows.

The limits lie between formats whose use people agree on, by llama.cpp's table (tools/perplexity, wikitext-2; Llama 2 7B
and Llama 3 8B): Q4_K_M, the usual choice, has KL 0.013 and 0.031, the same likeliest token at 94.7 % and 91.9 % and
perplexity 1.014 and 1.028 times the original's; Q2_K, a last resort, 0.109 and 0.445, 85.6 % and 71.1 %, 1.11 and 1.56.
Recovery of 99 % and more is what llm-compressor's model cards show for the schemes they recommend.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from quantkit.report.measurements import Measurements, TaskResult
from quantkit.report.records import Report
from quantkit.report.text_results import Divergence, Interval, TextResult

Level = Literal["recommended", "with care", "no"]
Outcome = Literal["recommended", "with care", "no", "not measured"]

_RANK: dict[str, int] = {"recommended": 0, "with care": 1, "not measured": 1, "no": 2}


@dataclass(frozen=True, slots=True)
class Threshold:
    """Up to `recommended` (or from it on, where more is better) all is well; beyond `care` the answer is no."""

    name: str
    recommended: float
    care: float
    percent: bool = False
    more_is_better: bool = False

    def judge(self, value: Interval) -> Outcome:
        """By the worse end of the interval for the best outcome, by the value for the worst."""
        sign = -1 if self.more_is_better else 1
        worst = max(sign * value.low, sign * value.high)
        if sign * value.value > sign * self.care:
            return "no"
        return "recommended" if worst <= sign * self.recommended else "with care"


KL = Threshold("KL from the original, nats", 0.05, 0.2)
TOP1 = Threshold("same likeliest token", 0.9, 0.8, percent=True, more_is_better=True)
FLIPS = Threshold("flips", 0.05, 0.12, percent=True)
PERPLEXITY = Threshold("perplexity by the original's", 1.03, 1.1)
RECOVERY = Threshold("recovery of the worst task", 0.99, 0.95, percent=True, more_is_better=True)


@dataclass(frozen=True, slots=True)
class Criterion:
    """One line of the verdict. threshold: None for a yes or no; value: None where it was not measured."""

    name: str
    outcome: Outcome
    remark: str
    threshold: Threshold | None = None
    value: Interval | None = None


@dataclass(frozen=True, slots=True)
class ReportVerdict:
    """The answer, in a sentence why, and the criteria it rests on."""

    level: Level
    reason: str
    criteria: tuple[Criterion, ...]


def judge(report: Report, measured: Measurements) -> ReportVerdict:
    """The worst outcome of all criteria; what was not measured keeps a model from being recommended."""
    criteria = (*_divergence(report, measured.texts), _tasks(measured.tasks), _engines(measured))
    # tasks and engines are the users' to ask for: without them the distributions decide
    counted = [one for one in criteria if not (one.outcome == "not measured" and one.name in (RECOVERY.name, LOADS))]
    worst = max(_RANK[one.outcome] for one in counted)
    level: Level = ("recommended", "with care", "no")[worst]
    deciding = [one for one in counted if _RANK[one.outcome] == worst]
    if level == "recommended":
        reason = "every figure that was measured lies within its threshold"
    else:
        reasons: dict[str, list[str]] = {}
        for one in deciding:
            reasons.setdefault(one.remark, []).append(one.name)
        reason = "; ".join(f"{' and '.join(names)}: {remark}" for remark, names in reasons.items())
    return ReportVerdict(level, reason, criteria)


LOADS = "an engine loads it"


def _divergence(report: Report, texts: Sequence[TextResult]) -> list[Criterion]:
    """KL, agreement, flips and perplexity: of the text where each is worst."""
    compared = [(text.name, text.divergence) for text in texts if text.divergence is not None]
    if compared:
        return [
            _worst(KL, compared, lambda d: d.kl_mean),
            _worst(TOP1, compared, lambda d: d.top1_agreement),
            _worst(FLIPS, compared, lambda d: d.flips),
            _worst(PERPLEXITY, compared, lambda d: d.perplexity_ratio),
        ]
    absent = "no original was given to compare with"
    if (held := report.held_out) is None:
        return [Criterion(one.name, "not measured", absent, one) for one in (KL, TOP1, FLIPS, PERPLEXITY)]
    found = []
    for threshold, value in ((KL, held.kl), (TOP1, held.top1_agreement)):
        point = Interval(value, value, value)
        outcome = threshold.judge(point)
        remark = f"of the run's own {held.tokens} held-out tokens, without an interval"
        # a figure without an interval recommends nothing
        found.append(
            Criterion(threshold.name, "with care" if outcome == "recommended" else outcome, remark, threshold, point)
        )
    return [*found, *(Criterion(one.name, "not measured", absent, one) for one in (FLIPS, PERPLEXITY))]


def _worst(
    threshold: Threshold, compared: Sequence[tuple[str, Divergence]], pick: Callable[[Divergence], Interval]
) -> Criterion:
    sign = -1 if threshold.more_is_better else 1
    name, found = max(compared, key=lambda one: sign * pick(one[1]).value)
    value: Interval = pick(found)
    outcome = threshold.judge(value)
    return Criterion(threshold.name, outcome, f"{_said(threshold, value, outcome)} on {name}", threshold, value)


def _said(threshold: Threshold, value: Interval, outcome: Outcome) -> str:
    def show(x: float) -> str:
        return f"{100 * x:.1f} %" if threshold.percent else f"{x:.3g}"

    limit = threshold.care if outcome == "no" else threshold.recommended
    beyond = "below" if threshold.more_is_better else "above"
    if outcome == "recommended":
        return f"{show(value.value)}, within {show(limit)}"
    sign = -1 if threshold.more_is_better else 1
    if sign * value.value <= sign * limit:
        end = value.low if threshold.more_is_better else value.high
        return f"{show(value.value)}, but its interval reaches {show(end)}, {beyond} {show(limit)}"
    return f"{show(value.value)}, {beyond} {show(limit)}"


def _tasks(tasks: Sequence[TaskResult]) -> Criterion:
    recovered = [task for task in tasks if task.recovery is not None]
    if not recovered:
        return Criterion(RECOVERY.name, "not measured", "no results of tasks beside the original", RECOVERY)
    worst = min(recovered, key=lambda task: task.recovery or 0.0)
    assert worst.recovery is not None
    value = Interval(worst.recovery, worst.recovery, worst.recovery)
    outcome = RECOVERY.judge(value)
    remark = f"{_said(RECOVERY, value, outcome)} on {worst.task}"
    lost = next((task.task for task in tasks if task.verdict == "lost"), None)
    if outcome == "recommended" and lost is not None:
        outcome, remark = "with care", f"{remark}, but {lost} lost answers"
    elif outcome == "recommended" and worst.verdict == "cannot tell":
        remark += ", as far as so few questions tell"
    elif worst.verdict == "cannot tell":
        outcome, remark = "with care", f"{remark}, which so few questions cannot tell from chance"
    return Criterion(RECOVERY.name, outcome, remark, RECOVERY, value)


def _engines(measured: Measurements) -> Criterion:
    if not measured.engines:
        return Criterion(LOADS, "not measured", "no engine was asked")
    loading = [one.engine for one in measured.engines if one.verdict == "loads"]
    if loading:
        return Criterion(LOADS, "recommended", ", ".join(loading))
    if any(one.verdict == "unknown" for one in measured.engines):
        return Criterion(LOADS, "with care", "none is known to")
    return Criterion(LOADS, "no", "every engine refuses it")
