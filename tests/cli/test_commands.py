"""convert, verify and plan as a user runs them, and what a recipe's engine has to say before and after a run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from quantkit.cli import main as cli
from quantkit.errors import RunError, UserError
from quantkit.quantization import pipeline
from quantkit.recipe import load as recipe
from tests.tiny_models import tiny_model

MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama"
ROUNDING = ["weights.algorithm={rtn: {range: minmax}}", "calibration=null"]


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in 4 bits, by the shortest way."""
    folder = tmp_path_factory.mktemp("packed") / "w4"
    pipeline.quantize(recipe.load("rtn-w4a16", [*ROUNDING, "weights.symmetric=false"], str(MODEL)), folder)
    return folder


def test_convert_there_and_back(packed: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "awq", tmp_path / "back"
    # bf16 scales of small weights are not all float16 numbers: only --requantize may round them
    first = invoke("convert", packed, there, "--format", "awq")
    if first.exit_code == 2:
        assert "held exactly by" in first.output or "requantize" in first.output
        first = invoke("convert", packed, there, "--format", "awq", "--requantize")
    assert first.exit_code == 0, first.output
    second = invoke("convert", there, back, "--format", "gptq_v2", "--json")
    assert second.exit_code == 0, second.output
    assert json.loads(second.output)["rounded"]["scales"] == 0
    assert json.loads((back / "config.json").read_text())["quantization_config"]["checkpoint_format"] == "gptq_v2"


def test_convert_refuses(packed: Path, tmp_path: Path) -> None:
    wrong = invoke("convert", packed, tmp_path / "o", "--format", "fp8")
    assert wrong.exit_code == 2
    assert "Traceback" not in wrong.output
    assert not list(tmp_path.iterdir())
    assert invoke("convert", MODEL, tmp_path / "o", "--format", "awq").exit_code == 2  # not quantized
    assert invoke("convert", packed, packed, "--format", "awq").exit_code == 2  # exists
    assert "unknown format" in invoke("convert", packed, tmp_path / "o", "--format", "awk").output


def test_verify_tells_engines_apart(packed: Path) -> None:
    found = json.loads(invoke("verify", packed, "--json").output)
    assert found["engines"]["vllm"]["verdict"] == "loads"
    assert found["engines"]["tensorrt-llm"]["verdict"] == "refused"
    assert invoke("verify", packed, "--engine", "vllm").exit_code == 0
    refused = invoke("verify", packed, "--engine", "tensorrt-llm")
    assert refused.exit_code == 1
    assert "refused" in refused.output
    assert invoke("verify", packed, "--engine", "vlm").exit_code == 2


def test_verify_finds_a_changed_file(packed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in packed.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    assert invoke("verify", folder, "--engine", "vllm", "--checksums").exit_code == 0
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("weight_packed"))
    tensors[name][0, 0] ^= 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert invoke("verify", folder, "--engine", "vllm").exit_code == 0  # headers alone do not show it
    assert invoke("verify", folder, "--engine", "vllm", "--checksums").exit_code == 1


def test_plan(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((MODEL / "config.json").read_bytes())  # no weights
    fits = invoke("plan", "--recipe", "gptq-w4a16", "--model", tmp_path, "--json")
    assert fits.exit_code == 0, fits.output
    assert 4 < json.loads(fits.output)["bits_per_weight"] < 5
    config = json.loads((MODEL / "config.json").read_text())
    config |= {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "head_dim": 128}
    config |= {"num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128256}
    (tmp_path / "config.json").write_text(json.dumps(config))
    huge = invoke("plan", "--recipe", "gptq-w4a16", "--model", tmp_path, "--json")
    found = json.loads(huge.output)
    assert huge.exit_code == (0 if found["fits"] else 1)
    assert found["fits"] or found["advice"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["output.engine=tensorrt-llm"], "tensorrt-llm would not load"),
        (["output.tp=3"], "vllm on 3 devices would not load"),
        (
            ["weights.group_size=48", "weights.on_misfit=smaller-group", "output.engine=sglang", "weights.bits=3"],
            "sglang",
        ),
        (["scheme=FP8_DYNAMIC", "output.engine=null", "output.format=awq"], "compressed-tensors"),
        (["weights.bits=3", "output.engine=null", "output.format=awq"], "gptq"),
        (["kv_cache=int8", "output.engine=null", "output.format=awq", "weights.bits=8"], "awq"),
    ],
    ids=str,
)
def test_preflight_refuses_before_anything_is_written(tmp_path: Path, settings: list[str], message: str) -> None:
    loaded = recipe.load("rtn-w4a16", [*ROUNDING, *settings], str(MODEL))
    with pytest.raises(UserError, match=message):
        pipeline.quantize(loaded, tmp_path / "o")
    assert not list(tmp_path.iterdir())


def test_what_is_written_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = pipeline.write_report

    def forgets(folder: Path, report: dict[str, Any]) -> None:
        config = json.loads((folder / "config.json").read_text())
        del config["quantization_config"]["quantization_status"]  # transformers would load random weights
        (folder / "config.json").write_text(json.dumps(config))
        write(folder, report)

    monkeypatch.setattr(pipeline, "write_report", forgets)
    loaded = recipe.load("rtn-w4a16", [*ROUNDING, "output.engine=transformers"], str(MODEL))
    with pytest.raises(RunError, match="transformers would refuse it"):
        pipeline.quantize(loaded, tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_a_scheme_on_the_command_line_replaces_the_files(tmp_path: Path) -> None:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "m")
    loaded = recipe.load("rtn-w4a16", ["scheme=FP8_DYNAMIC", "calibration=null"], str(tmp_path / "m"))
    assert (loaded.weights.type, loaded.weights.group_size) == ("fp8", "channel")
    report = pipeline.quantize(loaded, tmp_path / "o")
    assert {record.scheme for record in report.linears} == {"fp8 channel, input fp8 dynamic token"}
