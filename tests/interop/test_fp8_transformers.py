"""transformers on a CPU makes of our fp8 block folders the very weights we decode.

Its dequantization (not its kernels) knows whole blocks only: where 128 does not divide a side it refuses, or, as with
192 = 2 x 96, takes the blocks for smaller ones. Engines cut the last blocks short, as we do.
"""

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.writer import ShardWriter, TensorLayout
from quantkit.formats import fp8
from quantkit.grids.dequantize import (
    dequantize,
    expand,
)
from quantkit.grids.elements import (
    FP8,
)
from quantkit.types import PRESETS, QuantizedWeight

pytestmark = pytest.mark.interop
pytest.importorskip("accelerate", reason="transformers needs accelerate for quantized folders")
SCHEME = PRESETS["FP8_BLOCK"]


def quantize(w_NK: Tensor) -> QuantizedWeight:
    """The largest weight of each block lands on 448."""
    N, K = w_NK.shape
    padded = torch.nn.functional.pad(w_NK.float().abs(), (0, -K % 128, 0, -N % 128))
    stored = padded.reshape(-(-N // 128), 128, -(-K // 128), 128).amax(dim=(1, 3)) / 448
    scale_NG = expand(stored, SCHEME.weights, N)
    steps_NK = (w_NK.float() / scale_NG.repeat_interleave(128, 1)[:, :K]).clamp(-448, 448)
    return QuantizedWeight(steps_NK.to(FP8).view(torch.uint8), scale_NG, None, SCHEME.weights)


def save(folder: Path, intermediate: int) -> dict[str, QuantizedWeight]:
    """A random Llama, its linears but the head in fp8 blocks."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        tie_word_embeddings=False,
        initializer_range=0.06,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "source")
    checkpoint = Checkpoint.open(folder / "source")
    quantized: dict[str, QuantizedWeight] = {}
    tensors: dict[str, Tensor] = {}
    for name in checkpoint.tensors:
        tensor, module = checkpoint.read(name), name.removesuffix(".weight")
        if re.search(r"_proj$", module):
            quantized[module] = quantize(tensor)
            tensors |= {f"{module}.{suffix}": part for suffix, part in fp8.BLOCKS.pack(quantized[module]).items()}
        else:
            tensors[name] = tensor
    units = [[TensorLayout(name, tensor.dtype, tuple(tensor.shape))] for name, tensor in tensors.items()]
    writer = ShardWriter(folder / "packed", units, 1 << 30)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.finish()
    settings = dict(checkpoint.config)
    settings["quantization_config"] = fp8.BLOCKS.config(dict.fromkeys(quantized, SCHEME), ["lm_head"], None)
    (folder / "packed/config.json").write_text(json.dumps(settings))
    return quantized


def test_same_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    quantized = save(tmp_path, 384)
    with caplog.at_level(logging.ERROR):
        model, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / "packed", dtype=torch.bfloat16, output_loading_info=True
        )
    assert not any(info[f"{what}_keys"] for what in ("missing", "unexpected", "mismatched"))
    assert len(quantized) == 14
    for name, q in quantized.items():
        theirs = model.get_submodule(name).weight
        assert theirs.dtype == torch.bfloat16, "a CPU has no fp8 kernels: transformers is to dequantize"
        assert torch.equal(theirs, dequantize(q).to(torch.bfloat16)), name
    source = Checkpoint.open(tmp_path / "source")
    assert torch.equal(model.lm_head.weight, source.read("lm_head.weight"))


def test_cut_blocks_are_refused_there(tmp_path: Path) -> None:
    save(tmp_path, 320)
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.bfloat16)
