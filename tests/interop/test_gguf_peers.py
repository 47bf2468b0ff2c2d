"""The comparison with llama.cpp's quantizer runs with its real tools."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interop.gguf_support import tool

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "tiny-llama"


@pytest.mark.interop
def test_one_mix_by_both(tmp_path: Path) -> None:
    folder = tool("llama-perplexity").parent
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{calibration: {}, weights: {algorithm: gptq}, gguf: q4_k_m}")
    texts = ["--calibration", MODEL / "calibration.txt", "--evaluation", MODEL / "eval.txt"]
    few = ["--calibration-bytes", 20_000, "--evaluation-bytes", 20_000, "--mixes", "Q4_K_M", "--budgets", ""]
    output = ["--json", tmp_path / "figures.json", "--work", tmp_path / "work", "--threads", 1, "--recipe", recipe]
    command = [sys.executable, ROOT / "eval" / "peers" / "gguf.py", "--llamacpp", folder, "--model", MODEL]
    done = subprocess.run([str(part) for part in [*command, *texts, *few, *output]], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = {(row["file"], row["maker"]): row for row in json.loads((tmp_path / "figures.json").read_text())}
    ours, stock = figures["Q4_K_M", "quantkit"], figures["Q4_K_M", "llama-quantize --imatrix"]
    assert ours["divergence"]["kld"] < stock["divergence"]["kld"]
    assert "missing" in figures["Q4_K_M, iters 0", "AutoRound"]["note"]
