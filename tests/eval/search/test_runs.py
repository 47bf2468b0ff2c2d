"""Processes: they end with their sweep, and what goes wrong in one is a line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from quantkit_eval.search import runs
from quantkit_eval.search.run_worker import Job, encoded
from quantkit_eval.search.runs import Processes, run_all

ROOT = Path(__file__).resolve().parents[3]
JOB = Job(
    name="a", label="x=1", recipe={"model": "nowhere-at-all/x"}, hashes=("m", "r", "t"), text="t", context=8,
    tokens=None, tasks=(), limit=None, device="cpu", trust_remote_code=False, folder="", row="", cwd=".", peak_bytes=0,
)  # fmt: skip


def worker(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the processes run `code` in place of a run."""
    (tmp_path / "stand_in.py").write_text(code)
    monkeypatch.setattr(runs, "WORKER", "stand_in")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import sys; sys.stdin.readline()", None),
        (
            "import sys; print('noise', file=sys.stderr); sys.exit('error: no such text\\nhint: x')",
            "no such text\nhint: x",
        ),
        ("raise ValueError('bad')", "ValueError: bad"),
        ("import os; os.kill(os.getpid(), 9)", "its process was ended by signal 9 (out of memory?)"),
        ("import os; os._exit(3)", "its process ended with code 3"),
    ],
)
def test_how_a_process_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, error: str | None) -> None:
    worker(code, tmp_path, monkeypatch)
    with Processes(1) as pool:
        (outcome,) = run_all(iter([JOB]), pool)
    assert outcome == (JOB, error)


def test_as_many_at_a_time_as_there_are_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process waits until two have begun: with one slot this would never end."""
    code = f"""
import os, sys, time
sys.stdin.readline()
open(r'{tmp_path}/begun-%d' % os.getpid(), 'w').close()
while len([name for name in os.listdir(r'{tmp_path}') if name.startswith('begun')]) < 2: time.sleep(0.02)
"""
    worker(code, tmp_path, monkeypatch)
    with Processes(2) as pool:
        assert [one.error for one in run_all(iter([JOB] * 3), pool)] == [None] * 3


def test_leaving_the_pool_ends_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"import os, time\nopen(r'{tmp_path}/pid', 'w').write(str(os.getpid()))\ntime.sleep(600)"
    worker(code, tmp_path, monkeypatch)

    def interrupted() -> None:
        with Processes(1) as pool:
            pool.start(JOB)
            while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
                time.sleep(0.02)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_worker_ends_when_its_sweep_has_died(tmp_path: Path) -> None:
    """Its stdin is closed by the death of whoever held it; the run itself would hang here."""
    code = (
        "import time; from quantkit_eval.search import run_worker; run_worker.attempt = lambda job: time.sleep(600)\n"
        "run_worker.main()"
    )
    paths = os.pathsep.join(str(ROOT / name) for name in ("", "eval", "kernels"))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths}
    )
    assert process.stdin is not None
    process.stdin.write(encoded(JOB))
    process.stdin.flush()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)  # Ctrl-C is the sweep's to answer
    time.sleep(0.2)
    process.stdin.close()
    assert process.wait(60) in (1, -signal.SIGINT)
