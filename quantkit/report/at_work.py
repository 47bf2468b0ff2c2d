"""The parts of the report's page that show the model at work: tasks, and what it writes beside the original."""

import shlex

from quantkit.report import figures
from quantkit.report.document import Document
from quantkit.report.markup import Markup, element, figure, join, missing, table, text
from quantkit.report.markup import figures as side_by_side
from quantkit.report.measurements import Continuation, Sample, TaskResult
from quantkit.report.sections import measure_command, number, percent

TASK_COLUMNS = ("task", "value", "original", "recovery", "beyond chance", "difference, points", "lost", "gained",
                "questions", "says")  # fmt: skip


def tasks(document: Document) -> Markup:
    """What each task says, with the paired difference where it is known."""
    found = document.measured.tasks
    if not found:
        folder = shlex.quote(document.folder)
        measure = f"quantkit eval {folder} --tasks TASKS --ref ORIGINAL --json > tasks.json"
        what = "No results of tasks were given."
        return missing(what, f"{measure} && quantkit report {folder} --results tasks.json")
    caption = "Points are paired differences (the same questions), lines 95 %: those that touch 0 say nothing."
    drawn = side_by_side(figure(figures.tasks(found), caption))
    words = (
        "Recovery is the value by the original's, and “beyond chance” the same less what guessing gives. "
        "Lost and gained count the questions that only the original, or only this model, answers rightly."
    )
    shown = table(TASK_COLUMNS, [_task_row(task) for task in found], numeric=range(1, 9), stack=True)
    return join([element("p", words), drawn, shown])


def _task_row(task: TaskResult) -> tuple[object, ...]:
    def with_error(value: float | None, error: float | None) -> str:
        show = percent if 0 <= task.value <= 1 else number  # a task's metric may be a perplexity
        return "missing" if value is None else show(value) + ("" if error is None else f" ± {show(error)}")

    beyond = "missing"
    if task.chance is not None and task.reference is not None and task.reference > task.chance:
        beyond = percent((task.value - task.chance) / (task.reference - task.chance))
    difference = "missing"
    if task.difference is not None:
        error = "" if task.difference_stderr is None else f" ± {100 * task.difference_stderr:.2f}"
        difference = f"{100 * task.difference.value:+.2f}{error}"
    return (
        f"{task.task}, {task.metric}",
        with_error(task.value, task.stderr),
        with_error(task.reference, task.reference_stderr),
        "missing" if task.recovery is None else percent(task.recovery),
        beyond,
        difference,
        *("missing" if count is None else str(count) for count in (task.lost, task.gained, task.questions)),
        task.verdict or "missing",
    )


def samples(document: Document) -> Markup:
    """Greedy continuations side by side; the first token that differs is marked in both."""
    found = document.measured.samples
    if not found:
        return missing("No text was generated beside the original.", measure_command(document))
    words = (
        "Each model continues a prompt with the token it finds likeliest. Grey: what both wrote; marked: the first "
        "token that differs. Behind it the two are on different paths, and a later difference says little."
    )
    return join([element("p", words), *(_sample(one) for one in found)])


def _sample(one: Sample) -> Markup:
    same = one.shared_tokens >= one.tokens
    said = (
        f"all {one.tokens} tokens are the same" if same else f"the same for {one.shared_tokens} of {one.tokens} tokens"
    )
    sides = element(
        "div",
        *(
            element("div", element("h3", name), element("p", *_continuation(side), class_="text"))
            for name, side in (("original", one.reference), ("quantized", one.model))
        ),
        class_="sides",
    )
    return element(
        "div", element("h3", f"prompt; {said}"), element("p", one.prompt, class_="text"), sides, class_="sample"
    )


def _continuation(side: Continuation) -> list[Markup]:
    differing = side.differing.replace("\n", "⏎\n") if not side.differing.strip() else side.differing
    marked = element("mark", differing or "␃") if side.differing or side.rest else None
    return [part for part in (element("span", side.shared, class_="same"), marked, text(side.rest)) if part is not None]
