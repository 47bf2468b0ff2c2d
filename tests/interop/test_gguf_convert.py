"""llama.cpp computes from a folder that became a GGUF file what the folder's weights say.

The file with the folder's own codes stands beside the file of its decoded weights in F32: what is left between the two
is llama.cpp's rounding of activations to 8 bits. Needs llama.cpp's tools: QUANTKIT_LLAMACPP names their folder.
"""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

import quantkit
from tests.interop.gguf_support import tool

pytestmark = pytest.mark.interop

TINY_LLAMA = Path(__file__).parents[2] / "examples/tiny-llama"
RTN = {"algorithm": {"rtn": {"range": "minmax"}}}
RECIPES: dict[str, dict[str, Any]] = {
    "Q4_0": {"weights": {"bits": 4, "group_size": 32} | RTN},
    "Q8_0": {"weights": {"bits": 8, "group_size": 32} | RTN},
    "MXFP4": {"weights": {"type": "mxfp4"} | RTN},
    "NVFP4": {"weights": {"type": "nvfp4"} | RTN},
}


def run(folder: Path, *args: str) -> str:
    """What llama-perplexity prints. Without repacked weights: some builds crash on them in models this small."""
    settings = ["-c", "128", "-b", "128", "-t", "1", "--no-repack"]
    program = tool("llama-perplexity")
    return subprocess.run(
        [program, *args, *settings], cwd=folder, check=True, capture_output=True, text=True, errors="replace"
    ).stdout


@pytest.mark.parametrize("type_", RECIPES)
def test_a_carried_folder_runs(type_: str, tmp_path: Path) -> None:
    tool("llama-perplexity")
    (tmp_path / "text.txt").write_text((TINY_LLAMA / "eval.txt").read_text()[:4000])
    recipe = RECIPES[type_] | {"calibration": None}
    quantkit.quantize(TINY_LLAMA, recipe, tmp_path / "folder", progress="off")
    report = quantkit.convert(tmp_path / "folder", tmp_path / "carried.gguf")
    assert report.schemes[type_] == 42
    quantkit.convert(tmp_path / "folder", tmp_path / "f32.gguf", requantize="f32")
    run(tmp_path, "-m", "f32.gguf", "-f", "text.txt", "--kl-divergence-base", "base.kld")
    printed = run(tmp_path, "-m", "carried.gguf", "--kl-divergence-base", "base.kld", "--kl-divergence")
    found = re.search(r"Mean\s+KLD:\s+(-?[\d.]+)", printed)
    assert found is not None, printed[-500:]
    print(f"{type_}: KL divergence from the folder's weights in F32: {found[1]}")
    assert float(found[1]) < 0.001
