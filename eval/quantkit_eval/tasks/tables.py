"""The results of evaluate_tasks() as a console table and as rows of a Markdown table."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from quantkit_eval.tasks.results import Comparison, TaskEvaluation, TaskResult


def render_tasks(result: TaskEvaluation, console: Console) -> None:
    """Print a row for each metric of each task, beside the original's where there is one."""
    compared = result.ref is not None
    table = Table(title=escape(result.model), title_justify="left", show_lines=compared)
    table.add_column("task", overflow="fold")
    second = ("original", "above chance", "± stderr", "won", "") if compared else [""] * 5
    columns = ("value, %", "recovery", "difference", "lost", "verdict") if compared else ("value, %",)
    for column, below in zip(columns, second, strict=False):
        table.add_column(f"{column}\n{below}".strip(), justify="left" if column == "verdict" else "right")
    for row in result.results:
        name = f"{escape(row.task)}\n{escape(label(row))}" if compared else f"{escape(row.task)} {escape(label(row))}"
        table.add_row(name, *_cells(row))
    console.print(table)
    original = "" if result.ref_seconds is None else f", the original {result.ref_seconds:.1f} s"
    took = f"{result.seconds:.1f} s{original}"
    cache = "" if result.kv_cache is None else f", cache {result.kv_cache}"
    first = "" if result.limit is None else f"the first {result.limit} questions of each task, "
    console.print(f"{first}{result.engine or 'plain'} engine on {result.device}{cache}, {took}", highlight=False)
    if compared:
        console.print(result.rule, markup=False, highlight=False)
    for note in result.notes:
        console.print(f"note: {note}", markup=False, highlight=False)


def label(row: TaskResult) -> str:
    """A metric, with its filter where it has one, and the number of questions."""
    filter_ = "" if row.filter == "none" else f" ({row.filter})"
    shots = f", {row.shots}-shot" if row.shots else ""
    return f"{row.metric}{filter_}{shots}, N {row.questions}"


def _cells(row: TaskResult) -> list[str]:
    value = spread(row.value, row.stderr, row)
    if (c := row.comparison) is None:
        return [value]
    cells = [f"{value}\n{spread(c.value, c.stderr, row)}", f"{recovery(c)}\n{_above(c, row)}"]
    if (p := c.paired) is None:
        return [*cells, "-", "-", "-"]
    error = "" if p.stderr is None else f"\n± {100 * p.stderr:.2f}"
    return [*cells, f"{100 * p.difference:+.2f}{error}", f"{p.lost}\n{p.gained}", str(c.verdict)]


def spread(value: float, stderr: float | None, row: TaskResult) -> str:
    """A value and its standard error: of a share in per cent, of anything else as it is."""
    if not _share(row):
        return f"{value:.4g}" + ("" if stderr is None else f" ± {stderr:.2g}")
    return f"{100 * value:.2f}" + ("" if stderr is None else f" ± {100 * stderr:.2f}")


def recovery(c: Comparison) -> str:
    """The model's value by the original's, in per cent."""
    return "-" if c.recovery is None else f"{100 * c.recovery:.2f} %"


def _above(c: Comparison, row: TaskResult) -> str:
    if not _share(row):
        return ""
    own, original = c.above_chance
    return f"{100 * own:.1f} of {100 * original:.1f}"


def _share(row: TaskResult) -> bool:
    return row.higher_is_better and 0 <= row.value <= 1


def markdown(results: Sequence[TaskEvaluation], names: Sequence[str]) -> str:
    """A Markdown table, a row for each model and a column for each task."""
    rows = results[0].results
    lines = ["| | " + " | ".join(f"{row.task}, {row.metric}" for row in rows) + " | seconds |"]
    lines.append("|---" * (len(rows) + 2) + "|")
    for result, name in zip(results, names, strict=True):
        cells = []
        for row in result.results:
            text = spread(row.value, row.stderr, row)
            if (c := row.comparison) is not None and (p := c.paired) is not None:
                text = f"{100 * row.value:.1f} ({recovery(c)}), {100 * p.difference:+.1f} ± {100 * (p.stderr or 0):.1f}"
                text += f", -{p.lost} +{p.gained}: {c.verdict}"
            cells.append(text)
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {result.seconds:.0f} |")
    return "\n".join(lines)
