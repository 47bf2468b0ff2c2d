"""`quantkit plan --gpu`: its table, its JSON, and one line for each mistake."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from quantkit.cli import main as cli

CONFIG = Path(__file__).parents[1] / "planner" / "configs" / "llama-3-8b.json"
TINY = Path(__file__).parents[2] / "examples" / "tiny-llama"


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.app, ["plan", *map(str, arguments)])


def figures(data: Any) -> list[float]:
    """Every number of a JSON value."""
    if isinstance(data, dict):
        return [number for value in data.values() for number in figures(value)]
    if isinstance(data, list):
        return [number for value in data for number in figures(value)]
    return [data] if isinstance(data, int | float) else []


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds config.json alone."""
    folder = tmp_path_factory.mktemp("bare")
    shutil.copy(TINY / "config.json", folder / "config.json")
    return folder


def test_a_config_by_itself_as_json() -> None:
    done = invoke("--model", CONFIG, "--gpu", "h100", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found.keys() == {"serving"}
    assert found["serving"]["model"] == str(CONFIG)
    assert {131072, 512 * 2**20} <= set(figures(found))
    assert 295 in [int(number) for number in figures(found)]


def test_a_folder_as_a_table(bare: Path) -> None:
    done = invoke(bare, "--gpu", "RTX 4090", "--concurrency", 4, "--price", 0.5)
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert "served by vllm on rtx4090" in done.output
    assert any(line.startswith("W4A16 ") and "host, host" in line for line in lines)
    assert any(line.startswith("take FP8_DYNAMIC (recipe fp8-dynamic): quality comes first") for line in lines)
    assert max(len(line.rstrip()) for line in lines if line.startswith(("scheme", "W4A16", "FP8_DYNAMIC"))) <= 80


def test_beside_the_plan_of_a_run(bare: Path) -> None:
    run = json.loads(invoke(bare, "--scheme", "W4A16", "--json").stdout)
    both = json.loads(invoke(bare, "--scheme", "W4A16", "--gpu", "h100", "--json").stdout)
    assert both.keys() == run.keys() | {"serving"}
    assert both["bytes_after"] == run["bytes_after"]
    rows = {each["scheme"]: each for each in both["serving"]["schemes"]}
    assert rows["recipe"]["weight_bytes"] == rows["W4A16"]["weight_bytes"] == run["bytes_after"]


def test_it_does_not_fit(bare: Path, tmp_path: Path) -> None:
    config = json.loads((bare / "config.json").read_text()) | {"hidden_size": 16384, "intermediate_size": 53248}
    config |= {"num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8, "head_dim": 128}
    (tmp_path / "large.json").write_text(json.dumps(config))
    done = invoke(tmp_path / "large.json", "--gpu", "t4")
    assert done.exit_code == 1
    assert "nothing fits" in done.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "h10"], "unknown GPU 'h10'\nhint: did you mean `h100`?"),
        (["--gpu", "h100", "--tp", "5"], "--tp 5 does not divide"),
        (["--gpu", "h100", "--context", "999999"], "--context 999999: "),
        (["--gpu", "h100", "--concurrency", "-3"], "--concurrency is -3"),
        (["--gpu", "h100", "--output", "-1"], "--output is -1"),
        (["--gpu", "h100", "--output", "folder"], "--output"),
        (["--gpu", "h100", "--price", "-1"], "--price is -1"),
        (["--gpu", "h100", "--profile", "bach"], "unknown profile 'bach'\nhint: did you mean `batch`?"),
        (["--gpu", "h100", "--engine", "vlm"], "unknown engine 'vlm'"),
        (["--concurrency", "3"], "--concurrency is for a plan of serving\nhint: add --gpu"),
    ],
)
def test_mistakes(bare: Path, arguments: list[str], words: str) -> None:
    done = invoke(bare, *arguments)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "words"), [("{", "not valid JSON"), ("[]", ""), ('{"model_type": "t5"}', "t5"), ("{}", "")]
)
def test_a_file_that_is_no_model(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "some.json").write_text(text)
    done = invoke(tmp_path / "some.json", "--gpu", "h100")
    assert done.exit_code == 2, done.output
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert "some.json" in done.stderr
    assert "quantkit-plan" not in done.stderr


def test_no_model() -> None:
    done = invoke("--gpu", "h100")
    assert (done.exit_code, done.stderr) == (
        2,
        "error: no model: pass --model FOLDER_OR_HUB_ID, or give it as the first argument\n",
    )
