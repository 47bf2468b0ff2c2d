"""report and quantize --report as a user runs them."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from quantkit.cli import main as cli
from quantkit.quantization import pipeline
from quantkit.recipe import load as recipe
from tests.chromium import CHROMIUM

MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama"
ROUNDING = ["--set", "weights.algorithm={rtn: {range: minmax}}", "--set", "calibration=null"]


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "w4"
    pipeline.quantize(recipe.load("rtn-w4a16", ROUNDING[1::2], str(MODEL)), folder)
    return folder


def test_quantize_with_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a run of any size: beside the original, on text that it was not calibrated on."""
    monkeypatch.setattr("quantkit_eval.evaluation.GENERAL_TOKENS", 1024)
    out = tmp_path / "w4"
    done = invoke("quantize", MODEL, "-r", "rtn-w4a16", *ROUNDING, "--report", "-o", out, "-q")
    assert done.exit_code == 0, done.output
    assert f"page: {out / 'quantkit-report.html'}" in done.output
    content = json.loads((out / "quantkit-evaluation.json").read_text())
    assert content["measured"]["ref"] == str(MODEL)
    assert content["measured"]["texts"][0]["divergence"]["kl_mean"]["value"] > 0
    assert (out / "README.md").read_text().startswith("---\nbase_model: tiny-llama\n")


def test_report_prints_where_it_lies(made: Path) -> None:
    done = invoke("report", made)
    assert done.exit_code == 0, done.output
    for name in ("quantkit-report.html", "quantkit-evaluation.json", "README.md"):
        assert str(made / name) in done.output
    assert done.output.startswith("with care: ")


def test_json_alone(made: Path, tmp_path: Path) -> None:
    done = invoke("report", made, "--json", "-o", tmp_path / "r.html")
    assert done.exit_code == 0, done.output
    content = json.loads(done.output)
    assert content["schema"] == "quantkit.report/1"
    assert content["files"] == {"page": str(tmp_path / "r.html"), "data": str(tmp_path / "r.json"), "card": None}


def test_schema(made: Path) -> None:
    done = invoke("report", "--schema")
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["title"] == "quantkit.report/1"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((MODEL,), "no quantkit-report.json in it"),
        (("nope",), "no such folder"),
        (("{made}", "--ref", "nope/"), "nope"),
        (("{made}", "--text", "nope.txt"), "no such text file"),
        (("{made}", "--results", "nope.json"), "cannot be read"),
        (("{made}", "--context", "1", "--text", "general"), "at least 2 tokens"),
        (("{made}", "--tokens", "4096"), "give --ref ORIGINAL or --text FILE"),
        (("{made}", "--device", "gpu9"), "gpu9"),
    ],
    ids=str,
)
def test_one_line_and_exit_code_2(made: Path, arguments: tuple[object, ...], words: str) -> None:
    done = invoke("report", *(str(argument).replace("{made}", str(made)) for argument in arguments))
    assert done.exit_code == 2, done.output
    assert words in done.output
    assert len(done.output.strip().splitlines()) <= 2
    assert "Traceback" not in done.output


@pytest.mark.parametrize("verb", ["report", "quantize"])
def test_without_matplotlib(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    monkeypatch.setattr("quantkit.report.drawing.find_spec", lambda name: None)
    quantize = ("quantize", MODEL, "-r", "rtn-w4a16", *ROUNDING, "--report", "-o", tmp_path / "w4")
    done = invoke(*(("report", made) if verb == "report" else quantize))
    assert done.exit_code == 2
    assert "pip install 'quantkit[report]'" in done.output
    assert not list(tmp_path.iterdir())


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_chromium_reads_it(made: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert invoke("report", made, "-o", page).exit_code == 0
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, check=True)
    assert len(re.findall("<h2", done.stdout)) == 13
    assert "<svg" in done.stdout
