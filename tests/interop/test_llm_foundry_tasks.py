"""llm-foundry's task rows, turned into tasks of lm-eval on the fly: our model answers as lm-eval's own `hf` does."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from lm_eval.evaluator import evaluate
from quantkit_eval.lm_eval_model import QuantkitLM
from quantkit_eval.tasks.selection import load_tasks

pytestmark = pytest.mark.interop
ROOT = Path(__file__).parents[2]
ROWS = Path(os.environ.get("QUANTKIT_SHARED", ROOT.parent / "shared")) / "tasks"
MODEL = str(ROOT / "examples" / "tiny-llama")
QUESTIONS = 16


def writer() -> Any:
    """The script that turns rows into tasks."""
    spec = importlib.util.spec_from_file_location("bench_tasks", ROOT / "eval" / "bench" / "tasks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not ROWS.is_dir(), reason=f"no {ROWS}: set QUANTKIT_SHARED to the folder with tasks/*.jsonl")
def test_every_task_has_the_accuracy_of_hf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = load_tasks(writer().write_tasks(ROWS, tmp_path), str(tmp_path))
    tasks = {task.config.task: task for task in found}

    def accuracy(model: Any) -> dict[str, float]:
        results: Any = evaluate(model, tasks, limit=QUESTIONS, bootstrap_iters=0)
        return {name: result["acc,none"] for name, result in results["results"].items()}

    ours = accuracy(QuantkitLM(MODEL, device="cpu", batch_size=4))
    assert ours == accuracy(HFLM(MODEL, device="cpu", dtype="float32", batch_size=4))
    assert set(ours) == {"rows_arc_easy", "rows_lambada_openai", "rows_piqa", "rows_winogrande"}
