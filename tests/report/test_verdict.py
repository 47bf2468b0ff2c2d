"""The verdict of every kind of measurement, and what is said where one is missing."""

from dataclasses import replace

import pytest

from quantkit.report.measurements import EngineVerdict, Measurements, TaskResult
from quantkit.report.text_results import Divergence, Interval, TextResult
from quantkit.report.verdict import KL, TOP1, Threshold, judge
from tests.synthetic_reports import run, text_result

REPORT = run(1)
GOOD = text_result(kl=0.02)


def exact(value: float) -> Interval:
    return Interval(value, value, value)


def changed(**figures: Interval) -> TextResult:
    """A good text with some figures replaced."""
    d = GOOD.divergence
    assert isinstance(d, Divergence)
    return replace(GOOD, divergence=replace(d, **figures))


@pytest.mark.parametrize(
    ("threshold", "value", "outcome"),
    [
        (KL, Interval(0.04, 0.03, 0.05), "recommended"),
        (KL, Interval(0.04, 0.03, 0.051), "with care"),
        (KL, Interval(0.2, 0.1, 0.4), "with care"),
        (KL, Interval(0.21, 0.1, 0.4), "no"),
        (TOP1, Interval(0.92, 0.9, 0.94), "recommended"),
        (TOP1, Interval(0.92, 0.89, 0.94), "with care"),
        (TOP1, Interval(0.79, 0.7, 0.95), "no"),
    ],
)
def test_the_worse_end_of_an_interval_decides(threshold: Threshold, value: Interval, outcome: str) -> None:
    assert threshold.judge(value) == outcome


@pytest.mark.parametrize(
    ("texts", "level", "word"),
    [
        ((GOOD,), "recommended", "every figure"),
        ((GOOD, text_result("law", 0.3)), "no", "KL from the original, nats: 0.3, above 0.2 on law"),
        ((changed(kl_mean=exact(0.08)),), "with care", "KL"),
        ((changed(flips=exact(0.13)),), "no", "flips: 13.0 %, above 12.0 %"),
        ((changed(top1_agreement=exact(0.85)),), "with care", "same likeliest token"),
        ((changed(perplexity_ratio=exact(1.2)),), "no", "perplexity"),
        ((changed(perplexity_ratio=Interval(1.02, 1.0, 1.05)),), "with care", "but its interval reaches 1.05"),
    ],
)
def test_texts(texts: tuple[TextResult, ...], level: str, word: str) -> None:
    found = judge(REPORT, Measurements(texts=texts))
    assert found.level == level
    assert word in found.reason


def test_nothing_unmeasured_is_recommended() -> None:
    alone = judge(replace(REPORT, held_out=None), Measurements())
    assert alone.level == "with care"
    assert "no original was given" in alone.reason
    assert all(one.outcome == "not measured" and one.value is None for one in alone.criteria)
    held = judge(REPORT, Measurements())
    assert held.level == "with care"
    assert "without an interval" in held.reason
    assert REPORT.held_out is not None
    ruined = replace(REPORT, held_out=replace(REPORT.held_out, kl=2.0))
    assert judge(ruined, Measurements()).level == "no"


@pytest.mark.parametrize(
    ("recovery", "verdict", "level"),
    [
        (0.995, "recovered", "recommended"),
        (0.97, "lost", "with care"),
        (0.90, "lost", "no"),
        (0.90, "cannot tell", "with care"),
        (0.995, "lost", "with care"),
        (None, None, "recommended"),
    ],
)
def test_tasks(recovery: float | None, verdict: str | None, level: str) -> None:
    task = TaskResult("piqa", "acc", 0.8, recovery=recovery, verdict=verdict)
    assert judge(REPORT, Measurements(texts=(GOOD,), tasks=(task,))).level == level


def test_a_lost_task_counts_beside_one_that_cannot_tell() -> None:
    unsure = TaskResult("piqa", "acc", 0.8, recovery=0.991, verdict="cannot tell")
    found = judge(REPORT, Measurements(texts=(GOOD,), tasks=(unsure,)))
    assert found.level == "recommended"
    assert "so few questions" in next(one.remark for one in found.criteria if "recovery" in one.name)
    lost = TaskResult("arc", "acc", 0.8, recovery=0.992, verdict="lost")
    assert judge(REPORT, Measurements(texts=(GOOD,), tasks=(unsure, lost))).level == "with care"


def test_a_folder_that_no_engine_loads_is_not_recommended() -> None:
    refused = (EngineVerdict("vllm", "refused", "no kernel"), EngineVerdict("sglang", "refused", "no kernel"))
    assert judge(REPORT, Measurements(texts=(GOOD,), engines=refused)).level == "no"
    assert judge(REPORT, Measurements(texts=(GOOD,), engines=(EngineVerdict("vllm", "unknown"),))).level == "with care"
    assert judge(REPORT, Measurements(texts=(GOOD,), engines=(*refused, EngineVerdict("x", "loads")))).level == (
        "recommended"
    )
