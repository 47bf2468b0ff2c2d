"""One progress line for long work: drawn on a terminal's stderr, silent anywhere else."""

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """`with Progress(total) as bar`: bar.note("what") while at it, bar.advance("what is done") after each step."""

    def __init__(self, total: int, *, enabled: bool = True) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        disable = not enabled or not sys.stderr.isatty()
        self._bar = RichProgress(*columns, console=Console(stderr=True), disable=disable, transient=True)
        self._task = self._bar.add_task("starting", total=total)

    def note(self, text: str) -> None:
        self._bar.update(self._task, description=text)

    def advance(self, text: str) -> None:
        self._bar.update(self._task, advance=1, description=text)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
