"""Rotation of the residual stream: the whole rotated model against the original, by transformers' own classes.

The reference of the mathematics is the plain dense matrix R; that of the models is their own logits.
"""

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config

from quantkit.algorithms.rotation import apply_columns, apply_rows, hadamard, rotation_of, undo_columns
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import UserError
from quantkit.model.block_graph import trace_block
from quantkit.model.matmul_tracing import Float64
from quantkit.model.meta_model import (
    build_meta_model,
    read_config,
)
from quantkit.model.streamed_model import (
    StreamedModel,
    release,
)
from quantkit.model.weight_sources import weight_sources
from quantkit.quantization.pipeline import trace_all
from quantkit.quantization.transforms import rotation_search as turns
from quantkit.quantization.transforms.rotation import ModelRotation
from tests.tiny_models import CONFIGS, GQA, random_tokens, tiny_model

SHARED = Path(os.environ.get("QUANTKIT_SHARED", Path(__file__).parents[3] / "shared"))
NARROW: dict[str, Any] = dict(GQA)
WIDE: dict[str, Any] = GQA | {"hidden_size": 64}  # heads of 16
MEAN = "takes off the mean"
BENT = "before it joins the residual stream"


def test_hadamard_of_four() -> None:
    expected = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    torch.testing.assert_close(hadamard(4), torch.tensor(expected).double() / 2, rtol=0, atol=0)
    with pytest.raises(ValueError, match="powers of two, not of 12"):
        hadamard(12)


@pytest.mark.parametrize("size", [8, 32, 48, 56, 256])
def test_products_are_those_of_the_dense_matrix(size: int) -> None:
    rotation = rotation_of(size, seed=3)
    block = size & -size
    dense = torch.diag(rotation.signs_S) @ torch.block_diag(*[hadamard(block)] * (size // block))
    torch.testing.assert_close(dense @ dense.T, torch.eye(size).double())
    w_NK = torch.randn(5, size, dtype=torch.float64)
    torch.testing.assert_close(rotation.matrix(), dense)
    torch.testing.assert_close(apply_columns(w_NK, rotation), w_NK @ dense)
    torch.testing.assert_close(undo_columns(w_NK, rotation), w_NK @ dense.T)
    torch.testing.assert_close(apply_rows(w_NK.T, rotation), dense.T @ w_NK.T)
    torch.testing.assert_close(apply_rows(w_NK[0], rotation), dense.T @ w_NK[0])
    assert apply_columns(w_NK.bfloat16(), rotation).dtype == torch.float32


def test_seed_decides_the_signs() -> None:
    assert torch.equal(rotation_of(64, 1).signs_S, rotation_of(64, 1).signs_S)
    assert not torch.equal(rotation_of(64, 1).signs_S, rotation_of(64, 2).signs_S)
    assert set(rotation_of(64).signs_S.tolist()) == {-1.0, 1.0}


def test_refuses_sizes_without_a_power_of_two() -> None:
    with pytest.raises(UserError, match="of 100 channels: the largest power of two that divides 100 is 4"):
        rotation_of(100)


def test_spreads_outlier_channels_and_rounds_better() -> None:
    torch.manual_seed(0)
    w_NK = torch.randn(64, 256)
    w_NK[:, [3, 77, 200]] *= 30
    turned_NK = apply_columns(w_NK, rotation_of(256))

    def outlier_ratio(w_NK: Tensor) -> float:
        return float((w_NK.abs().amax(1) / w_NK.square().mean(1).sqrt()).mean())

    def int4_error(w_NK: Tensor) -> float:  # one scale per row, round to nearest: relative error of the weight
        scale_N1 = w_NK.abs().amax(1, keepdim=True) / 7
        rounded_NK = (w_NK / scale_N1).round().clamp(-8, 7) * scale_N1
        return float((rounded_NK - w_NK).norm() / w_NK.norm())

    assert outlier_ratio(w_NK) > 9
    assert outlier_ratio(turned_NK) < 4.5
    assert int4_error(turned_NK) < 0.6 * int4_error(w_NK)


def skeleton_of(folder: Path, dtype: torch.dtype = torch.float32) -> StreamedModel:
    checkpoint = Checkpoint.open(folder)
    model = build_meta_model(read_config(folder))
    return StreamedModel(model, weight_sources(model, checkpoint.tensors), checkpoint, dtype, torch.device("cpu"))


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def rotated(folder: Path, out: Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, ModelRotation]:
    """The whole rotated model, put together from blocks filled one by one and from what lies outside of them."""
    streamed = skeleton_of(folder, dtype)
    rotator = ModelRotation(streamed, trace_all(streamed, folds=True))
    streamed = streamed.with_rewrite(rotator)
    state: dict[str, Tensor] = {}
    for index in range(len(streamed.blocks)):
        block = streamed.fill(index)
        state |= {streamed.prefix(index) + name: param.data.clone() for name, param in block.named_parameters()}
        release(block)
    for name, pieces in streamed.sources.items():
        if not name.startswith(streamed.path + "."):
            state[name] = streamed.checkpoint.read(pieces[0].name)
    for name in rotator.sources:
        state[name] = torch.cat([rows for _, rows in rotator.chunks(name)])
    out.mkdir()
    (out / "config.json").write_text(json.dumps(rotator.config(streamed.checkpoint.config)))
    model = AutoModelForCausalLM.from_config(read_config(out), dtype=dtype, experts_implementation="eager").eval()
    model.load_state_dict({name: value.to(dtype) for name, value in state.items()})
    return model, rotator


@torch.no_grad()  # under inference_mode Float64 does not see what `.to` calls
def relative_logits(model: PreTrainedModel, other: PreTrainedModel, wide: bool = True) -> float:
    """wide: in float64, also what the model computes in float32 by name (its norms and softmax)."""
    ids = random_tokens(model, 2, 12)
    with Float64() if wide else nullcontext():
        a, b = model(ids).logits, other(ids).logits
    return float((a - b).norm() / a.norm())


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "qwen3_moe", "mixtral"])
def test_rotated_model_computes_the_same(tmp_path: Path, name: str) -> None:
    model = tiny_model(name).double()
    ours, rotator = rotated(saved(model, tmp_path / "in"), tmp_path / "out", torch.float64)
    assert relative_logits(model, ours) < 1e-12
    assert max(found.error for found in rotator.blocks) < 1e-12
    norms = [
        param for name, param in ours.named_parameters() if name.endswith(("layernorm.weight", "model.norm.weight"))
    ]
    assert len(norms) == 5
    assert all(bool((param == 1).all()) for param in norms)
    before, after = (m.get_parameter("model.layers.0.self_attn.o_proj.weight") for m in (model, ours))
    assert float((before - after).detach().norm() / before.detach().norm()) > 0.5


