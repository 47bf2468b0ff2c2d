"""One run in a process of its own: `python -m quantkit_eval.search.run_worker`, with its job as JSON on stdin.

The process ends as soon as its stdin is closed: with the sweep that started it, however that died.
"""

import json
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run: what is made, on what it is evaluated, and where it is written.

    name, label    of its row; recipe: with the model and every default filled in; hashes: model, recipe and text
    folder         where the quantized model is written; row: the file of its row; cwd: where paths are relative to
    peak_bytes     memory that it will take, by the plan
    """

    name: str
    label: str
    recipe: dict[str, Any]
    hashes: tuple[str, str, str]
    text: str
    context: int
    tokens: int | None
    tasks: tuple[str, ...]
    limit: int | None
    device: str
    trust_remote_code: bool
    folder: str
    row: str
    cwd: str
    peak_bytes: int

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> "Job":
        """The inverse of `asdict`, through JSON."""
        return Job(**{**found, "hashes": tuple(found["hashes"]), "tasks": tuple(found["tasks"])})


def perform(job: Job) -> None:
    """Quantize, evaluate, and write the row. What a killed run has left is taken up where it stopped.

    UserError and RunError as of those.
    """
    from quantkit.checkpoint.output_folder import versions
    from quantkit.quantization import pipeline
    from quantkit.quantization.early_checks import partial_folder
    from quantkit.quantization.resources import one_heap
    from quantkit.recipe.load import from_data
    from quantkit.report.records import Report
    from quantkit_eval.evaluation import evaluate
    from quantkit_eval.search.results import Row, write_row

    os.chdir(job.cwd)
    one_heap()
    recipe, folder = from_data(job.recipe), Path(job.folder)
    begun = _read_versions(partial_folder(folder))
    resumed = begun is not None and begun == versions()
    if folder.exists():  # finished, but for its evaluation
        report = Report.load(folder)
    else:
        report = pipeline.quantize(
            recipe, folder, device=job.device, restart=begun is not None and not resumed,
            trust_remote_code=job.trust_remote_code, progress=False,
        )  # fmt: skip
    found = evaluate(
        folder, ref=recipe.model, text=job.text, context=job.context, tokens=job.tokens, device=job.device,
        trust_remote_code=job.trust_remote_code, progress=False,
    )  # fmt: skip
    (text,) = found.texts
    assert text.divergence is not None, "evaluated against the original"
    model_hash, recipe_hash, text_hash = job.hashes
    row = Row(
        name=job.name,
        recipe=job.recipe,
        size_bytes=report.bytes_after,
        bits_per_weight=report.bits_per_weight,
        kl=text.divergence.kl_mean,
        kl_p99=text.divergence.kl_p99,
        top1=text.divergence.top1_agreement,
        flips=text.divergence.flips,
        perplexity=text.model.perplexity,
        perplexity_ratio=text.divergence.perplexity_ratio,
        text_tokens=text.tokens,
        tasks=task_figures(job, found.device) if job.tasks else {},
        seconds=report.seconds_total,
        evaluation_seconds=found.seconds,
        resumed=resumed,
        peak_memory_bytes=report.peak_memory_bytes,
        tokens_per_second=decoding_speed(folder, found.device, job.trust_remote_code),
        device=found.device,
        versions=found.versions,
        model_hash=model_hash,
        recipe_hash=recipe_hash,
        text_hash=text_hash,
    )
    write_row(Path(job.row), row)


def task_figures(job: Job, device: str) -> dict[str, dict[str, float]]:
    """Task -> metric -> value, and metric_stderr -> its standard error; filters other than `none` are in the name."""
    from quantkit_eval.tasks.run import evaluate_tasks

    done = evaluate_tasks(
        job.folder, job.tasks, limit=job.limit, device=device, trust_remote_code=job.trust_remote_code
    )
    figures: dict[str, dict[str, float]] = {}
    for one in done.results:
        name = one.metric if one.filter == "none" else f"{one.metric}.{one.filter}"
        figures.setdefault(one.task, {})[name] = one.value
        if one.stderr is not None:
            figures[one.task][f"{name}_stderr"] = one.stderr
    return figures


PROMPT, DECODED = 16, 32  # tokens


def decoding_speed(folder: Path, device: str, trust_remote_code: bool) -> float:
    """Tokens a second of greedy decoding, one sequence, by transformers on quantkit's kernels, after a first one."""
    from quantkit_eval.bench.baselines import Transformers
    from quantkit_eval.bench.workload import Arrival

    model = Transformers(str(folder), "auto", device, trust_remote_code)
    vocabulary = model.model.config.get_text_config().vocab_size
    prompt = [(7 * at + 3) % vocabulary for at in range(PROMPT)]
    runs = [model.run("generate", [Arrival(prompt, DECODED, 0.0)]).timelines[0].tokens for _ in range(2)]
    return (DECODED - 1) / max(runs[-1][-1] - runs[-1][0], 1e-9)


def _read_versions(partial: Path) -> dict[str, str] | None:
    """The versions that an unfinished run was begun with; None where there is none."""
    from quantkit.checkpoint.journal import read_key

    key = read_key(partial)
    return None if key is None else key.get("versions", {})


def attempt(job: Job) -> str | None:
    """Perform a job; returns why it failed, in a line, where it did."""
    from quantkit.errors import RunError, UserError

    try:
        perform(job)
    except (UserError, RunError) as error:
        return str(error)
    except Exception as error:
        return f"unexpected {type(error).__name__}: {error}"
    return None


def _end_with_the_sweep() -> None:
    while os.read(0, 1 << 16):
        pass
    os._exit(1)


def main() -> None:
    """The process."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the sweep ends its runs itself
    job = Job.from_json(json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    if (problem := attempt(job)) is not None:
        sys.stderr.write(f"error: {problem}\n")
        sys.exit(1)


def encoded(job: Job) -> str:
    """The line that the process reads."""
    return json.dumps(asdict(job)) + "\n"


if __name__ == "__main__":
    main()
