"""A folder's report from its run to its files: measured once, kept, and never over what is somebody else's."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from huggingface_hub import ModelCard
from quantkit_eval.report import build
from quantkit_eval.report.build import report_of_run, write_report

from quantkit.errors import RunError, UserError
from quantkit.quantization import pipeline
from quantkit.recipe import load as recipe
from quantkit.report.document import SCHEMA
from quantkit.report.page import GENERATOR
from quantkit.report.records import Report
from quantkit.verification import verify_folder

MODEL = Path(__file__).parents[3] / "examples" / "tiny-llama"
ROUNDING = ["weights.algorithm={rtn: {range: minmax}}", "calibration=null"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in 4 bits, by the shortest way."""
    folder = tmp_path_factory.mktemp("made") / "w4"
    pipeline.quantize(recipe.load("rtn-w4a16", ROUNDING, str(MODEL)), folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "w4"))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without figures, which take most of the time: for tests of which files are written."""
    monkeypatch.setattr(build, "page", lambda document: f'<meta name="generator" content="{GENERATOR}">')


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("<script>alert(1)</script>\n" + (MODEL / "eval.txt").read_text(encoding="utf-8")[:6000])
    return path


@pytest.fixture(scope="module")
def measured(made: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a report that was measured beside the original."""
    folder = Path(shutil.copytree(made, tmp_path_factory.mktemp("measured") / "w4"))
    write_report(folder, ref=MODEL, texts=[text], context=64, tokens=512, progress=False)
    return folder


def test_all_of_it_is_measured(measured: Path) -> None:
    content = json.loads((measured / "quantkit-evaluation.json").read_text())
    assert content["schema"] == SCHEMA
    found = content["measured"]
    (one,) = found["texts"]
    assert one["divergence"]["kl_mean"]["low"] < one["divergence"]["kl_mean"]["value"]
    assert [part["first"] for part in one["positions"]][:2] == [1, 9]
    assert all(part["ratio"]["value"] > 0 for part in one["positions"])
    assert len(found["samples"]) == 4
    assert len(found["original_outliers"]) == 42
    assert found["speed"]["model"]["decode"] > 0
    assert {one["engine"]: one["verdict"] for one in found["engines"]}["vllm"] == "loads"
    assert {one["name"]: one["outcome"] for one in content["verdict"]["criteria"]}[
        "an engine loads it"
    ] == "recommended"
    page = (measured / "quantkit-report.html").read_text()
    assert page.count("<figure>") >= 8
    assert "<script" not in page
    assert "&lt;script&gt;alert" in page  # the first sample's prompt
    card = ModelCard((measured / "README.md").read_text())
    assert card.data.to_dict()["license"] == "apache-2.0"
    assert card.data.eval_results


def test_the_folder_is_still_sound(measured: Path) -> None:
    verdict = verify_folder(measured, "vllm", checksums=True)
    assert (verdict.verdict, [one for one in verdict.findings if one.level != "info"]) == ("loads", [])
    assert not list(measured.glob("*.unfinished"))


@pytest.mark.usefixtures("undrawn")
def test_measurements_are_kept_for_the_same_weights(measured: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(measured, tmp_path / "w4"))
    results = tmp_path / "tasks.json"
    results.write_text(json.dumps({"results": {"qk_cloze": {"acc,none": 0.5}}}))
    again = write_report(folder, results=results)
    assert len(again.document.measured.texts) == 1
    assert again.document.measured.tasks[0].task == "qk_cloze"
    assert write_report(folder).document.measured.tasks == again.document.measured.tasks
    run = json.loads((folder / "quantkit-report.json").read_text())
    run["files"]["model.safetensors"] = "0" * 64
    (folder / "quantkit-report.json").write_text(json.dumps(run))
    assert write_report(folder).document.measured.texts == ()


@pytest.mark.usefixtures("undrawn")
def test_output_elsewhere_leaves_the_folder_alone(folder: Path, tmp_path: Path) -> None:
    before = sorted(folder.iterdir())
    written = write_report(folder, output=tmp_path / "mine.html")
    assert sorted(folder.iterdir()) == before
    assert {path.name for path in tmp_path.glob("mine.*")} == {"mine.html", "mine.json"}
    assert written.card is None
    write_report(folder, output=tmp_path / "mine.html")  # ours: made again


@pytest.mark.parametrize("name", ["quantkit-report.html", "quantkit-evaluation.json"])
@pytest.mark.parametrize("content", [b"my own notes", b"\xff\xfe", b"{}"])
def test_what_is_not_ours_is_never_overwritten(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".safetensors"}
    with pytest.raises(UserError, match="never overwritten"):
        write_report(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".safetensors"} == before


@pytest.mark.usefixtures("undrawn")
def test_a_card_of_somebody_stays(folder: Path) -> None:
    (folder / "README.md").write_text("# My card\n")
    written = write_report(folder)
    assert written.card is None
    assert "left as it is" in str(written.remark)
    assert (folder / "README.md").read_text() == "# My card\n"
    (folder / "README.md").unlink()
    write_report(folder)
    ours = (folder / "README.md").read_text()
    (folder / "README.md").write_text(ours + "\nI use it for law.\n")
    assert write_report(folder).card is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": "w4"}, "is a folder"),
        ({"output": "none/report.html"}, "there is no folder"),
        ({"output": "report.json"}, "for the report's JSON"),
        ({"results": "nope.json"}, "cannot be read"),
        ({"texts": ["nope.txt"]}, "no such text file"),
        ({"ref": "nope/"}, "nope"),
    ],
    ids=str,
)
def test_bad_input(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    given = {name: Path(value) if name in ("output", "results") else value for name, value in change.items()}
    with pytest.raises(UserError, match=message):
        write_report(folder, **given)
    assert not (folder / "quantkit-report.html").exists()


def test_folders_that_no_run_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no quantkit-report\.json in it"):
        write_report(MODEL)
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "nope")
    with pytest.raises(UserError, match="is a file"):
        write_report(MODEL / "config.json")
    (tmp_path / "quantkit-report.json").write_text(json.dumps({"converted": {"source": "there"}}))
    with pytest.raises(UserError, match="was converted, not quantized"):
        write_report(tmp_path)
    (tmp_path / "quantkit-report.json").write_text("{")
    with pytest.raises(UserError, match=r"quantkit-report\.json"):
        write_report(tmp_path)


def test_a_reference_with_another_tokenizer(folder: Path, text: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(MODEL, tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[500:502]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="different vocabularies"):
        write_report(folder, ref=other, texts=[text], context=64, progress=False)
    assert not (folder / "quantkit-report.html").exists()


def test_without_matplotlib(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.report.drawing.find_spec", lambda name: None)
    with pytest.raises(UserError, match="matplotlib") as raised:
        write_report(folder)
    assert "pip install 'quantkit[report]'" in str(raised.value)


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_cannot_be_measured_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report.load(folder)

    def fails(*given: Any, **options: Any) -> Any:
        raise RunError("NaN or Inf in the logits\nhint: none")

    monkeypatch.setattr(build, "_measured", fails)
    assert report_of_run(report, folder).document.measured.notes == (
        "not measured beside the original: NaN or Inf in the logits",
    )
    nothing_free = replace_available(0)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: nothing_free)
    note = report_of_run(report, folder).document.measured.notes[-1]
    assert "both models need about 32.2 MB of memory, 0 B are free" in note
    module = report_of_run(replace(report, model=None), folder)
    assert "a module in memory" in module.document.measured.notes[-1]


def replace_available(free: int) -> Any:
    return type("Memory", (), {"available": free})
