"""quantkit sweep as a command: killed and run again, interrupted, by Ray; each of them takes a while."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantkit.cli.main import app
from tests.eval.search.test_sweep_run import home, tiny

__all__ = ["home", "tiny"]  # fixtures
ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("", "eval", "kernels"))}


def command(home: Path, *more: str) -> list[str]:
    return [
        "sweep", "--model", str(home / "model"), "--recipe", str(home / "base.yaml"), "--text", str(home / "text.txt"),
        "--context", "32", "--output", str(home / "out"), "--grid", "weights.bits=3,4", *more,
    ]  # fmt: skip


def begin(home: Path, *more: str) -> "subprocess.Popen[str]":
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # ignored in a background shell
    code = f"{listen}\nfrom quantkit.__main__ import main\nmain()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *command(home, *more)], env=ENVIRONMENT, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def rows(home: Path) -> list[Path]:
    return list((home / "out" / "rows").glob("*.json"))


@pytest.mark.slow
def test_killed_and_run_again(home: Path) -> None:
    pd = pytest.importorskip("pandas")
    process = begin(home, "--grid", "weights.group_size=32,64")
    while not rows(home) and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    first = {path: path.stat().st_mtime_ns for path in rows(home)}
    assert 1 <= len(first) < 4
    done = begin(home, "--grid", "weights.group_size=32,64", "--json", "--jobs", "2")
    out, err = done.communicate(timeout=600)
    assert done.returncode == 0, err
    assert len(json.loads(out)["rows"]) == 4
    assert {path: path.stat().st_mtime_ns for path in first} == first
    assert pd.read_parquet(home / "out" / "results.parquet").shape[0] == 4
    assert "resuming at run" in err


@pytest.mark.slow
def test_ctrl_c(home: Path) -> None:
    process = begin(home)
    while not any((home / "out").glob("work/*")) and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; it goes on where it was" in err
    assert "Traceback" not in err
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nobody of the group is left


@pytest.mark.slow
def test_tasks_are_columns_of_a_run(home: Path) -> None:
    pytest.importorskip("lm_eval")
    pd = pytest.importorskip("pandas")
    arguments = command(home, "--tasks", "qk_cloze,qk_choice", "--limit", "6", "--keep", "best")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    table = pd.read_parquet(home / "out" / "results.parquet")
    assert table["tasks.qk_choice.acc"].between(0, 1).all()
    assert table["tasks.qk_choice.acc_stderr"].notna().all()
    assert table["folder"].notna().sum() == 1
    assert len(rows(home)) == 2


@pytest.mark.slow
def test_each_run_a_task_of_ray(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        result = CliRunner().invoke(app, command(home, "--ray", "--json"))
        assert result.exit_code == 0, result.output
        assert len(json.loads(result.stdout)["rows"]) == 2
        assert len(rows(home)) == 2
        assert ray.is_initialized()  # it was the caller's
    finally:
        ray.shutdown()


def test_its_mistakes_are_answered_without_torch(home: Path) -> None:
    code = "import sys; from quantkit.__main__ import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    arguments = command(home, "--grid", "weights.group_sice=32")
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout.strip() == "False"
    assert done.stderr == (
        f"error: {home / 'base.yaml'}:2: no recipe has a key `weights.group_sice` (--grid weights.group_sice=32)\n"
        "hint: did you mean `weights.group_size`?\n"
    )


def test_an_unknown_task_is_answered_before_any_run(home: Path) -> None:
    pytest.importorskip("lm_eval")
    result = CliRunner().invoke(app, command(home, "--tasks", "nowhere/task.yaml"))
    assert result.exit_code == 2
    assert "nowhere/task.yaml" in result.output
    assert not (home / "out").exists()


def test_ray_takes_an_address_or_none(home: Path) -> None:
    for more in (["--ray"], ["--ray", "127.0.0.1:6379"], ["--ray", "--limit", "0"]):
        result = CliRunner().invoke(app, command(home, *more, "--jobs", "0"))
        assert result.exit_code == 2
        assert "--jobs is 0" in result.output or "--limit is 0" in result.output
