"""A sweep's results as console tables."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from quantkit_eval.search.front import like_the_one_before
from quantkit_eval.search.grid import label
from quantkit_eval.search.results import Entry
from quantkit_eval.search.sweep_run import SweepResult


def render(result: SweepResult, console: Console) -> None:
    """Print all rows by size, the front, and what was impossible or failed."""
    rows = sorted(
        (e for e in result.entries if e.row), key=lambda e: (e.row.size_bytes, e.row.kl.value) if e.row else ()
    )
    console.print(_table("all runs, by size; KL in nats with half of its 95 % interval", rows))
    front = result.front
    like = like_the_one_before([e.row.point(e.label) for e in front if e.row])
    title = "Pareto front; KL beside the row above: lower, or cannot tell where intervals overlap"
    console.print(_table(title, front, ["cannot tell" if one else "lower" for one in like]))
    if result.best is not None:
        console.print(f"best: {result.best.label} (the smallest that cannot be told from the lowest KL)", markup=False)
    for one in result.impossible:
        console.print(f"impossible: {one.label}: {one.reason}", markup=False, highlight=False)
    for entry in result.failed:
        console.print(f"failed: {entry.label}: {entry.error}", markup=False, highlight=False)
    for entry in result.entries:
        if entry.folder is not None:
            console.print(f"kept: {result.output / entry.folder}", markup=False, highlight=False, soft_wrap=True)
    for remark in result.remarks:
        console.print(remark, markup=False, highlight=False)
    console.print(f"{result.output}: results.parquet, results.csv", markup=False, highlight=False, soft_wrap=True)


def _table(title: str, entries: list[Entry], beside: list[str] | None = None) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("settings", min_width=20)
    names = ["MB", "bits", "KL", "top-1 %", "ppl", "s", "tok/s"]
    for name in names if beside is None else [*names[:3], "beside"]:
        table.add_column(name, justify="right", no_wrap=True)
    short = _short_names([entry.settings for entry in entries])
    for at, entry in enumerate(entries):
        if (row := entry.row) is None:
            continue
        kl = f"{row.kl.value:.4f} ± {(row.kl.high - row.kl.low) / 2:.4f}"
        cells = [f"{row.size_bytes / 1e6:.2f}", f"{row.bits_per_weight:.3f}", kl]
        if beside is None:
            cells += [f"{100 * row.top1.value:.1f}", f"{row.perplexity.value:.2f}", f"{row.seconds:.0f}"]
            cells.append(f"{row.tokens_per_second:.0f}")
        else:
            cells.append("" if at == 0 else beside[at])
        table.add_row(escape(label({short[key]: value for key, value in entry.settings.items()})), *cells)
    return table


def _short_names(settings: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Key -> its last part, where no other key has the same."""
    keys = list(dict.fromkeys(key for one in settings for key in one))
    last = {key: key.rpartition(".")[2] for key in keys}
    return {key: name if list(last.values()).count(name) == 1 else key for key, name in last.items()}
