"""Every line of the README that a newcomer would copy runs as it is written, in an empty folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from quantkit.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ELSEWHERE = ("pip install ", "export MODEL=")  # done by whoever runs this test, or stands for the newcomer's model


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    return [line for line in lines if not line.startswith(ELSEWHERE)]


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """An empty folder, and the environment of a shell in it: `quantkit`, `python` and MODEL, a small random Llama."""
    home = tmp_path_factory.mktemp("newcomer")
    model, folder = home / "model", home / "empty"
    folder.mkdir()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(model)
    AutoTokenizer.from_pretrained(ROOT / "examples" / "tiny-llama").save_pretrained(model)
    tools = home / "bin"
    tools.mkdir()
    (tools / "quantkit").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m quantkit "$@"\n')
    (tools / "quantkit").chmod(0o755)
    (tools / "python").symlink_to(sys.executable)
    packages = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "eval")))
    path = os.pathsep.join([str(tools), os.environ["PATH"]])
    return folder, os.environ | {"MODEL": str(model), "PATH": path, "PYTHONPATH": packages, "OMP_NUM_THREADS": "1"}


def test_the_commands_run(newcomer: tuple[Path, dict[str, str]]) -> None:
    """In their order: later ones read what earlier ones wrote."""
    folder, environment = newcomer
    assert len(commands()) >= 8
    for line in commands():
        done = subprocess.run(
            ["sh", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert (folder / "w4" / "quantkit-report.json").exists()
    same = [(folder / name / "model.safetensors").read_bytes() for name in ("w4", "again")]
    assert same[0] == same[1], "a run repeated from its report wrote other bytes"


def test_the_python_runs(newcomer: tuple[Path, dict[str, str]]) -> None:
    folder, environment = newcomer
    (script,) = blocks("python")
    assert len(script.strip().splitlines()) <= 6
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.match(r"4\.\d+ HeldOutRecord\(.*\) (loads|refused|unknown)$", done.stdout.strip()), done.stdout


ROWS = {"Ampere": "a100", "Ada, Hopper": "h100", "Blackwell": "b200", "AMD": "mi300", "a CPU": "cpu"}


@pytest.mark.parametrize("row", ROWS)
def test_the_choice_of_a_scheme_is_what_verify_accepts(row: str) -> None:
    (line,) = (line for line in README.splitlines() if line.startswith(f"| {row}"))
    _, few, many, tensorrt = (set(re.findall(r"`([a-z][a-z0-9-]*)`", cell)) for cell in line.strip("|").split("|"))
    for engine, named in (("vllm", few | many), ("tensorrt-llm", tensorrt)):
        shown = CliRunner().invoke(app, ["recipes", "--for", ROWS[row], "--engine", engine, "--json"])
        fast = {recipe["name"] for recipe in json.loads(shown.stdout)}
        assert named <= fast, f"{engine} on {ROWS[row]} has no fast kernel for {named - fast}"


def test_commands_in_prose_name_what_exists() -> None:
    for name in set(re.findall(r"(?:examples|eval|kernels|tests)/[\w/]+\.(?:py|md)", README)):
        assert (ROOT / name).exists(), name
