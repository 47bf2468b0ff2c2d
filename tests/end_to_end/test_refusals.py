"""Models that cannot be quantized: each is refused before any work, and the message names the part of the model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from safetensors.torch import save_file

from quantkit.errors import UserError
from quantkit.model import expert_stacks
from quantkit.quantization import pipeline
from quantkit.recipe import load as recipe
from tests.tiny_models import COMMON, GQA, tiny_model

LLAMA4 = {"intermediate_size_mlp": 96, "num_local_experts": 8, "head_dim": 16, "interleave_moe_layer_step": 2}
SMALL_BERT = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
OTHER_KINDS: dict[str, tuple[Callable[[], t.PretrainedConfig], str]] = {
    "bert": (lambda: t.BertConfig(**SMALL_BERT, intermediate_size=48, architectures=["BertForMaskedLM"]), "an encoder"),
    "xlm": (lambda: t.XLMConfig(vocab_size=96, emb_dim=32, n_layers=2, n_heads=4), "an encoder"),
    "deberta": (lambda: t.DebertaConfig(**SMALL_BERT, architectures=["DebertaForMaskedLM"]), "an encoder"),
    "t5": (
        lambda: t.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
        "an encoder-decoder model",
    ),
    "bart": (lambda: t.BartConfig(vocab_size=96, d_model=32), "an encoder-decoder model"),
    "llava": (
        lambda: t.LlavaConfig(architectures=["LlavaForConditionalGeneration"]),
        "LlavaForConditionalGeneration is a vision-language model",
    ),
}


def run(model: Path, output: Path, **data: Any) -> dict[str, Any]:
    data = {"model": str(model), "weights": {"group_size": 16}, "output": {"engine": None}} | data
    return pipeline.quantize(recipe.from_data(data), output, progress=False)


def saved(config: t.PretrainedConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def unknown_stacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose experts lie in one tensor in a way that nobody says."""
    monkeypatch.setattr(expert_stacks, "LAYOUTS", {})
    return saved(t.Llama4TextConfig(**GQA, **LLAMA4, num_experts_per_tok=1), tmp_path / "in")


def test_experts_in_one_tensor_of_unknown_layout_are_named(unknown_stacks: Path, tmp_path: Path) -> None:
    model, tensor = unknown_stacks, "model.layers.1.feed_forward.experts.gate_up_proj"
    with pytest.raises(UserError, match="all experts of a layer in one tensor") as refused:
        run(model, tmp_path / "out")
    assert tensor in str(refused.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_the_advice_leaves_such_experts_as_they_are(unknown_stacks: Path, tmp_path: Path) -> None:
    model = unknown_stacks
    with pytest.raises(UserError) as refused:
        run(model, tmp_path / "out")
    pattern = str(refused.value).partition("ignore: ['")[2].partition("']")[0]
    report = run(model, tmp_path / "out", ignore=["lm_head", pattern])
    names = {linear.name for linear in report.linears}
    assert "model.layers.0.self_attn.q_proj" in names
    assert not any("experts." in name or "block_sparse_moe" in name for name in names)


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_what_is_no_decoder_is_named(name: str, tmp_path: Path) -> None:
    make, kind = OTHER_KINDS[name]
    make().save_pretrained(tmp_path / "in")
    save_file({"x": torch.zeros(1)}, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{kind}.*not supported yet"):
        run(tmp_path / "in", tmp_path / "out")


def test_a_bert_that_was_trained_as_a_decoder_is_none_of_them(tmp_path: Path) -> None:
    model = saved(t.BertConfig(**SMALL_BERT, intermediate_size=48, is_decoder=True), tmp_path / "in")
    assert run(model, tmp_path / "out").linears


def test_gpt_neox_says_is_decoder_false_and_is_one(tmp_path: Path) -> None:
    tiny_model("gpt_neox").save_pretrained(tmp_path / "in")
    assert run(tmp_path / "in", tmp_path / "out").linears


def test_parameters_shared_between_blocks_are_named(tmp_path: Path) -> None:
    config = t.Zamba2Config(
        **COMMON | {"num_hidden_layers": 4, "num_key_value_heads": 2},
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        mamba_d_state=16,
        n_mamba_heads=4,
        mamba_ngroups=1,
        num_mem_blocks=1,
        chunk_size=16,
        adapter_rank=8,
    )
    model = saved(config, tmp_path / "in")
    with pytest.raises(UserError, match=r"model\.layers\.3\.shared_transformer\S*: this parameter also belongs to"):
        run(model, tmp_path / "out")
