"""llama.cpp computes the same logits as transformers of every architecture, written by our names, places and keys."""

from pathlib import Path

import numpy as np
import pytest
import torch

from quantkit.formats.gguf.metadata import model_metadata
from tests.gguf_models import VARIANTS, checkpoint, gguf_tensors, make
from tests.interop.gguf_support import binding, logits, write_f32

pytestmark = pytest.mark.interop
TOLERANCE = 1e-3  # of the logits' range: llama.cpp's GELU is a table of f16


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_llama_cpp(variant: str, tmp_path: Path) -> None:
    binding()
    model = make(variant, tmp_path)
    config, tensors = checkpoint(tmp_path)
    metadata = model_metadata(config, name="tiny", vocab_size=96)
    write_f32(tmp_path / "model.gguf", metadata, gguf_tensors(config, tensors))
    tokens = torch.randint(3, 96, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens).logits[0].numpy()
    found = logits(tmp_path / "model.gguf", tokens[0].tolist())
    error = np.abs(found - expected).max() / np.ptp(expected)
    print(f"{variant}: {error:.1e}")
    assert error < TOLERANCE
