"""Nothing of other libraries reaches the screen: no bars, no warnings, with a terminal and without one."""

import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples/tiny-llama"
EVAL = ["eval", str(MODEL), "--text", str(MODEL / "eval.txt"), "--tokens", "64", "--context", "32"]
FOREIGN = re.compile(r"it/s|Loading weights|\d+%\||Warning:|tqdm|Generating|Map:")


def on_a_terminal(command: list[str]) -> tuple[int, str]:
    """Exit code and all that the command wrote to a terminal that is its stdout and stderr."""
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (40, 120))  # without a width bars draw nothing
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=terminal, stderr=terminal, cwd=ROOT)
    os.close(terminal)
    written = b""
    while True:
        try:
            part = os.read(controller, 1 << 16)
        except OSError:  # Linux' way to say that nobody holds the terminal any more
            break
        if not part:
            break
        written += part
    os.close(controller)
    return process.wait(), written.decode()


def quantize(output: Path) -> list[str]:
    settings = [
        "calibration.data=examples/tiny-llama/calibration.txt",
        "calibration.samples=2",
        "calibration.seq_len=16",
    ]
    sets = [word for setting in settings for word in ("--set", setting)]
    return ["quantize", "-r", "rtn-w4a16", "-m", str(MODEL), "-o", str(output), *sets]


@pytest.mark.parametrize("verb", ["eval", "quantize"])
def test_commands_show_only_their_own(tmp_path: Path, verb: str) -> None:
    arguments = EVAL if verb == "eval" else quantize(tmp_path / "q")
    code, shown = on_a_terminal([sys.executable, "-m", "quantkit", *arguments])
    assert code == 0, shown
    assert not FOREIGN.findall(shown), shown


@pytest.mark.parametrize("terminal", [True, False])
def test_load_is_silent_and_leaves_the_settings(terminal: bool) -> None:
    script = f"""
import quantkit
from transformers.utils import logging
before = logging.is_progress_bar_enabled(), logging.get_verbosity()
quantkit.load({str(MODEL)!r})
assert before == (logging.is_progress_bar_enabled(), logging.get_verbosity()) == (True, before[1])
"""
    command = [sys.executable, "-c", script]
    if terminal:
        assert on_a_terminal(command) == (0, "")
    else:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