def randomized(config: transformers.PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.3 * torch.randn_like(param)) if param.dim() == 1 else param.normal_(
                std=param.shape[-1] ** -0.5
            )
    return model


def test_heads_turn_with_repeated_values_and_biases(tmp_path: Path) -> None:
    for i, config in enumerate([LlamaConfig(**WIDE, attention_bias=True, mlp_bias=True), Qwen2Config(**WIDE)]):
        model = randomized(config).double()
        ours, rotator = rotated(saved(model, tmp_path / f"in{i}"), tmp_path / f"out{i}", torch.float64)
        assert rotator.blocks[0].heads == [("self_attn.v_proj", "self_attn.o_proj")]
        assert relative_logits(model, ours) < 1e-12


def test_fused_projections_turn_only_the_heads_of_v(tmp_path: Path) -> None:
    model = randomized(transformers.Phi3Config(**WIDE)).double()
    ours, rotator = rotated(saved(model, tmp_path / "in"), tmp_path / "out", torch.float64)
    assert rotator.blocks[0].heads == [("self_attn.qkv_proj", "self_attn.o_proj")]
    at = rotator.blocks[0].sites["self_attn.qkv_proj"].at
    assert at is not None
    assert at.tolist() == list(range(96, 128))  # behind 64 rows of q and 32 of k
    assert relative_logits(model, ours) < 1e-12


def test_small_heads_are_noted(tmp_path: Path) -> None:
    streamed = skeleton_of(saved(tiny_model("llama"), tmp_path / "in"))
    report = ModelRotation(streamed, trace_all(streamed, folds=True)).report()
    assert report["heads"] == []
    assert report["notes"] == [
        "self_attn.v_proj -> self_attn.o_proj: not rotated, heads of 12 channels leave blocks of 4"
    ]
    assert "48 channels in blocks of 16" in report["rotation"]


def test_float32_is_close(tmp_path: Path) -> None:
    model = tiny_model("llama")
    ours, _ = rotated(saved(model, tmp_path / "in"), tmp_path / "out")
    assert relative_logits(model, ours, wide=False) < 1e-5


def test_tied_head_gets_a_tensor_of_its_own(tmp_path: Path) -> None:
    config = LlamaConfig(**NARROW, tie_word_embeddings=True)
    model = randomized(config).double()
    ours, rotator = rotated(saved(model, tmp_path / "in"), tmp_path / "out", torch.float64)
    assert rotator.tied
    assert [layout.name for layout in rotator.layouts] == ["lm_head.weight"]
    assert rotator.layouts[0].shape == (96, 48)
    assert not ours.config.tie_word_embeddings
    assert relative_logits(model, ours) < 1e-12


def test_chunks_are_the_whole_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streamed = skeleton_of(saved(tiny_model("llama"), tmp_path / "in"))
    rotator = ModelRotation(streamed, trace_all(streamed, folds=True))
    whole = rotator.outside("lm_head.weight", streamed.checkpoint.read("lm_head.weight"))
    monkeypatch.setattr("quantkit.quantization.transforms.rotation.CHUNK", 4 * 48 * 7)
    parts = list(rotator.chunks("lm_head.weight"))
    assert [start for start, _ in parts] == list(range(0, 96, 7))
    assert torch.equal(torch.cat([rows for _, rows in parts]), whole)


