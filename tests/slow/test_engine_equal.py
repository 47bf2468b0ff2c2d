"""The paged engine's greedy tokens equal `generate` in float32: every way to run it, every model, 64 mixed requests.

    pytest -m slow tests/slow/test_engine_equal.py

Further model folders are named by QUANTKIT_ENGINE_MODELS, separated as in PATH.
"""

import os
from functools import cache
from pathlib import Path

import pytest
from transformers import PreTrainedModel

import quantkit
from quantkit import load
from tests.runtime.engine.equality import WAYS, check, generated, prompts
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.slow
BUNDLED = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama"
FOLDERS = [str(BUNDLED), *filter(None, os.environ.get("QUANTKIT_ENGINE_MODELS", "").split(os.pathsep))]
MODELS = ["qwen3", "gemma3", "mistral", "phi3", "gpt2", "gpt_neox", "qwen3_moe"]


@cache
def case(name: str) -> tuple[PreTrainedModel, list[list[int]], list[list[int]]]:
    model = tiny_model(name) if name in MODELS else load(name, dtype="float32")
    every = prompts(64, model.config.get_text_config().vocab_size)
    return model, every, [generated(model, prompt) for prompt in every]


@cache
def quantized(scheme: str, folder: Path) -> tuple[PreTrainedModel, list[list[int]], list[list[int]]]:
    quantkit.quantize(BUNDLED, {"scheme": scheme, "weights": {"algorithm": "rtn"}}, folder / scheme, progress=False)
    model, every = load(folder / scheme, dtype="float32"), prompts(24, 4096)
    return model, every, [generated(model, prompt) for prompt in every]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "FP8_DYNAMIC"])
def test_quantized_folders_equal(scheme: str, way: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """But for fp8 inputs behind the beginning of a prompt of another length, whose attention has other float noise."""
    model, every, wanted = quantized(scheme, tmp_path_factory.getbasetemp())
    if scheme == "FP8_DYNAMIC" and way == "prefix hits":
        check(model, way, every, wanted, others=3)
    else:
        check(model, way, every, wanted, enable_prefix_caching=way == "prefix hits")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*FOLDERS, *MODELS], ids=lambda name: Path(name).name)
def test_equal(name: str, way: str) -> None:
    model, every, wanted = case(name)
    check(model, way, every, wanted)
