"""Results of tasks as `quantkit eval` and lm-eval write them, and files that hold none."""

import json
from pathlib import Path
from typing import Any

import pytest
from quantkit_eval.report.task_results import read_task_results

from quantkit.errors import UserError
from quantkit.report.measurements import TaskResult
from quantkit.report.text_results import Interval

PAIRED = {"difference": -0.011, "stderr": 0.004, "low": -0.019, "high": -0.003, "lost": 51, "gained": 25}
COMPARED = {"value": 0.812, "stderr": 0.008, "recovery": 0.986, "above_chance": [0.5, 0.6], "paired": PAIRED}
ROW = {
    "task": "arc_easy",
    "metric": "acc",
    "filter": "none",
    "questions": 2376,
    "shots": 0,
    "value": 0.801,
    "stderr": 0.008,
    "chance": 0.25,
    "higher_is_better": True,
    "comparison": COMPARED | {"verdict": "lost"},
}


def write(folder: Path, content: Any) -> Path:
    file = folder / "tasks.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_of_quantkit(tmp_path: Path) -> None:
    alone = ROW | {"task": "own", "filter": "strict", "comparison": None}
    found = read_task_results(write(tmp_path, {"model": "m", "results": [ROW, alone]}))
    difference = Interval(-0.011, -0.019, -0.003)
    assert found == (
        TaskResult("arc_easy", "acc", 0.801, 0.008, 2376, 0.812, 0.008, 0.986, 0.25, difference, 0.004, 51, 25, "lost"),
        TaskResult("own", "acc (strict)", 0.801, 0.008, 2376, chance=0.25),
    )


def test_of_lm_eval(tmp_path: Path) -> None:
    metrics = {"alias": "piqa", "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,get": 0.2, "f1_stderr,get": "N/A"}
    found = read_task_results(
        write(tmp_path, {"results": {"piqa": metrics}, "n-samples": {"piqa": {"original": 90, "effective": 9}}})
    )
    assert found == (TaskResult("piqa", "acc", 0.5, 0.1, 9), TaskResult("piqa", "f1 (get)", 0.2, None, 9))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ({}, "holds no results"),
        ([1], "holds no results"),
        ({"results": []}, "holds no results"),
        ({"results": {}}, "holds no results"),
        ({"results": [{"task": "a"}]}, "cannot read"),
        ({"results": [ROW | {"value": "high"}]}, "cannot read"),
        ({"results": [7]}, "cannot read"),
        ({"results": [ROW | {"stderr": "N/A"}]}, "cannot read"),
        ({"results": {"a": 7}}, "cannot read"),
    ],
    ids=str,
)
def test_what_holds_none(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        read_task_results(write(tmp_path, content))
    assert "hint: give what `quantkit eval" in str(raised.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nope\.json: cannot be read"):
        read_task_results(tmp_path / "nope.json")
