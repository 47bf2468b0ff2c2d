"""Every mistake a user can make: one clear message, exit code 2, nothing written, nothing lost.

BlockQuantizer through the command itself; the models are tiny, the tokenizer is the bundled model's.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from quantkit.cli.app import app
from quantkit.quantization.block_quantizer import BlockQuantizer
from tests.tiny_models import tiny_model

ROOT = Path(__file__).resolve().parents[2]
TEXT = ROOT / "examples" / "tiny-llama" / "calibration.txt"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny Llama of three files with the bundled tokenizer (ids are cut down by its own vocabulary of 4096)."""
    folder = tmp_path / "model"
    tiny = tiny_model("llama")
    tiny.resize_token_embeddings(4096)
    tiny.to(torch.bfloat16).save_pretrained(folder, max_shard_size="200KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "examples" / "tiny-llama" / name, folder)
    return folder


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["quantize", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def refused(model: Path, tmp_path: Path, *words: str, more: tuple[str, ...] = ()) -> str:
    """Quantize must fail with exit code 2, say all words, and leave neither the result nor a half of it."""
    before = sorted(path for path in tmp_path.rglob("*"))
    arguments = ["--recipe", "rtn-w4a16", "--model", model, "--output", tmp_path / "out"]
    arguments += [
        "--set",
        f"calibration={{data: {TEXT}, samples: 4, seq_len: 32}}",
        "--set",
        "weights.group_size=16",
        *more,
    ]
    found, output = run(*arguments)
    assert found == 2, output
    assert "Traceback" not in output
    for word in words:
        assert word in output, f"{word!r} is not in: {output}"
    assert sorted(path for path in tmp_path.rglob("*")) == before
    return output


def test_the_good_case_works(model: Path, tmp_path: Path) -> None:
    code, output = run(
        "-r",
        "rtn-w4a16",
        "-m",
        model,
        "-o",
        tmp_path / "out",
        "--set",
        "calibration.samples=4",
        "--set",
        "calibration.seq_len=32",
        "--set",
        "weights.group_size=16",
    )
    assert code == 0, output
    assert not (tmp_path / "out.partial").exists()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()


def test_missing_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", tmp_path, "nowhere", "no such folder")


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no model")
    refused(tmp_path / "file", tmp_path, "file", "folder")


def test_folder_without_weights(model: Path, tmp_path: Path) -> None:
    for path in model.glob("*.safetensors*"):
        path.unlink()
    refused(model, tmp_path, "no weights")


def test_truncated_safetensors(model: Path, tmp_path: Path) -> None:
    victim = sorted(model.glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:-100])
    refused(model, tmp_path, victim.name)


def edit_index(model: Path, change: Callable[[dict[str, str]], None]) -> None:
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_index_leaving_the_folder(model: Path, tmp_path: Path) -> None:
    edit_index(model, lambda names: names.update(dict.fromkeys(list(names)[:1], "../secret.safetensors")))
    refused(model, tmp_path, "../secret.safetensors", "outside")


def test_missing_shard(model: Path, tmp_path: Path) -> None:
    victim = sorted(model.glob("*.safetensors"))[1]
    victim.unlink()
    refused(model, tmp_path, victim.name, "missing")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "where", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"]
)
def test_damaged_weights(model: Path, tmp_path: Path, value: float, where: str) -> None:
    for path in model.glob("*.safetensors"):
        tensors = load_file(path)
        if where in tensors:
            tensors[where].view(-1)[-1] = value
            save_file(tensors, path, metadata={"format": "pt"})
    refused(model, tmp_path, where, "NaN or infinite")


def edit_config(model: Path, **change: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | change))


def test_unknown_architecture(model: Path, tmp_path: Path) -> None:
    edit_config(model, model_type="hyperllama")
    refused(model, tmp_path, "hyperllama")


def test_config_of_another_model(model: Path, tmp_path: Path) -> None:
    edit_config(model, hidden_size=64)
    refused(model, tmp_path, "config.json")


def test_config_that_is_no_json(model: Path, tmp_path: Path) -> None:
    (model / "config.json").write_text("{")
    refused(model, tmp_path, "config.json")


