"""A model and its original on tasks of lm-eval: values, and what is left of the original's answers."""

import gc
import io
import logging
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import RunError, UserError
from quantkit.library_output import quiet_libraries
from quantkit.suggestions import unknown
from quantkit_eval.early_checks import check_before_torch
from quantkit_eval.tasks.comparison import RULE, compare
from quantkit_eval.tasks.results import TaskEvaluation, TaskResult
from quantkit_eval.tasks.selection import first_line, hub_errors, load_tasks, names_of, quiet_lm_eval
from quantkit_eval.tasks.task_files import check_lm_eval, check_task_files

ENGINES = ("plain", "paged")
SEED = 1234  # lm-eval's
PACKAGES = ("quantkit", "lm_eval", "torch", "transformers", "datasets")
LOG = logging.getLogger("quantkit.eval")


@dataclass(frozen=True, slots=True)
class Answers:
    """One metric of one task. scores: of each question, where the value is their mean; hashes: of the questions."""

    value: float
    stderr: float | None
    chance: float
    higher_is_better: bool
    questions: int
    shots: int
    hashes: tuple[str, ...]
    scores_Q: NDArray[np.float64] | None


@dataclass(frozen=True, slots=True)
class ModelAnswers:
    """What one model answered: by task, metric and filter. seconds: its loading included."""

    of: dict[tuple[str, str, str], Answers]
    seconds: float
    device: str


