"""quantkit env: what a bug report needs, and nothing that is nobody's business."""

import getpass
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quantkit.cli import environment
from quantkit.cli.main import app


def test_it_names_versions_and_machine() -> None:
    found = json.loads(CliRunner().invoke(app, ["env", "--json"]).stdout)
    assert found["versions"]["torch"]
    assert found["versions"]["vllm"] is None or found["versions"]["vllm"]
    assert found["ram_gib"] > 0.1
    assert found["os"]
    assert set(found["compilers"]) == set(environment.COMPILERS)
    shown = CliRunner().invoke(app, ["env"], env={"COLUMNS": "80"}).stdout
    for word in ("quantkit", found["versions"]["torch"], found["python"], "compilers", "gpus"):
        assert word in shown


def test_it_tells_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = tmp_path / "home-of-alice"
    (home / "bin").mkdir(parents=True)
    compiler = home / "bin" / "g++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    for name, value in {
        "HOME": str(home),
        "HF_TOKEN": "hf_secret",
        "USER": "alice-user",
        "LOGNAME": "alice-user",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", str(home / "bin"))
    monkeypatch.setattr("sys.executable", "/data/alice-user/venv/bin/python")
    shown = CliRunner().invoke(app, ["env", "--json"]).stdout
    found = json.loads(shown)
    assert found["compilers"]["g++"] == "~/bin/g++"
    assert found["executable"] == "/data/.../venv/bin/python"
    for secret in ("hf_secret", "alice", "HF_TOKEN"):
        assert secret not in shown
    assert getpass.getuser() == "alice-user"


@pytest.mark.parametrize(
    ("path", "expected"),
    [("/root/x", "~/x"), ("/rooted/x", "/rooted/x"), ("/home/bob/x", "/home/.../x"), ("/usr/bin/c++", "/usr/bin/c++")],
)
def test_homes(monkeypatch: pytest.MonkeyPatch, path: str, expected: str) -> None:
    monkeypatch.setenv("HOME", "/root")
    monkeypatch.setenv("LOGNAME", "root")
    assert environment.without_home(path) == expected
