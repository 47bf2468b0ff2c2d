"""Progress and the log: a bar where somebody looks at a terminal, lines elsewhere, silence on request."""

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantkit import progress
from quantkit.errors import UserError
from quantkit.progress import Progress, duration

MODEL = Path(__file__).resolve().parents[1] / "examples" / "tiny-llama"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def logger() -> Iterator[logging.Logger]:
    """The logger of quantkit, put back afterwards."""
    found = logging.getLogger("quantkit")
    before = found.handlers[:], found.level
    found.handlers[:], found.level = [logging.NullHandler()], logging.NOTSET
    yield found
    found.handlers[:], found.level = before


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def run(bar: Progress, clock: list[float], seconds: float, *, total: int = 4, done: int = 0) -> None:
    """A run of `total` blocks that take so many seconds each."""
    bar.stage("loading model")
    bar.begin(total, done)
    for _ in range(done):
        bar.replayed()
    bar.start_blocks()
    for _ in range(done, total):
        bar.note("mlp.up_proj")
        clock[0] += seconds
        bar.note("mlp.down_proj")
        bar.advance()


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.INFO]


def test_lines_of_the_log(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "quantkit")
    with Progress() as bar:
        run(bar, clock, 40)
    assert lines(caplog) == [
        "loading model",
        "block 1 of 4: mlp.up_proj",
        "block 1 of 4: mlp.down_proj",
        "block 1 of 4 done, 2 min left",
        "block 2 of 4: mlp.down_proj, 4 min left",
        "block 3 of 4: mlp.down_proj, 2 min left",
        "block 4 of 4: mlp.down_proj, 53 s left",
        "block 4 of 4 done",
    ]


def test_fast_blocks_are_not_all_told(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    """The first, one every 30 seconds, and the last."""
    caplog.set_level(logging.INFO, "quantkit")
    with Progress() as bar:
        run(bar, clock, 1, total=100)
    told = [line for line in lines(caplog) if line.endswith("done") or "done," in line]
    assert "block 1 of 100 done, 2 min left" in told
    assert told[-1] == "block 100 of 100 done"
    assert len(lines(caplog)) <= 7


def test_a_resumed_run_counts_from_where_it_was(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "quantkit")
    with Progress() as bar:
        run(bar, clock, 60, total=8, done=6)
    assert "resuming at block 7 of 8" in lines(caplog)
    assert "block 7 of 8 done, 60 s left" in lines(caplog)


def test_what_was_expected_until_a_block_is_done(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "quantkit")
    with Progress(expected=400) as bar:
        run(bar, clock, 20)
    assert "block 1 of 4: mlp.up_proj, 7 min left" in lines(caplog)
    assert "block 1 of 4 done, 60 s left" in lines(caplog)


@pytest.mark.parametrize("mode", ["off", False])
def test_silent_on_request(mode: progress.Mode, clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "quantkit")
    with Progress(mode) as bar:
        run(bar, clock, 60)
    assert lines(caplog) == []


def test_a_terminal_sees_a_bar_and_no_lines(
    clock: list[float], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "quantkit")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress() as bar:
        run(bar, clock, 60)
    assert lines(caplog) == []
    assert "block 4 of 4" in sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" in sys.stderr.getvalue()  # type: ignore[attr-defined]


def test_plain_has_no_escapes_on_a_terminal_and_needs_no_logging(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, logger: logging.Logger
) -> None:
    """In Python, plain shows its lines on stderr also where nobody has set up logging; nothing stays behind."""
    monkeypatch.setattr(progress, "_is_heard", lambda _: False)
    monkeypatch.setattr(sys, "stderr", Terminal())
    before = logger.handlers[:], logger.level
    with Progress("plain") as bar:
        run(bar, clock, 60)
    text = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "block 4 of 4 done\n" in text
    assert not {"\x1b", "\r"} & set(text)
    assert (logger.handlers, logger.level) == before


@pytest.mark.parametrize(
    ("mode", "verbosity", "seen"),
    [
        ("auto", 0, ["one", "warning: three"]),
        ("plain", 0, ["one", "warning: three"]),
        ("off", 0, ["warning: three"]),
        ("auto", -1, ["warning: three"]),
        ("auto", 1, ["one", "two", "warning: three"]),
    ],
)
def test_what_the_command_writes(
    mode: progress.Mode, verbosity: int, seen: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    progress.configure("auto", 1)
    progress.configure(mode, verbosity)  # again: no line twice
    log = logging.getLogger("quantkit.somewhere")
    log.info("one")
    log.debug("two")
    log.warning("three")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == seen


def test_an_unknown_mode() -> None:
    with pytest.raises(UserError, match=r"'loud'.*auto, plain, off"):
        Progress("loud")  # type: ignore[arg-type]


def test_importing_quantkit_writes_nothing_and_loads_nothing_heavy() -> None:
    script = """
import logging, sys
import quantkit
from quantkit import progress
handlers = logging.getLogger("quantkit").handlers
assert [type(h) for h in handlers] == [logging.NullHandler], handlers
logging.getLogger("quantkit").warning("nobody listens")
with progress.Progress() as bar:
    bar.stage("loading model")
assert not {"torch", "transformers", "rich", "pydantic"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (61, "61 s"), (90, "2 min"), (3600, "60 min"), (12_000, "3 h 20 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_command_speaks_before_torch_is_imported(tmp_path: Path) -> None:
    """The first sign of life, which must come within a second, does not wait for libraries that take three."""
    script = f"""
import logging, sys
class First(logging.Handler):
    def emit(self, record):
        print(record.getMessage(), "torch" in sys.modules, flush=True)
        raise SystemExit
logging.getLogger("quantkit").addHandler(First())
from quantkit.cli.main import main
sys.argv = ["quantkit", "quantize", {str(MODEL)!r}, "-r", "rtn-w4a16", "-o", {str(tmp_path / "out")!r}]
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert str(MODEL) in done.stdout, done.stderr
    assert done.stdout.endswith(" False\n"), done.stdout


def test_a_run_tells_its_blocks_on_stderr_alone(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "quantkit",
        "quantize",
        str(MODEL),
        "-r",
        "rtn-w8a16",
        "--json",
        "--set",
        "calibration=null",
    ]
    done = subprocess.run([*command, "-o", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"]
    assert not {"\x1b", "\r"} & set(done.stderr)
    told = done.stderr.splitlines()
    for line in ("loading model", "tracing", "block 6 of 6 done"):
        assert line in told, done.stderr
    assert any(line.startswith("block 1 of 6 done, ") and line.endswith(" left") for line in told), done.stderr
    quiet = subprocess.run([*command, "-q", "-o", str(tmp_path / "quiet")], capture_output=True, text=True)
    assert (quiet.returncode, quiet.stderr) == (0, "")