def test_remote_code_without_the_flag(model: Path, tmp_path: Path) -> None:
    edit_config(model, model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"})
    (model / "mine.py").write_text("raise SystemExit('code of a stranger was run')\n")
    refused(model, tmp_path, "--trust-remote-code")


def test_already_quantized(model: Path, tmp_path: Path) -> None:
    edit_config(model, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(model, tmp_path, "already quantized", "gptq")


def test_group_size_that_fits_nowhere(model: Path, tmp_path: Path) -> None:
    output = refused(
        model, tmp_path, "11", "14 of 14 linears", "group_size", "16", more=("--set", "weights.group_size=11")
    )
    assert "model.layers.0.self_attn.q_proj (48)" in output


def test_group_size_that_fails_on_some(model: Path, tmp_path: Path) -> None:
    more = ("--set", "weights.group_size=24")  # divides 48, not 80
    output = refused(model, tmp_path, "2 of 14 linears", "model.layers.1.mlp.down_proj (80)", "on_misfit", more=more)
    assert "q_proj" not in output
    for rule, outcome in {"channel": "uses channel", "smaller-group": "uses 20", "skip": "does not divide"}.items():
        folder = tmp_path / rule
        setting = f"weights.on_misfit={rule}"
        code, text = run(
            "-r", "rtn-w8a16", "-m", model, "-o", folder, "--set", "weights.group_size=24", "--set", setting
        )
        assert code == 0, text
        report = json.loads((folder / "quantkit-report.json").read_text())
        lines = report["warnings"] + [f"{line['name']}: {line['reason']}" for line in report["skipped"]]
        assert any("model.layers.0.mlp.down_proj" in line and outcome in line for line in lines), lines


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", ("empty",)), (b"\xff\xfe\x00broken", ("UTF-8",)), (b"too short a text", ("tokens",))],
    ids=["empty", "not UTF-8", "short"],
)
def test_calibration_text(model: Path, tmp_path: Path, content: bytes, words: tuple[str, ...]) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    refused(model, tmp_path, "text.txt", *words, more=("--set", f"calibration.data={text}"))


def test_missing_calibration_text(model: Path, tmp_path: Path) -> None:
    refused(model, tmp_path, "nowhere.txt", more=("--set", f"calibration.data={tmp_path}/nowhere.txt"))


def test_output_that_exists(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    refused(model, tmp_path, "exists")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"


def test_partial_folder_of_somebody_else(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("precious")
    refused(model, tmp_path, "not a quantkit run", more=("--restart",))


def test_output_below_a_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, output = run("-r", "rtn-w8a16", "-m", model, "-o", tmp_path / "file" / "out")
    assert code == 2, output
    assert "not a folder" in output


def test_disk_full(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    refused(model, tmp_path, "not enough disk space")


def test_disk_full_while_writing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is finished stays; with room again the same command ends with the same bytes."""
    more = ("-r", "rtn-w8a16", "-m", model, "--set", "weights.group_size=16")
    assert run(*more, "-o", tmp_path / "whole")[0] == 0
    plain, left = os.pwrite, [40]

    def runs_out(fd: int, data: bytes, offset: int) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", runs_out)
        code, output = run(*more, "-o", tmp_path / "out")
    assert code == 2, output
    assert "not enough disk space" in output
    assert not (tmp_path / "out").exists()
    assert run(*more, "-o", tmp_path / "out")[0] == 0
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert same[0] == same[1]


def test_pattern_that_matches_nothing(model: Path, tmp_path: Path) -> None:
    refused(model, tmp_path, "matches no linear", more=("--set", "overrides=[{match: 're:.*down_porj', skip: true}]"))


def test_nothing_left_to_quantize(model: Path, tmp_path: Path) -> None:
    refused(model, tmp_path, "no linear is left", more=("--set", "ignore=[Linear]"))


def test_unknown_device(model: Path, tmp_path: Path) -> None:
    refused(model, tmp_path, "device", more=("--device", "abacus"))


def test_files_of_an_unfinished_run_are_gone(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = ("-r", "rtn-w8a16", "-m", model, "-o", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(BlockQuantizer, "quantize_block", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(*more)[0] == 130
    (tmp_path / "out.partial" / "model.safetensors").unlink()
    code, output = run(*more)
    assert code == 2, output
    assert "--restart" in output
    assert run(*more, "--restart")[0] == 0
