"""Nothing of other libraries reaches the screen: no bars, no warnings, with a terminal and without one."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples/tiny-llama"
EVAL = ["eval", str(MODEL), "--text", str(MODEL / "eval.txt"), "--tokens", "64", "--context", "32"]
FOREIGN = re.compile(r"it/s|Loading weights|\d+%\||Warning:|tqdm|Generating|Map:")


def on_a_terminal(command: list[str]) -> tuple[int, str]:
    """Exit code and all that the command wrote to a terminal that is its stdout and stderr."""
    controller, terminal = pty.openpty()
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


@pytest.mark.parametrize("terminal", [True, False])
def test_commands_show_only_their_own(tmp_path: Path, terminal: bool) -> None:
    verbs = [EVAL, quantize(tmp_path / "q"), ["eval", str(tmp_path / "q"), *EVAL[2:]]]
    for verb in [*verbs, ["convert", str(tmp_path / "q"), str(tmp_path / "c"), "--format", "gptq"]]:
        command = [sys.executable, "-m", "quantkit", *verb]
        if terminal:
            code, shown = on_a_terminal(command)
        else:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            code, shown = done.returncode, done.stdout + done.stderr
        assert code == 0, shown
        assert not FOREIGN.findall(shown), shown


def test_load_is_silent_and_leaves_the_settings(tmp_path: Path) -> None:
    script = f"""
import quantkit
from transformers.utils import logging
before = logging.is_progress_bar_enabled(), logging.get_verbosity()
quantkit.load({str(MODEL)!r})
assert before == (logging.is_progress_bar_enabled(), logging.get_verbosity()) == (True, before[1])
"""
    code, shown = on_a_terminal([sys.executable, "-c", script])
    assert (code, shown) == (0, "")
