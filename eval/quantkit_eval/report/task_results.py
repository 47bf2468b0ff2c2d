"""Results of tasks as a file holds them: `quantkit eval --tasks ... --json`, or lm-eval's own results JSON."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from quantkit.errors import UserError
from quantkit.paths import user_path
from quantkit.report.measurements import TaskResult
from quantkit.report.text_results import Interval

EXPECTED = "hint: give what `quantkit eval DIR --tasks a,b --json` prints, or a results file of lm-eval"


def read_task_results(path: Path) -> tuple[TaskResult, ...]:
    """Every metric of every task in a file. UserError where it cannot be read or holds none."""
    file = user_path(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}\n{EXPECTED}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}\n{EXPECTED}") from error
    found = parse(content, str(path))
    if not found:
        raise UserError(f"{path}: holds no results of tasks\n{EXPECTED}")
    return found


def parse(content: Any, where: str) -> tuple[TaskResult, ...]:
    """The results in parsed JSON, none where there are none. UserError for those that cannot be understood."""
    if not isinstance(content, Mapping):
        return ()
    results = content.get("results")
    found: tuple[TaskResult, ...] = ()
    try:
        if isinstance(results, list):
            found = tuple(map(_of_quantkit, results))
        elif isinstance(results, Mapping):
            found = _of_lm_eval(results, content.get("n-samples") or {})
        return TypeAdapter(tuple[TaskResult, ...]).validate_python(list(map(asdict, found)))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{where}: results of tasks that quantkit cannot read: {reason}\n{EXPECTED}") from error


def _of_quantkit(row: Mapping[str, Any]) -> TaskResult:
    """A row of `quantkit eval --tasks`: `comparison` with an original, `paired` where questions have scores."""
    beside = row.get("comparison") or {}
    paired = beside.get("paired") or {}
    difference = None
    if paired:
        difference = Interval(*(float(paired[name]) for name in ("difference", "low", "high")))
    return TaskResult(
        str(row["task"]),
        _metric(row["metric"], row.get("filter", "none")),
        float(row["value"]),
        row.get("stderr"),
        row.get("questions"),
        beside.get("value"),
        beside.get("stderr"),
        beside.get("recovery"),
        row.get("chance"),
        difference,
        paired.get("stderr"),
        paired.get("lost"),
        paired.get("gained"),
        beside.get("verdict"),
    )


def _metric(metric: str, filtered: str) -> str:
    """The metric, with the filter of answers where lm-eval has more than one."""
    return str(metric) if filtered in ("", "none") else f"{metric} ({filtered})"


def _of_lm_eval(results: Mapping[str, Any], samples: Mapping[str, Any]) -> tuple[TaskResult, ...]:
    """lm-eval writes {task: {"acc,none": value, "acc_stderr,none": error}}, and how many samples beside it."""
    found = []
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if metric == "alias" or metric.endswith("_stderr") or isinstance(value, bool | str) or value is None:
                continue
            error = metrics.get(f"{metric}_stderr,{filtered}")
            error = float(error) if isinstance(error, int | float) else None
            count = (samples.get(task) or {}).get("effective")
            found.append(TaskResult(task, _metric(metric, filtered), float(value), error, count))
    return tuple(found)
