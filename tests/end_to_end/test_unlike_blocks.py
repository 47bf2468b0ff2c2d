"""Models whose blocks, tables or parameters are not like those of most: quantized, loaded and verified."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

from quantkit.quantization import pipeline
from quantkit.recipe import load as recipe
from quantkit.report.records import Report
from quantkit.runtime.load import load
from quantkit.verification import verify_folder
from tests.tiny_models import COMMON, GQA, random_tokens

MOST: Any = COMMON
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_global_layers": 1,
    "attention_heads": 2,
    "intermediate_size": 48,
    "vision_output_dim": 64,
    "image_size": 28,
    "max_num_tiles": 4,
    "intermediate_layers_indices": [0],
}
CONFIGS: dict[str, Callable[[], t.PretrainedConfig]] = {
    "blocks that only an image passes": lambda: t.MllamaConfig(
        text_config=GQA | {"num_hidden_layers": 3, "cross_attention_layers": [1], "rope_parameters": ROPE},
        vision_config=VISION,
        image_token_index=95,
    ),
    "a table indexed from its end": lambda: t.ProphetNetConfig(
        vocab_size=96,
        hidden_size=48,
        encoder_ffn_dim=80,
        num_encoder_layers=2,
        num_encoder_attention_heads=4,
        decoder_ffn_dim=80,
        num_decoder_layers=2,
        num_decoder_attention_heads=4,
        max_position_embeddings=64,
        is_decoder=True,
        is_encoder_decoder=False,
    ),
    "a linear of a block called output": lambda: t.RwkvConfig(
        vocab_size=96, hidden_size=48, num_hidden_layers=2, intermediate_size=80, bos_token_id=1, eos_token_id=2
    ),
    "a model that mixes dtypes": lambda: t.xLSTMConfig(**MOST, num_heads=4, chunk_size=16),
    "a table with an odd name": lambda: t.CTRLConfig(
        vocab_size=96, n_positions=64, n_embd=48, dff=80, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    ),
}


def saved(config: t.PretrainedConfig, folder: Path, dtype: torch.dtype) -> t.PreTrainedModel:
    torch.manual_seed(0)
    if isinstance(config, t.MllamaConfig):  # saved without its vision tower, such a model could not be loaded
        model: t.PreTrainedModel = t.MllamaForConditionalGeneration(config).eval()
    else:
        model = t.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "time_" not in name:
                param.add_(0.2 * torch.randn_like(param)) if param.dim() < 2 else param.normal_(
                    std=param.shape[-1] ** -0.5
                )
    model.tie_weights()
    model.to(dtype).save_pretrained(folder)
    return model


def quantize(model: Path, output: Path, ids: torch.Tensor | None = None, **data: Any) -> Report:
    data = {"model": str(model), "weights": {"group_size": 16, "bits": 8}, "output": {"engine": None}} | data
    if ids is not None:
        data["calibration"] = {"data": "given as token ids"}
    return pipeline.quantize(recipe.from_data(data), output, calibration=ids, progress=False)


@pytest.mark.parametrize("name", CONFIGS)
def test_calibrated_and_loaded(name: str, tmp_path: Path) -> None:
    model = saved(CONFIGS[name](), tmp_path / "model", torch.float32)
    ids = random_tokens(model, 4, 16)
    weights = {"bits": 8, "group_size": 16, "algorithm": "gptq"}
    report = quantize(tmp_path / "model", tmp_path / "out", ids, weights=weights, transforms=["awq"])
    assert report.linears
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        found = load(tmp_path / "out", dtype=torch.float32)(ids, use_cache=False).logits
    assert ((found - expected).norm() / expected.norm()).item() < 0.03
    assert not [f for f in verify_folder(tmp_path / "out", "vllm").findings if f.level == "error" and "head" in f.rule]


def test_a_model_that_cannot_compute_in_16_bits_is_traced_in_32(tmp_path: Path) -> None:
    saved(CONFIGS["a model that mixes dtypes"](), tmp_path / "model", torch.bfloat16)
    assert quantize(tmp_path / "model", tmp_path / "out").linears


def test_blocks_left_out_on_a_text_stay_dense_and_are_named(tmp_path: Path) -> None:
    saved(CONFIGS["blocks that only an image passes"](), tmp_path / "model", torch.float32)
    report = quantize(tmp_path / "model", tmp_path / "out")
    reasons = {line.name: line.reason for line in report.skipped}
    assert reasons["language_model.model.layers.1.cross_attn.q_proj"] == "the model leaves this block out on a text"
    names = {line.name for line in report.linears}
    assert "language_model.model.layers.2.self_attn.q_proj" in names


def test_verify_knows_what_the_config_calls_dense(tmp_path: Path) -> None:
    for name in ("a linear of a block called output", "a table with an odd name"):
        saved(CONFIGS[name](), tmp_path / name, torch.float32)
        quantize(tmp_path / name, tmp_path / f"{name} quantized")
        found = verify_folder(tmp_path / f"{name} quantized", "vllm").findings
        assert {f.rule for f in found if f.level == "error"}.isdisjoint(
            {"untargeted", "missing-packed", "head-missing"}
        )
