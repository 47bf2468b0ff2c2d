"""A real model with loud channels: static W8A8 collapses, and SmoothQuant takes it back."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from examples.smoothquant_outliers import TINY, plant, rows
from quantkit.checkpoint.reader import Checkpoint


def test_loud_channels_leave_the_float_model_alone(tmp_path: Path) -> None:
    plant(TINY, tmp_path / "planted")
    ids = torch.arange(64).reshape(2, 32) * 37 % 4096
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
            for folder in (TINY, tmp_path / "planted")
        )
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
    norms = [f"model.layers.{i}.{kind}_layernorm.weight" for i in range(6) for kind in ("input", "post_attention")]
    moved = [Checkpoint.open(tmp_path / "planted").read(n) / Checkpoint.open(TINY).read(n) for n in norms]
    assert all(sorted(ratio_K[ratio_K != 1].tolist()) == [32, 32, 64, 64] for ratio_K in moved)


def test_static_int8_collapses_and_recovers(tmp_path: Path) -> None:
    calibration = {"data": str(TINY / "calibration.txt"), "samples": 8, "seq_len": 128}
    trained, planted, smoothed = rows(TINY, TINY / "eval.txt", calibration, tmp_path, 2048)
    trained, planted, smoothed = (found.divergence.kl_mean.value for _, _, found in (trained, planted, smoothed))
    assert trained < 0.05
    assert planted > 0.5
    assert planted > 10 * smoothed
    assert smoothed < 2 * trained
