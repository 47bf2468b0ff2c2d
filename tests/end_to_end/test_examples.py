"""The bundled model and texts are what their card says, and the scripts beside them run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
MODEL = EXAMPLES / "tiny-llama"


def run(*command: str | Path, cwd: Path) -> str:
    """stdout of a script of examples/, which sees the packages of this checkout."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "eval"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_texts_share_no_line_of_substance() -> None:
    calibration, held_out = ((MODEL / f"{name}.txt").read_text(encoding="utf-8") for name in ("calibration", "eval"))
    assert 550_000 < len(calibration.encode()) <= 600_000
    assert 220_000 < len(held_out.encode()) <= 250_000
    blocks = [set(re.split(r"\n\n\n", text)) for text in (calibration, held_out)]
    shared = {block for block in blocks[0] & blocks[1] if len(block) > 200}
    assert not shared


def test_the_folder_is_complete() -> None:
    config = json.loads((MODEL / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (256, 6, 4096)
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (MODEL / "LICENSE.python").read_text()
    card = (MODEL / "README.md").read_text()
    assert "LICENSE.python" in card
    assert "make_texts.py" in card
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_make_texts_splits_by_name_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    import make_texts

    library = tmp_path / "library"
    for i in range(60):
        file = library / f"package{i % 4}" / f"module{i}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"# module {i}\n" + f"x{i} = {i}\n" * 80)
    (library / "test").mkdir()
    (library / "test" / "left_out.py").write_text("x = 1\n" * 200)
    found = make_texts.modules(library)
    names = [name for name, _ in found]
    assert len(names) == 60
    assert names == sorted(names, key=make_texts.rank)
    assert 0.15 < sum(map(make_texts.is_eval, names)) / 60 < 0.55
    text, used = make_texts.fill(found, 5000)
    assert 4000 < len(text.encode()) <= 5000
    assert all(f"# module {re.findall(r'[0-9]+', name)[-1]}\n" in text for name in used)


@pytest.mark.slow
def test_the_bundled_texts_can_be_made_again(tmp_path: Path) -> None:
    run(EXAMPLES / "make_texts.py", tmp_path, cwd=tmp_path)
    assert (tmp_path / "calibration.txt").stat().st_size > 500_000
    assert (tmp_path / "eval.txt").stat().st_size > 200_000


@pytest.mark.slow
def test_training_runs(tmp_path: Path) -> None:
    sizes = ("--hidden", "64", "--intermediate", "96", "--layers", "2", "--vocabulary", "512")
    short = ("--steps", "20", "--batch", "4", "--context", "64", "--device", "cpu", "--library", ROOT / "quantkit")
    shown = run(EXAMPLES / "train_tiny_llama.py", "--output", tmp_path / "m", *sizes, *short, cwd=tmp_path)
    losses = [float(loss) for loss in re.findall(r"loss ([0-9.]+)", shown)]
    assert len(losses) == 20
    assert losses[-1] < losses[0]

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert tokenizer.decode(tokenizer("def f(x):\n    return 'é'")["input_ids"]) == "def f(x):\n    return 'é'"
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not info["missing_keys"]
    assert model.config.hidden_size == 64


@pytest.mark.slow
def test_quantize_and_generate_from_python(tmp_path: Path) -> None:
    output = tmp_path / "quantized"
    run(EXAMPLES / "quantize_from_python.py", output, cwd=tmp_path)
    assert (output / "quantkit-report.json").exists()
    shown = run(EXAMPLES / "generate.py", output, "import os\n", cwd=tmp_path)
    assert shown.startswith("import os\n")
    assert len(shown) > 20


@pytest.mark.slow
def test_quickstart(tmp_path: Path) -> None:
    shown = run(EXAMPLES / "quickstart.py", MODEL, tmp_path / "q", cwd=tmp_path)
    assert "vLLM: loads" in shown
    assert "'to': 'gptq'" in shown


def test_each_script_says_what_it_is_and_the_readme_of_the_folder_names_it() -> None:
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for script in EXAMPLES.glob("*.py"):
        assert f"`{script.name}`" in text, f"{script.name} is not in examples/README.md"
