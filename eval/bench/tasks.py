"""What quantized models answer beside their original, on rows of llm-foundry's task files: a Markdown table.

    python eval/bench/tasks.py ORIGINAL MODEL... --rows TASKS --limit 200 --state out/tasks.json

TASKS is a folder of lambada_openai.jsonl, piqa.jsonl, arc_easy.jsonl and winogrande.jsonl as llm-foundry has them; they
become tasks of lm-eval in a temporary folder, their prompts as they are in the rows. A model whose
answers are in the state file is not run again. Seconds are of the processor: what other programs take does not count.
"""

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from quantkit_eval.tasks.results import TaskResult
from quantkit_eval.tasks.run import Answers, ModelAnswers, answer, results_of
from quantkit_eval.tasks.selection import load_tasks
from quantkit_eval.tasks.tables import recovery

# Of each file: the kind of task, and how lm-eval finds context, choices and answer in a row.
KINDS = {
    "lambada_openai": ("loglikelihood", "{{context}}", None, " {{continuation}}"),
    "piqa": ("multiple_choice", "{{query.strip()}}\nAnswer:", "{{choices}}", "{{gold}}"),
    "arc_easy": ("multiple_choice", "{{query}}\nAnswer:", "{{choices}}", "{{gold}}"),
    "winogrande": ("multiple_choice", None, None, None),
}
READER = """import json
from pathlib import Path
from datasets import Dataset


def read(file, **_):
    return {"test": Dataset.from_list([json.loads(line) for line in Path(file).read_text("utf-8").splitlines()])}


def gold(doc):
    return doc["gold"]


def options(doc):
    return doc["context_options"]


def ending(doc):
    return doc["continuation"]
"""


def write_tasks(rows: Path, folder: Path) -> list[str]:
    """Task files of lm-eval for the rows that are there; their names."""
    (folder / "rows.py").write_text(READER, encoding="utf-8")
    names = []
    for name, (kind, text, choices, target) in KINDS.items():
        if not (file := rows / f"{name}.jsonl").is_file():
            continue
        lines = [f"task: rows_{name}", "custom_dataset: !function rows.read", f"dataset_kwargs: {{file: {file}}}"]
        lines += [f"output_type: {kind}", "test_split: test"]
        if text is None:  # which of two contexts the ending follows
            lines += ["doc_to_text: !function rows.gold", "doc_to_choice: !function rows.options"]
            lines += ["doc_to_target: !function rows.ending", 'target_delimiter: " "']
        else:
            lines += [f"doc_to_text: {json.dumps(text)}", f"doc_to_target: {json.dumps(target)}"]
            lines += [f"doc_to_choice: {json.dumps(choices)}"] if choices else []
            lines += [f"target_delimiter: {json.dumps(' ' if choices else '')}"]
        lines += ["metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"]
        (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
        names.append(f"rows_{name}")
    return names


def cell(row: TaskResult) -> str:
    """A model's value; beside the original recovery, paired difference, flips and verdict."""
    value = f"{100 * row.value:.1f}"
    if (c := row.comparison) is None or (p := c.paired) is None:
        return f"{value} ± {100 * (row.stderr or 0):.1f}"
    difference = f"{100 * p.difference:+.1f} ± {100 * (p.stderr or 0):.1f}"
    return f"{value}, {recovery(c)}; {difference} (-{p.lost} +{p.gained}) {c.verdict}"


def to_json(found: ModelAnswers) -> dict[str, Any]:
    """A model's answers as they lie in the state file."""
    rows = [
        [*key, {**asdict(one), "scores_Q": None if one.scores_Q is None else one.scores_Q.tolist()}]
        for key, one in found.of.items()
    ]
    return {"rows": rows, "seconds": found.seconds, "device": found.device}


def from_json(found: dict[str, Any]) -> ModelAnswers:
    """The same, read back."""
    of = {}
    for task, metric, filter_name, one in found["rows"]:
        scores = None if one["scores_Q"] is None else np.array(one["scores_Q"])
        of[task, metric, filter_name] = Answers(**{**one, "hashes": tuple(one["hashes"]), "scores_Q": scores})
    return ModelAnswers(of, found["seconds"], found["device"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("original", type=Path)
    parser.add_argument("models", type=Path, nargs="*")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--state", type=Path, required=True, help="answers that are there already, by model")
    given = parser.parse_args()
    state: dict[str, list[Any]] = {}  # of each model: its answers, and seconds of the processor
    if given.state.is_file():
        state = json.loads(given.state.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as scratch:
        names = write_tasks(given.rows.resolve(), Path(scratch))
        tasks = load_tasks(names, scratch)
        for folder in (given.original, *given.models):
            if f"{folder} {given.limit}" not in state:
                started = time.process_time()
                found = answer(folder, tasks, limit=given.limit, batch_size=8, device="cpu")
                state[f"{folder} {given.limit}"] = [to_json(found), time.process_time() - started]
                given.state.write_text(json.dumps(state), encoding="utf-8")
    kept, seconds = state[f"{given.original} {given.limit}"]
    original = from_json(kept)
    plain = results_of(original, None)
    print("| | " + " | ".join(f"{row.task.removeprefix('rows_')}, N {row.questions}" for row in plain) + " | seconds |")
    print("|---" * (len(plain) + 2) + "|")
    print("| original | " + " | ".join(map(cell, plain)) + f" | {seconds:.0f} |")
    for folder in given.models:
        kept, seconds = state[f"{folder} {given.limit}"]
        cells = map(cell, results_of(from_json(kept), original))
        print(f"| {folder.name} | " + " | ".join(cells) + f" | {seconds:.0f} |")


if __name__ == "__main__":
    main()
