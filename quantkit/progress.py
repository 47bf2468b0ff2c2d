"""What a long run is doing: a bar on a terminal or in a notebook, lines of the log elsewhere; never on stdout.

Everything is logged below the logger `quantkit`. Importing quantkit installs no handler that writes; `configure` does,
for the command. No torch, and rich only where a bar is drawn: a command says what it does before anything heavy loads.
"""

import importlib.util
import logging
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from quantkit.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

Mode = bool | Literal["auto", "plain", "off"]

LOG = logging.getLogger("quantkit.progress")
PAUSE = 30.0  # seconds between two lines of the log, but for the first block and the last


class _Stderr(logging.Handler):
    """Writes to whatever sys.stderr is at the moment: while a bar is drawn, that is the place above it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
            sys.stderr.write(f"{level}{record.getMessage()}\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


_handler = _Stderr()


def configure(mode: Mode = "auto", verbosity: int = 0) -> None:
    """Write the log of quantkit to stderr, for a command. May be called again; the last call counts.

    mode       as for a run; off: warnings alone
    verbosity  below 0: warnings alone; 0: what happens (INFO); above 0: also details (DEBUG)
    UserError for an unknown mode.
    """
    quiet = verbosity < 0 or check_mode(mode) == "off"
    root = logging.getLogger("quantkit")
    root.setLevel(logging.WARNING if quiet else logging.DEBUG if verbosity > 0 else logging.INFO)
    if _handler not in root.handlers:
        root.addHandler(_handler)


def check_mode(mode: Mode) -> Literal["auto", "plain", "off"]:
    """auto, plain or off; True stands for auto and False for off. UserError for anything else."""
    if isinstance(mode, bool):
        return "auto" if mode else "off"
    if mode not in ("auto", "plain", "off"):
        raise UserError(f"progress is {mode!r}; expected auto, plain, off, True or False")
    return mode


class Progress:
    """`with Progress(mode) as bar`: bar.stage("tracing"); bar.begin(32, 6); bar.note("q_proj"); bar.advance(); ...

    mode      auto: a bar on a terminal or in a notebook, else lines of the log; plain: lines of the log, which go to
              stderr where no logging is set up; off: neither
    expected  seconds that all blocks will take, as estimated beforehand; None: unknown until one block is done
    unit      what is done one after the other, where that is not blocks
    """

    def __init__(self, mode: Mode = "auto", *, expected: float | None = None, unit: str = "block") -> None:
        self.mode, self._unit = check_mode(mode), unit
        self._console = _bar_console() if self.mode == "auto" else None
        self._level = logging.INFO if self.mode != "off" and self._console is None else logging.DEBUG
        self._expected = expected
        self._total = self._first = self._done = 0
        self._began = self._said = time.monotonic()
        self._silent = True  # no line of a block yet
        self._borrowed: int | None = None  # the level of the logger, while a run in plain mode shows its lines itself
        if self._console is not None:
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            text, eta = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[eta]}", markup=False)
            self._bar = Bar(text, BarColumn(), TimeElapsedColumn(), eta, console=self._console, transient=True)
            self._task = self._bar.add_task("starting", total=None, eta="")

    def stage(self, text: str) -> None:
        """Something outside the blocks begins: "loading model"."""
        LOG.log(self._level, text)
        self._draw(text)

    def expectation(self) -> str:
        """`, about 3 min` for all blocks, where that was estimated; else nothing."""
        return "" if self._expected is None else f", about {duration(self._expected)}"

    def begin(self, total: int, done: int = 0) -> None:
        """The blocks begin, of which a run before has done some."""
        self._total, self._first, self._done = total, done, 0
        if done:
            self.stage(f"resuming at {self._unit} {min(done + 1, total)} of {total}")

    def replayed(self) -> None:
        """A block done by a run before was run again, unchanged."""
        self._done += 1
        self._draw(f"{self._unit} {self._done} of {self._total} was done before")

    def start_blocks(self) -> None:
        """From now on blocks are quantized: what they take tells what is left."""
        self._done, self._began = self._first, time.monotonic()

    def note(self, text: str) -> None:
        """What is being done in the current block: a linear's name."""
        text = f"{self._unit} {self._done + 1} of {self._total}: {text}"
        self._draw(text)
        if self._silent or time.monotonic() - self._said >= PAUSE:
            self._say(text)

    def advance(self) -> None:
        """The current block is done."""
        self._done += 1
        text = f"{self._unit} {self._done} of {self._total} done"
        self._draw(text)
        first_or_last = self._done in (self._first + 1, self._total)
        if first_or_last or time.monotonic() - self._said >= PAUSE:
            self._say(text)

    def eta(self) -> str:
        """`, 3 min left`: from the blocks done by this run, before that from what was expected; empty if unknown."""
        done, left = self._done - self._first, self._total - self._done
        if done > 0:
            seconds = (time.monotonic() - self._began) / done * left
        elif self._expected is not None and self._total:
            seconds = self._expected * left / self._total
        else:
            return ""
        return f", {duration(seconds)} left" if left else ""

    def _say(self, text: str) -> None:
        self._silent, self._said = False, time.monotonic()
        LOG.log(self._level, "%s%s", text, self.eta())

    def _draw(self, text: str) -> None:
        if self._console is not None:
            total = self._total or None
            self._bar.update(self._task, description=text, total=total, completed=self._done, eta=self.eta()[2:])

    def __enter__(self) -> "Progress":
        if self._console is not None:
            self._bar.start()
        root = logging.getLogger("quantkit")
        if self.mode == "plain" and not _is_heard(root):
            self._borrowed = root.level
            root.addHandler(_handler)
            root.setLevel(logging.INFO)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console is not None:
            self._bar.stop()
        if self._borrowed is not None:
            root = logging.getLogger("quantkit")
            root.removeHandler(_handler)
            root.setLevel(self._borrowed)


def _is_heard(logger: logging.Logger) -> bool:
    """Whether somebody has set up logging: lines of level INFO are shown or kept."""
    found: logging.Logger | None = logger
    while found is not None:
        if any(not isinstance(handler, logging.NullHandler) for handler in found.handlers):
            return logger.isEnabledFor(logging.INFO)
        found = found.parent
    return False


def _bar_console() -> "Console | None":
    """Where a bar is drawn: a terminal's stderr or a notebook's cell; None where neither is there."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    if not terminal and "ipykernel" not in sys.modules:
        return None
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_jupyter:  # rich draws there through ipywidgets
        return console if importlib.util.find_spec("ipywidgets") else None
    return console if terminal and not console.is_dumb_terminal else None


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