def check_task_options(
    model: str | Path, tasks: str | Sequence[str], ref: str | Path | None = None, *, limit: int | None = None,
    num_fewshot: int | None = None, include_path: str | Path | None = None, device: str = "auto",
    engine: str | None = None, kv_cache: str | None = None,
) -> tuple[Path, Path | None]:  # fmt: skip
    """The folders (of GGUF: the files) of the model and its original; UserError for what names and files show."""
    if engine not in (None, *ENGINES):
        if engine == "llama.cpp":
            raise UserError("--engine llama.cpp computes texts, not tasks\nhint: leave out --engine, or take paged")
        raise unknown("engine", engine, ENGINES)
    for name, value, least in (("--limit", limit, 1), ("--num-fewshot", num_fewshot, 0)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise UserError(f"{name} is {value!r}; expected a whole number of {least} or more")
    check_task_files(include_path, names_of(tasks))
    paged = "paged" if engine == "paged" else None
    folder, original = check_before_torch(
        model, ref, ["general"], context=2, device=device, engine=paged, kv_cache=kv_cache
    )
    check_lm_eval()
    assert folder is not None, "the model is a path or a name"
    return folder, original


def evaluate_tasks(
    model: str | Path,
    tasks: str | Sequence[str],
    *,
    ref: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
    device: str = "auto",
    engine: str | None = None,
    kv_cache: str | None = None,
    batch_size: int | str = "auto",
    trust_remote_code: bool = False,
    progress: bool = False,
) -> TaskEvaluation:
    """Values of a model on tasks and, given `ref`, how they compare with that model's on the same questions.

    model, ref    folders, Hub ids or GGUF files, quantized or not; both run in float32 on a CPU
    tasks         names of lm-eval or of quantkit's own tasks, groups, tags, patterns or YAML files: a,b or a list
    limit         questions of each task, its first; num_fewshot: examples before each; include_path: more task files
    engine        paged: the model runs in the paged engine; the original always as transformers runs it
    batch_size    contexts of a forward; progress: lm-eval's bars on stderr

    UserError for bad input, RunError where the logits are not finite.
    """
    folder, ref_folder = check_task_options(
        model, tasks, ref, limit=limit, num_fewshot=num_fewshot, include_path=include_path, device=device,
        engine=engine, kv_cache=kv_cache,
    )  # fmt: skip
    loaded = load_tasks(tasks, include_path)
    if ref is not None and ref_folder is not None:
        from quantkit_eval.folders import check_tokenizers, load_tokenizer

        own, other = (load_tokenizer(each, trust_remote_code)[0] for each in (folder, ref_folder))
        sample = str(next(iter(loaded[0].eval_docs), ""))
        check_tokenizers(model, own, ref, other, sample, "answers would be scored on other tokens")
    options: dict[str, Any] = {
        "num_fewshot": num_fewshot, "limit": limit, "progress": progress, "device": device, "batch_size": batch_size,
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    found = answer(folder, loaded, engine=engine or "plain", kv_cache=kv_cache, **options)
    original = None if ref_folder is None else answer(ref_folder, loaded, **options)
    from quantkit_eval.evaluation import versions

    return TaskEvaluation(
        model=str(model),
        ref=None if ref is None else str(ref),
        results=results_of(found, original),
        rule=RULE,
        limit=limit,
        device=found.device,
        engine=engine,
        kv_cache=kv_cache,
        seconds=found.seconds,
        ref_seconds=None if original is None else original.seconds,
        versions=versions(PACKAGES),
    )


def answer(
    folder: Path, tasks: list[Any], *, num_fewshot: int | None = None, limit: int | None = None,
    progress: bool = False, **options: Any,
) -> ModelAnswers:  # fmt: skip
    """The answers of a model to loaded tasks. options: of QuantkitLM."""
    from quantkit_eval.lm_eval_model import QuantkitLM

    started = time.perf_counter()
    LOG.info("loading %s", folder)
    lm = QuantkitLM(str(folder), **options)
    with _lm_eval_output(progress):
        found = _answers(_evaluate(lm, tasks, num_fewshot, limit))
    where = str(lm.device)
    del lm
    gc.collect()  # the next model needs this one's memory
    return ModelAnswers(found, time.perf_counter() - started, where)


def results_of(own: ModelAnswers, original: ModelAnswers | None) -> tuple[TaskResult, ...]:
    """Each metric of each task, beside the original's. RunError where these answered other questions."""
    return tuple(_result(key, one, None if original is None else original.of[key]) for key, one in own.of.items())


def _evaluate(lm: Any, tasks: list[Any], num_fewshot: int | None, limit: int | None) -> dict[str, Any]:
    """lm-eval's results with every answer; settings and seeds as its command has them by default.

    Not its `simple_evaluate`, which ends with seconds of asking pip and git what is installed.
    """
    import torch
    from lm_eval.evaluator import evaluate

    for task in tasks:
        wanted, own = num_fewshot, task.get_config("num_fewshot")
        if own != 0 and (wanted is not None or own is None):  # a task that says 0 means it
            task.set_config(key="num_fewshot", value=wanted or 0)
        task.set_fewshot_seed(seed=SEED)
    random.seed(0)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    try:
        with hub_errors("a task"):
            found: Any = evaluate(lm, {"tasks": {task.task_name: task for task in tasks}}, limit, bootstrap_iters=1000)
    except (UserError, RunError):
        raise
    except Exception as error:  # templates and metrics of a task meet its rows here
        names = ", ".join(task.task_name for task in tasks)
        raise UserError(f"tasks {names}: lm-eval failed on them: {first_line(error)}") from error
    return found


@contextmanager
def _lm_eval_output(progress: bool) -> Iterator[None]:
    """lm-eval's bars and remarks, on stderr or nowhere."""
    with ExitStack() as stack:
        stack.enter_context(quiet_libraries())
        stack.enter_context(quiet_lm_eval())
        if not progress:
            stack.enter_context(redirect_stderr(io.StringIO()))
        yield


def _answers(found: dict[str, Any]) -> dict[tuple[str, str, str], Answers]:
    """By task, metric and filter, from the results of lm-eval, in its order."""
    answers = {}
    for task, samples in found["samples"].items():
        values, config = found["results"][task], found["configs"][task]
        for key, value in values.items():
            metric, _, filter_ = key.partition(",")
            if not filter_ or metric.endswith("_stderr") or not isinstance(value, int | float | np.number):
                continue
            own = [sample for sample in samples if sample["filter"] == filter_]
            scores = [sample.get(metric) for sample in own]
            stderr = values.get(f"{metric}_stderr,{filter_}")
            plain = all(isinstance(score, bool | int | float | np.number | np.bool_) for score in scores)
            scores_Q = np.array(scores, dtype=np.float64) if plain and scores else None
            if scores_Q is not None and not np.isclose(scores_Q.mean(), float(value), rtol=1e-9, atol=1e-12):
                scores_Q = None  # a perplexity of log-likelihoods, say
            guess = config.get("output_type") == "multiple_choice" and metric.startswith("acc")
            answers[task, metric, filter_] = Answers(
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float | np.number) else None,
                chance=float(np.mean([1 / len(sample["filtered_resps"]) for sample in own])) if guess else 0.0,
                higher_is_better=bool(found["higher_is_better"][task].get(metric, True)),
                questions=len(own),
                shots=int(found["n-shot"].get(task) or 0),
                hashes=tuple(sample["doc_hash"] for sample in own),
                scores_Q=scores_Q,
            )
    return answers


def _result(key: tuple[str, str, str], own: Answers, original: Answers | None) -> TaskResult:
    task, metric, filter_ = key
    comparison = None
    if original is not None:
        if own.hashes != original.hashes:
            raise RunError(f"task {task!r} gave the two models different questions")
        pair = None if own.scores_Q is None or original.scores_Q is None else (own.scores_Q, original.scores_Q)
        comparison = compare(
            own.value, original.value, original.stderr, own.chance, higher_is_better=own.higher_is_better, answers=pair
        )
    return TaskResult(
        task, metric, filter_, own.questions, own.shots, own.value, own.stderr, own.chance, own.higher_is_better,
        comparison,
    )  # fmt: skip
