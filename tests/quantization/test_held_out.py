"""The figure for unseen text that a run prints is what the loaded result shows on that text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantkit
from quantkit.quantization.held_out import MOST_TOKENS, windows_for
from quantkit.report.records import HeldOutRecord, Report
from tests.killed_run import killed_at
from tests.tiny_models import tiny_model

SAMPLES, SEQ = 8, 48  # few tokens would let one input that rounds the other way show
W4 = {"weights": {"bits": 4, "group_size": 8, "algorithm": "gptq"}}


def run(folder: Path, output: Path, tokens: Tensor, recipe: dict[str, Any]) -> Report:
    """A run calibrated on the first SAMPLES rows of tokens [rows, SEQ]; the next ones are left for the check."""
    data = {"calibration": {"samples": SAMPLES, "seq_len": SEQ}} | recipe
    return quantkit.quantize(folder, data, output, calibration=list(tokens), device="cpu", progress=False)


def measured(output: Path, folder: Path, ids: Tensor) -> tuple[float, float]:
    """KL and agreement of two loaded folders on ids [rows, SEQ], in float64."""
    logits = []
    for path in (folder, output):
        with torch.inference_mode():
            model = quantkit.load(path, dtype=torch.float32, device="cpu")
            logits.append(model(input_ids=ids).logits.double().log_softmax(-1))
    original, quantized = logits
    kl = (original.exp() * (original - quantized)).sum(-1).mean()
    return float(kl), float((original.argmax(-1) == quantized.argmax(-1)).double().mean())


CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, W4) for name in ("llama", "gemma2", "gemma3", "gpt2", "phi3", "cohere", "granite", "opt", "qwen3_moe")),
    ("llama", W4 | {"transforms": ["rotation"]}),
    ("llama", W4 | {"propagate": "original"}),
    ("llama", W4 | {"transforms": ["awq"]}),
    ("llama", {"scheme": "W8A8", "weights": {"algorithm": "gptq"}, "transforms": ["smoothquant"]}),
    ("qwen3", {"scheme": "FP8"}),
    ("qwen3_moe", {"scheme": "FP8"}),
    ("llama", W4 | {"kv_cache": "fp8"}),
    ("llama", W4 | {"kv_cache": {"type": "int8", "per": "token"}}),
    ("qwen2", {"scheme": "NVFP4"}),
    (
        "falcon",
        {
            "weights": {"bits": 3, "group_size": 16, "algorithm": "rtn"},
            "calibration": {"samples": SAMPLES, "seq_len": SEQ},
        },
    ),
]


@pytest.mark.parametrize(("name", "recipe"), CASES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)])
def test_is_what_the_loaded_result_shows(name: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(name).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    tokens = torch.randint(3, 90, (SAMPLES + 1, SEQ), generator=torch.Generator().manual_seed(1))
    report = run(tmp_path / "model", tmp_path / "out", tokens, recipe)
    found = report.held_out
    assert found is not None
    assert found.tokens == SEQ
    kl, agreement = measured(tmp_path / "out", tmp_path / "model", tokens[SAMPLES:])
    assert kl > 1e-6
    assert found.kl == pytest.approx(kl, rel=0.03)
    assert found.top1_agreement == pytest.approx(agreement, abs=1.01 / SEQ)  # one tie may break otherwise


def test_unseen_text_does_not_change_the_result(tmp_path: Path) -> None:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokens = torch.randint(3, 90, (SAMPLES + 1, SEQ), generator=torch.Generator().manual_seed(1))
    with_it = run(tmp_path / "model", tmp_path / "a", tokens, W4)
    without = run(tmp_path / "model", tmp_path / "b", tokens[:SAMPLES], W4)
    assert with_it.held_out is not None
    assert without.held_out is None
    name = "model.safetensors"
    assert with_it.files[name] == without.files[name]


@pytest.mark.parametrize("recipe", [W4, W4 | {"propagate": "original", "kv_cache": "fp8"}, {"scheme": "FP8"}])
def test_is_the_same_after_a_kill(recipe: dict[str, Any], tmp_path: Path) -> None:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokens = torch.randint(3, 90, (SAMPLES + 1, SEQ), generator=torch.Generator().manual_seed(1))
    whole = run(tmp_path / "model", tmp_path / "whole", tokens, recipe)
    with killed_at(1):
        run(tmp_path / "model", tmp_path / "out", tokens, recipe)
    resumed = run(tmp_path / "model", tmp_path / "out", tokens, recipe)
    assert resumed.held_out == whole.held_out
    assert Report.load(tmp_path / "out").held_out == whole.held_out


def test_how_many_windows() -> None:
    assert windows_for(128, 256) == 8
    assert windows_for(1, 2048) == 1
    assert windows_for(1000, 512) * 512 == MOST_TOKENS


def test_record_round_trip() -> None:
    record = HeldOutRecord(16, 0.25, 0.5)
    assert HeldOutRecord.from_json(record.to_json()) == record
