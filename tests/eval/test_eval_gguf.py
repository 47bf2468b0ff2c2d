"""Evaluation of GGUF files: the figures of the model they hold, what is said beside them, and every refusal."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from quantkit_eval import evaluate
from quantkit_eval.results import Evaluation
from typer.testing import CliRunner

import quantkit
from quantkit.cli.main import app
from quantkit.errors import UserError
from tests.tiny_gguf import MODEL, bundled, tiny

CONTEXT = 32


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((MODEL / "eval.txt").read_text(encoding="utf-8")[:1500], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in Q4_0."""
    return bundled(default="Q4_0").save(tmp_path_factory.mktemp("q4") / "model.gguf")


@pytest.fixture(scope="module")
def evaluation(rounded: Path, text: Path) -> Evaluation:
    return evaluate(rounded, ref=MODEL, text=text, context=CONTEXT, progress=False)


def test_a_float32_file_is_the_original(tmp_path: Path, text: Path) -> None:
    path = bundled().save(tmp_path / "m.gguf")
    found = evaluate(path, ref=MODEL, text=text, context=CONTEXT, progress=False).texts[0]
    assert found.divergence is not None
    assert found.divergence.kl_mean.value < 1e-9
    assert found.divergence.top1_agreement.value == 1
    assert found.model == found.divergence.reference


def test_a_rounded_file(evaluation: Evaluation, rounded: Path, text: Path) -> None:
    (found,) = evaluation.texts
    assert found.divergence is not None
    assert 0.005 < found.divergence.kl_mean.value < 0.2
    assert (evaluation.dtype, evaluation.engine) == ("float32", None)
    assert len(evaluation.notes) == 1
    assert "also rounds the inputs of each product to 8 bits" in evaluation.notes[0]
    plain = evaluation.to_json()
    assert json.loads(json.dumps(plain))["notes"] == list(evaluation.notes)
    folder = evaluate(rounded.parent, text=text, context=CONTEXT, progress=False)
    assert folder.texts[0].model == found.model
    reversed_ = evaluate(MODEL, ref=rounded, text=text, context=CONTEXT, progress=False).texts[0]
    assert reversed_.model == found.divergence.reference


def test_a_folder_has_no_notes(text: Path) -> None:
    assert evaluate(MODEL, text=text, context=CONTEXT, progress=False).notes == ()


def test_the_table_says_it(rounded: Path, text: Path) -> None:
    arguments = ["eval", str(rounded), "--text", str(text), "--context", str(CONTEXT), "--quiet"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "note: the weights were decoded to float32" in " ".join(result.stdout.split())


def test_another_tokenizer_is_remarked(tmp_path: Path, text: Path) -> None:
    """A way of splitting that is not known here: the folder's tokenizer is taken, and the result says so."""
    model = bundled()
    model.metadata["tokenizer.ggml.pre"] = ("STRING", "kimi-k2000")
    path = model.save(tmp_path / "m.gguf")
    with pytest.raises(UserError, match=r"copy tokenizer\.json"):
        evaluate(path, text=text, context=CONTEXT, progress=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((MODEL / name).read_bytes())
    notes = evaluate(path, text=text, context=CONTEXT, progress=False).notes
    assert any("kimi-k2000" in note for note in notes)


def test_a_missing_pre_cuts_text_otherwise(tmp_path: Path, text: Path) -> None:
    model = bundled()
    del model.metadata["tokenizer.ggml.pre"]
    with pytest.raises(UserError, match="cut this text differently"):
        evaluate(model.save(tmp_path / "m.gguf"), ref=MODEL, text=text, context=CONTEXT, progress=False)


def refused(path: Path, text: Path, *options: str) -> str:
    result = CliRunner().invoke(app, ["eval", str(path), "--text", str(text), *options])
    assert result.exit_code == 2, result.output
    assert result.output.count("error: ") == 1
    return result.output


def test_refusals(tmp_path: Path, text: Path, rounded: Path) -> None:
    assert "context 2000 is longer than the 1024 positions" in refused(rounded, text, "--context", "2000")
    other = tiny()
    other.metadata["general.architecture"] = ("STRING", "mamba")
    path = other.save(tmp_path / "m.gguf")
    message = refused(path, text, "--context", "32")
    assert f"{path}: general.architecture 'mamba': cannot be decoded" in message
    assert "hint: possible are llama, qwen2" in message
    assert "absent.gguf: no such file" in refused(tmp_path / "absent.gguf", text)
    assert "unknown engine 'llama-cpp'\nhint: did you mean `llama.cpp`?" in refused(
        rounded, text, "--engine", "llama-cpp"
    )
    message = refused(MODEL, text, "--engine", "llama.cpp")
    assert "runs GGUF files" in message
    assert "hint: leave out --engine" in message


def test_an_engine_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, text: Path, rounded: Path) -> None:
    monkeypatch.setattr("quantkit_eval.early_checks.find_spec", lambda _: None)
    message = refused(rounded, text, "--engine", "llama.cpp", "--context", "32")
    assert "--engine llama.cpp needs llama-cpp-python, which is not installed\nhint: pip install" in message


def test_an_engine_runs_in_place_of_transformers(monkeypatch: pytest.MonkeyPatch, text: Path, rounded: Path) -> None:
    """With a stand-in for the engine: its logits count, and the result says whose they are."""
    made: list[tuple[Path, int]] = []

    class StandIn:
        version = "0.0"

        def __init__(self, path: Path, context: int) -> None:
            made.append((path, context))
            self.model = quantkit.load(path)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.model, name)

        def __call__(self, **arguments: Any) -> Any:
            found = self.model(**arguments)
            found.logits = found.logits * 0.5
            return found

    monkeypatch.setattr("quantkit_eval.early_checks.find_spec", lambda _: object())
    monkeypatch.setattr("quantkit_eval.evaluation.LlamaCppModel", StandIn)
    found = evaluate(rounded, ref=rounded, text=text, context=CONTEXT, engine="llama.cpp", progress=False)
    assert made == [(rounded, CONTEXT)]
    assert found.engine == "llama.cpp"
    assert found.versions["llama-cpp-python"] == "0.0"
    assert found.notes[0].startswith("llama.cpp computed the logits")
    divergence = found.texts[0].divergence
    assert divergence is not None
    assert divergence.kl_mean.value > 0.1  # the original is decoded, whatever runs the model


def test_refusals_import_no_torch(text: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(30))
    code = (
        "import sys\nfrom quantkit_eval.early_checks import check_before_torch\n"
        f"try: check_before_torch({str(tmp_path / 'm.gguf')!r}, None, [{str(text)!r}], context=32)\n"
        "except Exception as error: print(type(error).__name__, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "UserError False\n", done.stderr
