"""push against a Hub on this machine: what arrives, and what is never sent."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from quantkit_eval.report.build import write_report
from typer.testing import CliRunner

from quantkit.checkpoint.hub_upload import upload
from quantkit.cli import main as cli
from quantkit.errors import RunError, UserError
from quantkit.quantization import pipeline
from quantkit.recipe import load as recipe
from tests.fake_hub import FakeHub, fake_hub

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "tiny-llama"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "w4"
    rounding = ["weights.algorithm={rtn: {range: minmax}}", "calibration=null"]
    pipeline.quantize(recipe.load("rtn-w4a16", rounding, str(MODEL)), folder)
    write_report(folder)
    (folder / ".hidden").write_text("not for the Hub")
    return folder


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub() as running:
        yield running


def push(*arguments: object, address: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: the Hub's library reads its environment once."""
    path = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "eval"))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    own = {"PYTHONPATH": path, "HF_ENDPOINT": address, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "quantkit", "push", *map(str, arguments)]
    return subprocess.run(command, env=kept | own | environment, capture_output=True, text=True, check=False)


def test_everything_arrives(made: Path, hub: FakeHub, tmp_path: Path) -> None:
    done = push(made, "me/w4", "--private", address=hub.address, HF_TOKEN="hf_test", HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.address}/me/w4"
    assert hub.private == {"me/w4": True}
    expected = {path.name: path.read_bytes() for path in made.iterdir() if not path.name.startswith(".")}
    assert {name: len(content) for name, content in hub.files.items()} == {n: len(c) for n, c in expected.items()}
    assert hub.files == expected
    assert "base_model_relation: quantized" in hub.cards[0]
    assert "Bearer hf_test" in hub.tokens


def test_public_unless_it_is_said(made: Path, hub: FakeHub, tmp_path: Path) -> None:
    done = push(made, "me/w4", "--json", address=hub.address, HF_TOKEN="hf_test", HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert hub.private == {"me/w4": False}
    assert '"private": false' in done.stdout


def test_without_a_login(made: Path, hub: FakeHub, tmp_path: Path) -> None:
    hub.refuses = 401
    done = push(made, "me/w4", address=hub.address, HF_HOME=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert "hf auth login" in done.stderr
    assert "Traceback" not in done.stderr


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["push", *map(str, arguments)])


def break_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def lose_the_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def lose_the_scheme(folder: Path) -> None:
    shutil.copy(MODEL / "config.json", folder / "config.json")


@pytest.mark.parametrize("harm", [break_header, flip_a_bit, lose_the_config, lose_the_scheme], ids=lambda f: f.__name__)
def test_what_verify_refuses_is_not_sent(
    made: Path, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: Any
) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "w4"))
    harm(folder)
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    done = invoke(folder, "me/w4")
    assert done.exit_code == 2, done.output
    assert hub.tokens == set(), "the Hub was asked"


def test_other_refusals(made: Path, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    for arguments, words in (
        ((made, "me/two words"), "not a name of a Hub repository"),
        ((made, "a/b/c"), "not a name of a Hub repository"),
        ((tmp_path / "nope", "me/w4"), "no such"),
        ((made / "model.safetensors", "me/w4"), "is a file"),
    ):
        done = invoke(*arguments)
        assert done.exit_code == 2, done.output
        assert words in done.output
    assert hub.tokens == set()


def test_a_hub_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    with fake_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        hub.refuses = 403
        with pytest.raises(UserError, match=r"the Hub refuses \(403\)"):
            upload(tmp_path, "me/w4")
        hub.refuses = 418
        with pytest.raises(RunError, match="did not take it"):
            upload(tmp_path, "me/w4")
    with pytest.raises(RunError, match="the upload failed"):
        upload(tmp_path, "me/w4")
