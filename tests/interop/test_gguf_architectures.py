"""llama.cpp computes the same logits as transformers of every architecture, written by our names, places and keys."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as t

from quantkit.formats.gguf.metadata import model_metadata
from tests.gguf_models import VARIANTS, checkpoint, gguf_tensors, make
from tests.interop.gguf_support import binding, logits, write_f32

pytestmark = pytest.mark.interop
TOLERANCE = 1e-3  # of the logits' range: llama.cpp's GELU is a table of f16


def test_language_model_of_text_and_images(tmp_path: Path) -> None:
    binding()
    torch.manual_seed(0)
    sight = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sight |= {"image_size": 28, "patch_size": 14}
    text = VARIANTS["gemma3"]().to_dict()
    config = t.Gemma3Config(text_config=text, vision_config=sight, mm_tokens_per_image=1)
    model = t.Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    assert_same_logits(model, tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_llama_cpp(variant: str, tmp_path: Path) -> None:
    binding()
    error = assert_same_logits(make(variant, tmp_path), tmp_path)
    print(f"{variant}: {error:.1e}")


def assert_same_logits(model: t.PreTrainedModel, tmp_path: Path) -> float:
    """The largest difference of llama.cpp's logits from transformers', as a part of their range."""
    config, tensors = checkpoint(tmp_path)
    metadata = model_metadata(config, name="tiny", vocab_size=96)
    write_f32(tmp_path / "model.gguf", metadata, gguf_tensors(config, tensors))
    tokens = torch.randint(3, 96, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens).logits[0].numpy()
    found = logits(tmp_path / "model.gguf", tokens[0].tolist())
    error = np.abs(found - expected).max() / np.ptp(expected)
    assert error < TOLERANCE
    return float(error)
