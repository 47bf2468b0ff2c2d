"""What is given as a model and is none: one message that names it and says what to do, from every verb, at once."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from quantkit.checkpoint.hub import locate_model
from quantkit.checkpoint.output_folder import check_output, side_files
from quantkit.cli.main import app
from quantkit.errors import UserError

MODEL = Path(__file__).resolve().parents[2] / "examples/tiny-llama"


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"})
    )
    save_file({"base_model.model.q.lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")


def gguf(folder: Path) -> None:
    (folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF" + bytes(20))


def diffusers(folder: Path) -> None:
    (folder / "model_index.json").write_text("{}")


def original(folder: Path) -> None:
    (folder / "params.json").write_text("{}")
    (folder / "consolidated.00.pth").write_bytes(b"x")


def no_config(folder: Path) -> None:
    save_file({"a": torch.zeros(2)}, folder / "model.safetensors")


def one_level_up(folder: Path) -> None:
    (folder / "inner").mkdir()
    (folder / "inner/config.json").write_text("{}")


def empty(folder: Path) -> None:
    pass


FOLDERS: dict[str, tuple[Any, str]] = {
    "adapter": (adapter, r"a PEFT adapter \(LoRA\), not a model \(base model: org/base\)\nhint: merge it"),
    "gguf": (gguf, "a folder of GGUF files, llama.cpp's own format"),
    "diffusers": (diffusers, "a diffusers pipeline"),
    "original": (original, r"maker's own format \(params.json, "),
    "no config": (no_config, "config.json is missing beside the weights"),
    "one level up": (one_level_up, "it holds one\nhint: give .*inner"),
    "empty": (empty, "an empty folder\nhint: "),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_that_are_no_models(tmp_path: Path, kind: str) -> None:
    make, words = FOLDERS[kind]
    make(tmp_path)
    with pytest.raises(UserError, match=words):
        locate_model(str(tmp_path))


@pytest.mark.parametrize("verb", ["quantize", "plan", "eval", "inspect", "convert"])
@pytest.mark.parametrize("kind", ["adapter", "gguf"])
def test_every_verb_names_them(tmp_path: Path, verb: str, kind: str) -> None:
    (tmp_path / "m").mkdir()
    make, words = FOLDERS[kind]
    make(tmp_path / "m")
    out = str(tmp_path / "out")
    arguments = {
        "quantize": ["quantize", "-r", "fp8-dynamic", "-m", str(tmp_path / "m"), "-o", out],
        "plan": ["plan", "-r", "fp8-dynamic", "-m", str(tmp_path / "m")],
        "eval": ["eval", str(tmp_path / "m"), "--text", str(MODEL / "eval.txt")],
        "inspect": ["inspect", str(tmp_path / "m")],
        "convert": ["convert", str(tmp_path / "m"), out, "--format", "awq"],
    }[verb]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert words.partition(" \\")[0].partition(",")[0] in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    "name", ["./nope", "../nope", "/nope/nope", "~/nope-nope", "a/b/c", "model.gguf", "x.safetensors"]
)
def test_paths_never_go_to_the_hub(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def asked(*_: Any, **__: Any) -> str:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("quantkit.checkpoint.hub._download", asked)
    with pytest.raises(UserError, match="no such"):
        locate_model(name)


def test_a_near_name_is_suggested_and_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama-8b").mkdir()
    with pytest.raises(UserError, match=r"did you mean .*llama-8b"):
        locate_model(str(tmp_path / "lama-8b"))
    monkeypatch.setenv("HOME", str(MODEL.parent))
    assert locate_model("~/tiny-llama") == MODEL


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="a GGUF file"):
        locate_model(str(tmp_path / "m.gguf"))
    with pytest.raises(UserError, match="a single safetensors file, not a model folder\nhint: give the folder"):
        locate_model(str(MODEL / "model.safetensors"))


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "base_model.model.", "_fsdp_wrapped_module."])
def test_names_of_wrappers(tmp_path: Path, wrapper: str) -> None:
    shutil.copytree(MODEL, tmp_path / "m")
    file = tmp_path / "m/model.safetensors"
    save_file({wrapper + name: tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    result = CliRunner().invoke(
        app, ["quantize", "-r", "fp8-dynamic", "-m", str(tmp_path / "m"), "-o", str(tmp_path / "o")]
    )
    assert result.exit_code == 2
    assert f"`{wrapper}`" in result.output


def test_links_are_checked_before_any_work(tmp_path: Path) -> None:
    """As weights: into the folder and into the Hub cache's blobs they are fine, out of it they are not."""
    outside, inside = tmp_path / "outside", tmp_path / "m"
    outside.mkdir()
    (outside / "secret.json").write_text("{}")
    shutil.copytree(MODEL, inside)
    os.symlink(inside / "tokenizer.json", inside / "tokenizer-link.json")
    assert "tokenizer-link.json" in {path.name for path in side_files(inside)}
    os.symlink(outside / "secret.json", inside / "extra.json")
    result = CliRunner().invoke(app, ["quantize", "-r", "fp8-dynamic", "-m", str(inside), "-o", str(tmp_path / "o")])
    assert result.exit_code == 2
    assert "extra.json is a link to" in result.output
    assert not (tmp_path / "o.partial").exists()
    (inside / "extra.json").unlink()
    os.symlink(inside / "gone", inside / "dangling.json")
    with pytest.raises(UserError, match="which does not exist"):
        side_files(inside)


def test_snapshots_of_the_hub_cache(tmp_path: Path) -> None:
    """Every file of a snapshot is a link into blobs."""
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in MODEL.iterdir():
        shutil.copy(file, blobs / f"blob-{file.name}")
        os.symlink(blobs / f"blob-{file.name}", snapshot / file.name)
    assert "tokenizer.json" in {path.name for path in side_files(snapshot)}


def test_outputs_that_cannot_be_made(tmp_path: Path) -> None:
    os.symlink(tmp_path / "nowhere", tmp_path / "link")
    for path, words in ((tmp_path / "link", "a link to nowhere"), (tmp_path / ("x" * 300), "cannot be made")):
        with pytest.raises(UserError, match=words):
            check_output(path)
    assert [path.name for path in tmp_path.iterdir()] == ["link"]
