"""A quantized head as transformers with compressed-tensors reads it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from quantkit.quantization import pipeline
from quantkit.recipe import load as recipe
from quantkit.runtime.load import load
from tests.tiny_models import GQA, random_tokens

pytestmark = pytest.mark.interop


def test_transformers_computes_the_same_logits(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    config: Any = GQA
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**config, tie_word_embeddings=False)).float()
    model.save_pretrained(tmp_path / "model")
    data: Any = {"model": str(tmp_path / "model"), "weights": {"group_size": 16}, "head": {"bits": 8}}
    pipeline.quantize(recipe.from_data(data), tmp_path / "out", progress=False)
    ids = random_tokens(model, 2, 12)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            load(tmp_path / "out", dtype=torch.float32)(ids).logits, theirs(ids).logits, rtol=1e-3, atol=1e-3
        )