def test_filled_blocks_and_states_are_rotated(tmp_path: Path) -> None:
    streamed = skeleton_of(saved(tiny_model("llama").double(), tmp_path / "in"), torch.float64)
    ids = torch.arange(3, 19).reshape(1, -1)
    hidden, calls = streamed.first_call(ids)
    output = calls[0].run(streamed.fill(0), hidden)
    rotator = ModelRotation(streamed, trace_all(streamed, folds=True))
    rewritten = streamed.with_rewrite(rotator)
    turned, calls = rewritten.first_call(ids)
    torch.testing.assert_close(turned, apply_columns(hidden, rotator.rotation))
    torch.testing.assert_close(
        calls[0].run(rewritten.fill(0), turned),
        apply_columns(output, rotator.rotation),
        rtol=0,
        atol=1e-5,  # the norms compute in float32
    )
    again, calls = streamed.first_call(ids)  # the original is still to be had from the same meta model
    assert torch.equal(again, hidden)
    assert torch.equal(calls[0].run(streamed.fill(0), again), output)


def test_takes_planted_outliers_back(tmp_path: Path) -> None:
    """Channels of a norm times 50 and its readers' columns by as much less: the rotated weights are the same."""
    model = tiny_model("llama")
    plain, _ = rotated(saved(model, tmp_path / "plain"), tmp_path / "out")
    with torch.no_grad():
        for layer in model.get_submodule("model.layers").children():
            for norm, readers in (
                ("input_layernorm", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
                ("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"]),
            ):
                layer.get_parameter(f"{norm}.weight")[[2, 30]] *= 50
                for reader in readers:
                    layer.get_parameter(f"{reader}.weight")[:, [2, 30]] /= 50
    planted, _ = rotated(saved(model, tmp_path / "planted"), tmp_path / "out2")
    for (name, a), (_, b) in zip(plain.named_parameters(), planted.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_proofs_hold_on_a_bfloat16_skeleton(tmp_path: Path) -> None:
    streamed = skeleton_of(saved(tiny_model("qwen3").bfloat16(), tmp_path / "in"), torch.bfloat16)
    rotator = ModelRotation(streamed, trace_all(streamed, folds=True))
    assert max(found.error for found in rotator.blocks) < 1e-12
    assert {param.dtype for param in streamed.with_rewrite(rotator).fill(0).parameters()} == {torch.bfloat16}


REFUSED = {
    "gpt2": MEAN,
    "gpt_neox": MEAN,
    "opt": MEAN,
    "falcon": MEAN,
    "stablelm": MEAN,
    "cohere": MEAN,
    "gemma2": BENT,
    "gemma3": BENT,
    "olmo2": BENT,
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_cannot_turn(tmp_path: Path, name: str) -> None:
    streamed = skeleton_of(saved(tiny_model(name), tmp_path / "in"))
    kind = CONFIGS[name]().model_type
    with pytest.raises(UserError, match=f"a {kind} model cannot be rotated: in block 0, .*{REFUSED[name]}"):
        ModelRotation(streamed, trace_all(streamed, folds=True))
    assert streamed.rewrite is None


def test_refuses_a_hidden_size_without_powers_of_two(tmp_path: Path) -> None:
    odd: dict[str, Any] = GQA | {"hidden_size": 44, "head_dim": 16}
    streamed = skeleton_of(saved(randomized(LlamaConfig(**odd)), tmp_path / "in"))
    with pytest.raises(UserError, match=r"a llama model cannot be rotated: .* divides 44 is 4"):
        ModelRotation(streamed, trace_all(streamed, folds=True))


class Leaky(nn.Module):
    """A block in which one matrix reads the residual stream itself, past the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(32)
        self.up, self.side, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.down(torch.relu(self.up(self.norm(hidden_states))) + self.side(hidden_states))


def test_the_proof_names_the_matrix_that_does_not_follow() -> None:
    torch.manual_seed(0)
    block, x = Leaky(), torch.randn(1, 16, 32)
    graph = trace_block(block, (x,), {})
    with pytest.raises(
        UserError, match=r"rotating the residual stream changes its output by .*, first seen .* of side"
    ):
        turns.find_rotation(block, graph, (x,), {}, rotation_of(32), [8])


def test_real_model(tmp_path: Path) -> None:
    folder = SHARED / "models" / "TinyStories-656K-bf16"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: set QUANTKIT_SHARED to the folder with models/ and text/")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    ours, rotator = rotated(folder, tmp_path / "out", torch.float64)
    assert rotator.tied
    assert rotator.blocks[0].heads == [("self_attn.v_proj", "self_attn.o_proj")]
    assert max(found.error for found in rotator.blocks) < 1e-12
    assert relative_logits(model, ours) < 0.01  # embedding and head are rounded to bf16 again, nothing else is
