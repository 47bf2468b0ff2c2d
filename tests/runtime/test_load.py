"""quantkit.load against transformers' own load of the dense weights that the packed ones stand for."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.writer import ShardWriter, TensorLayout
from quantkit.errors import UserError
from quantkit.formats.compressed_tensors import tensors as ct
from quantkit.grids.dequantize import (
    dequantize,
)
from quantkit.grids.integer import IntegerGrid
from quantkit.runtime.load import load
from quantkit.runtime.quant_linear import QuantLinear
from quantkit.types import Scheme, TensorSpec
from tests.interop.packing import pack_folder
from tests.tiny_models import CONFIGS, random_tokens, tiny_model

SPEC = TensorSpec(4, 8, False)
PACKED_WEIGHTS = {"llama": 14, "gpt2": 8, "phi3": 8, "qwen2": 14, "gpt_neox": 8, "opt": 12, "mixtral": 8}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def folders(tmp_path: Path, name: str, **options) -> tuple[Path, Path]:
    """Packed and dense folder of a tiny model."""
    source, packed, dense = tmp_path / "source", tmp_path / "packed", tmp_path / "dense"
    if not source.exists():
        tiny_model(name).save_pretrained(source)
    pack_folder(source, packed, dense, **{"spec": SPEC, "transposed": name == "gpt2"} | options)
    return packed, dense


@torch.inference_mode()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(random_tokens(model, 2, 12)).logits.float()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def quant_linears(model: nn.Module) -> list[QuantLinear]:
    return [module for module in model.modules() if isinstance(module, QuantLinear)]


@pytest.mark.parametrize("name", [name for name in CONFIGS])
def test_same_logits_as_the_dense_model(tmp_path: Path, name: str) -> None:
    packed, dense = folders(tmp_path, name, max_shard=60_000)
    ours, theirs = load(packed), AutoModelForCausalLM.from_pretrained(dense)
    assert relative(logits(ours), logits(theirs)) < 1e-6
    assert not any(t.is_meta for t in [*ours.parameters(), *ours.buffers()])
    assert not ours.training
    expected = PACKED_WEIGHTS.get(name)
    assert expected is None or len(quant_linears(ours)) == expected


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32], ids=str)
def test_dtypes(tmp_path: Path, dtype: torch.dtype | None) -> None:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "source")
    packed, dense = folders(tmp_path, "llama", negative=True)
    ours, theirs = load(packed, dtype), AutoModelForCausalLM.from_pretrained(dense, dtype=dtype or "auto")
    assert ours.dtype == theirs.dtype == (dtype or torch.bfloat16)
    assert all(q.weight_scale.dtype == torch.bfloat16 for q in quant_linears(ours))
    for (name, a), (_, b) in zip(ours.named_buffers(), theirs.named_buffers(), strict=False):
        assert "weight" in name or torch.equal(a, b)
    assert relative(logits(ours), logits(theirs)) < 1e-6


def test_casting_the_model_leaves_the_weights_alone(tmp_path: Path) -> None:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "source")
    packed, _ = folders(tmp_path, "llama")
    model = load(packed)
    before = [q.weight for q in quant_linears(model)]
    model.to(torch.float32)
    assert all(torch.equal(a, q.weight) for a, q in zip(before, quant_linears(model), strict=True))
    assert logits(model).dtype == torch.float32


@pytest.mark.parametrize("tied", [True, False])
def test_tied_heads(tmp_path: Path, tied: bool) -> None:
    model = tiny_model("llama")
    model.config.tie_word_embeddings = tied
    if tied:
        model.tie_weights()
    model.save_pretrained(tmp_path / "source")
    packed, dense = folders(tmp_path, "llama")
    assert ("lm_head.weight" in Checkpoint.open(packed).tensors) == (not tied)
    ours = load(packed)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    assert relative(logits(ours), logits(AutoModelForCausalLM.from_pretrained(dense))) < 1e-6


def test_several_specs(tmp_path: Path) -> None:
    def choose(name: str) -> TensorSpec | None:
        if "layers.1.mlp.up_proj" in name:
            return None
        return TensorSpec(3, 16, True) if "down" in name else TensorSpec(8, -1, False) if "o_proj" in name else SPEC

    packed, dense = folders(tmp_path, "llama", spec=choose)
    ours = load(packed)
    assert len(quant_linears(ours)) == 13
    assert relative(logits(ours), logits(AutoModelForCausalLM.from_pretrained(dense))) < 1e-6


def test_generate_and_state_dict(tmp_path: Path, source: Path) -> None:
    (source / "generation_config.json").write_text('{"max_new_tokens": 5, "eos_token_id": 2}')
    packed, dense = folders(tmp_path, "llama")
    ours, theirs = load(packed), AutoModelForCausalLM.from_pretrained(dense)
    assert ours.generation_config.max_new_tokens == 5
    ids = random_tokens(ours, 1, 6)
    assert torch.equal(ours.generate(ids, do_sample=False), theirs.generate(ids, do_sample=False))
    assert ours.state_dict().keys() == Checkpoint.open(packed).tensors.keys()
    assert not hasattr(ours.config, "quantization_config")


def test_dense_folder(source: Path) -> None:
    model = load(source)
    assert not quant_linears(model)
    assert torch.equal(logits(model), logits(tiny_model("llama")))


def test_quant_linear() -> None:
    torch.manual_seed(0)
    w_NK, bias, x = torch.randn(24, 64), torch.randn(24), torch.randn(2, 3, 64)
    grid = IntegerGrid(SPEC)
    q = grid.quantize(w_NK, *grid.fit(w_NK))
    layer = QuantLinear(ct, ct.pack(q), Scheme(SPEC), bias)
    assert torch.equal(layer(x), nn.functional.linear(x, dequantize(q), bias))
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert dict(layer.named_buffers()).keys() == {*ct.layout((24, 64), Scheme(SPEC), torch.float32)}
    assert (layer.in_features, layer.out_features) == (64, 24)
    assert "int4 asym g8" in repr(layer)


def rewrite(packed: Path, change: dict) -> None:
    """Replace (or with None drop) tensors of a packed folder."""
    checkpoint = Checkpoint.open(packed)
    held = {name: checkpoint.read(name) for name in checkpoint.tensors} | change
    held = {name: tensor for name, tensor in held.items() if tensor is not None}
    (packed / "model.safetensors").unlink()
    writer = ShardWriter(packed, [[TensorLayout(n, t.dtype, tuple(t.shape)) for n, t in held.items()]], 1 << 30)
    for name, tensor in held.items():
        writer.write(name, tensor)
    writer.finish()


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{Q}.weight_scale": torch.ones(48, 4)}, rf"{Q}: weight_scale is .*\[48, 4\]"),
        ({f"{Q}.weight_scale": None}, f"{Q}: .*needs the tensors"),
        ({f"{Q}.weight_zero_point": None}, f"{Q}: .*needs the tensors"),
        ({f"{Q}.weight_shape": torch.tensor([48, 64])}, "q_proj"),
        ({f"{Q}.weight_packed": torch.zeros(48, 6)}, f"{Q}: weight_packed"),
        ({f"{Q}.weight_packed": None}, "q_proj"),
        ({"model.norm.weight": None}, "model.norm.weight"),
        ({"model.norm.weight": torch.ones(47)}, "model.norm.weight"),
    ],
)
def test_corrupt_tensors(tmp_path: Path, change: dict, message: str) -> None:
    packed, _ = folders(tmp_path, "llama")
    rewrite(packed, change)
    with pytest.raises(UserError, match=message):
        load(packed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "gptq"),
        ({"quantization_status": None}, r"quantization_status is not"),
        ({"ignore": [Q]}, f"{Q} is packed"),
    ],
)
def test_bad_config(tmp_path: Path, change: dict, message: str) -> None:
    packed, _ = folders(tmp_path, "llama")
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] |= change
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        load(packed)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load(tmp_path / "none")


def test_dense_folder_of_unknown_architecture(source: Path) -> None:
    (source / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(UserError, match="cannot read this model"):
        load(source)
