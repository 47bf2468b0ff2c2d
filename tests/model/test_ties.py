"""Embedding and head are tied exactly where transformers ties them: in load, in evaluation and in quantization."""

import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quantkit.quantization import pipeline
from quantkit.recipe import load as recipe
from quantkit.runtime.load import load
from tests.tiny_models import GQA, random_tokens

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("stored", ["only embedding", "only head", "both equal", "both different"])
@pytest.mark.parametrize("tied", [True, False])
def test_as_transformers(tmp_path: Path, stored: str, tied: bool) -> None:
    if not tied and stored.startswith("only"):
        pytest.skip("an untied model without one of the two is damaged")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GQA | {"tie_word_embeddings": tied}))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "m")
    tensors = load_file(tmp_path / "m/model.safetensors")
    table = tensors.pop(EMBED)
    tensors.pop(HEAD, None)
    other = torch.randn(table.shape).to(table) if stored == "both different" else table.clone()
    tensors |= (
        {EMBED: table} if "embedding" in stored else {HEAD: other} if "head" in stored else {EMBED: table, HEAD: other}
    )
    save_file(tensors, tmp_path / "m/model.safetensors", metadata={"format": "pt"})

    ids = random_tokens(model, 2, 8)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)(ids).logits
    assert torch.equal(load(tmp_path / "m", torch.float32)(ids).logits, expected)
    wide = {"weights": {"bits": 8, "group_size": 16}, "output": {"engine": None}}
    report = pipeline.quantize(recipe.from_data(wide | {"model": str(tmp_path / "m")}), tmp_path / "q", progress=False)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quantized = load(tmp_path / "q", torch.float32)
    found = quantized(ids).logits
    assert (found - expected).norm() / expected.norm() < 0.05
    if tied and stored in ("only head", "both different"):
        words = "only lm_head.weight is stored" if stored == "only head" else "are not tied"
        assert any(words in warning for warning in report.warnings)
        assert any(words in str(warning.message) for warning in seen)
    assert set(load_file(tmp_path / "q/model.safetensors")) & {EMBED, HEAD} == set(tensors) & {EMBED, HEAD}
