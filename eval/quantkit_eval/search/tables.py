"""A sweep's results as console tables."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from quantkit_eval.search.front import like_the_one_before
from quantkit_eval.search.grid import label
from quantkit_eval.search.results import Entry, Row
from quantkit_eval.search.sweep_run import SweepResult

WIDE = 110  # characters of a line


def render(result: SweepResult, console: Console) -> None:
    """Print all rows by size, the front, and what was impossible or failed."""
    rows = sorted(
        (e for e in result.entries if e.row), key=lambda e: (e.row.size_bytes, e.row.kl.value) if e.row else ()
    )
    console.print(_runs(rows, console.width))
    console.print(_front(result.front))
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


def _runs(entries: list[Entry], width: int) -> Table:
    """All runs; a wide screen has room for what making and running them took."""
    table, short = (
        _table("all runs, by size; KL in nats with half of its 95 % interval", ("top-1 %", "ppl")),
        _short(entries),
    )
    more = ("flips %", "s", "tok/s") if width >= WIDE else ()
    for name in more:
        table.add_column(name, justify="right", no_wrap=True)
    for entry in entries:
        if (row := entry.row) is not None:
            cells = [f"{100 * row.top1.value:.1f}", f"{row.perplexity.value:.2f}"]
            cells += [f"{100 * row.flips.value:.2f}", f"{row.seconds:.1f}", f"{row.tokens_per_second:.0f}"][: len(more)]
            table.add_row(*_place(entry, row, short), *cells)
    return table


def _front(entries: list[Entry]) -> Table:
    rows = [(entry, entry.row) for entry in entries if entry.row is not None]
    table, short = _table("Pareto front", ("KL and the row above",)), _short(entries)
    like = like_the_one_before([row.point(entry.label) for entry, row in rows])
    for at, (entry, row) in enumerate(rows):
        words = "" if at == 0 else "cannot tell" if like[at] else "clearly lower"
        table.add_row(*_place(entry, row, short), words)
    return table


def _table(title: str, more: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("settings", min_width=20)
    for name in ("MB", "bits", "KL", *more):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _place(entry: Entry, row: Row, short: Mapping[str, str]) -> list[str]:
    settings = label({short[key]: value for key, value in entry.settings.items()})
    kl = f"{row.kl.value:.3g} ± {(row.kl.high - row.kl.low) / 2:.2g}"
    return [escape(settings), f"{row.size_bytes / 1e6:.2f}", f"{row.bits_per_weight:.3f}", kl]


def _short(entries: list[Entry]) -> dict[str, str]:
    """Key -> its last part, where no other key has the same."""
    keys = list(dict.fromkeys(key for entry in entries for key in entry.settings))
    last = {key: key.rpartition(".")[2] for key in keys}
    return {key: name if list(last.values()).count(name) == 1 else key for key, name in last.items()}
