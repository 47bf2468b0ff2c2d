"""Names, places, keys and rotary embeddings of the architectures of GGUF; llama.cpp's own word is in tests/interop."""

import contextlib
import copy
import functools
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from quantkit.errors import UserError
from quantkit.formats.gguf.architectures import ARCHITECTURES, DEFAULTS
from quantkit.formats.gguf.metadata import config_of, model_metadata, notes
from quantkit.formats.gguf.rope import TENSORS
from quantkit.formats.gguf.tensor_names import (
    Place,
    architecture,
    checkpoint_names,
    extra_tensors,
    gguf_shapes,
    left_out,
    places,
    row_order,
)
from tests.gguf_models import VARIANTS, checkpoint, gguf_tensors, make
from tests.interop.gguf_support import write_f32


@pytest.fixture(scope="module", params=VARIANTS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[t.PreTrainedModel, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    return make(request.param, folder), folder


def plain(metadata: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """Values as a reader of the file sees them: f32 is rounded."""
    return {key: float(np.float32(value)) if kind == "f32" else value for key, (kind, value) in metadata.items()}


def test_every_tensor_has_its_place(saved: tuple[t.PreTrainedModel, Path]) -> None:
    config, tensors = checkpoint(saved[1])
    shapes = {name: values.shape for name, values in tensors.items()}
    found = places(config, shapes)
    assert set(found) | set(left_out(config, shapes)) == set(tensors)
    assert len({(place.tensor, place.expert) for place in found.values()}) == len(found)
    filled = gguf_tensors(config, tensors)
    assert not any(np.isnan(values).any() for values in filled.values())
    assert sum(values.size for name, values in filled.items() if name not in TENSORS) == sum(
        values.size for name, values in tensors.items() if name in found
    )
    assert len(max(filled, key=len)) < 64


@torch.inference_mode()
def test_model_comes_back(saved: tuple[t.PreTrainedModel, Path], tmp_path: Path) -> None:
    model, folder = saved
    config, tensors = checkpoint(folder)
    file = gguf_tensors(config, tensors)
    shapes = {name: values.shape for name, values in file.items()}
    metadata = plain(model_metadata(config, name="tiny", vocab_size=96))
    divisors = {name: file[name].tolist() for name in TENSORS if name in file}
    decoded = config_of(metadata, shapes, divisors)
    weights = {name: values_at(file, place) for name, place in checkpoint_names(decoded, shapes).items()}
    assert set(weights) == set(places(config, {name: values.shape for name, values in tensors.items()}))
    for name, values in weights.items():
        # w + 1 - 1 is not always w
        np.testing.assert_allclose(values, tensors[name], rtol=0, atol=2e-7 if "norm" in name else 0)
    (tmp_path / "config.json").write_text(json.dumps(decoded))
    save_file({name: np.ascontiguousarray(values) for name, values in weights.items()}, tmp_path / "model.safetensors")
    again, info = t.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True, experts_implementation="eager"
    )
    assert not (info["missing_keys"] | info["unexpected_keys"] | info["mismatched_keys"])
    tokens = torch.randint(3, 96, (1, 40), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=0, atol=1e-4)


def values_at(file: Mapping[str, np.ndarray], place: Place) -> np.ndarray:
    values = file[place.tensor] if place.expert is None else file[place.tensor][place.expert]
    if place.heads:
        back = np.empty_like(values)
        back[row_order(len(values), place.heads)] = values
        values = back
    return values - 1 if place.plus_one else values


# What transformers' own loader reads. It knows no scaling, no biases of llama, of qwen3 only heads of 128, of gemma3 of
# 256, of qwen3_moe only experts of 768.
TRANSFORMERS = ("llama", "llama-tied", "llama-mqa", "llama-head_dim", "mistral", "qwen2", "qwen2-tied", "qwen3")
TRANSFORMERS += ("gemma3-256", "phi3", "phi3-tied", "qwen3_moe-768")


@torch.inference_mode()
@pytest.mark.parametrize("variant", TRANSFORMERS)
def test_transformers_reads_the_file(variant: str, tmp_path: Path) -> None:
    model = make(variant, tmp_path)
    config, tensors = checkpoint(tmp_path)
    (tmp_path / "gguf").mkdir()
    metadata = model_metadata(config, name="tiny", vocab_size=96) | {
        "tokenizer.ggml.bos_token_id": ("u32", 1),
        "tokenizer.ggml.eos_token_id": ("u32", 2),
        "tokenizer.ggml.padding_token_id": ("u32", 0),
    }
    write_f32(tmp_path / "gguf" / "model.gguf", metadata, gguf_tensors(config, tensors))
    again = t.AutoModelForCausalLM.from_pretrained(
        tmp_path / "gguf", gguf_file="model.gguf", dtype=torch.float32, experts_implementation="eager"
    )
    expected = model.state_dict()
    for name, values in again.state_dict().items():
        torch.testing.assert_close(values, expected[name], rtol=0, atol=2e-7 if "norm" in name else 0)
    tokens = torch.randint(3, 96, (1, 6), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=0, atol=1e-4)


def test_rows_of_heads_become_pairs() -> None:
    # two heads of four columns: (0, 2), (1, 3) are turned together and become neighbours
    assert row_order(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert row_order(12, 1).tolist() == [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]


LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA |= {"num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 96}
GEMMA = {"model_type": "gemma3_text", "hidden_size": 64, "num_attention_heads": 4, "head_dim": 32}
GEMMA |= {"query_pre_attn_scalar": 32, "num_hidden_layers": 6}
MOE = LLAMA | {"model_type": "qwen3_moe", "norm_topk_prob": True}
YARN = {"rope_type": "yarn", "factor": 4.0}


def linear(**more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4} | more}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "mixtral"}, "'mixtral'"),
        ({"model_type": "gemma2"}, "'gemma2'"),
        ({"model_type": "gpt2"}, "'gpt2'"),
        ({}, "None"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act: gelu"),
        (LLAMA | {"num_key_value_heads": 3}, "num_key_value_heads: 3"),
        (LLAMA | {"is_causal": False}, "is_causal: false"),
        (LLAMA | {"num_attention_heads": 0}, "num_attention_heads: 0"),
        (LLAMA | {"num_hidden_layers": 1 << 40}, "from 1 to 512"),
        (LLAMA | {"hidden_size": "64"}, "hidden_size: '64'"),
        (LLAMA | {"vocab_size": True}, "vocab_size: True"),
        (LLAMA | {"rope_scaling": "linear"}, "rotary embedding"),
        (LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": "two"}}, "rotary embedding"),
        (LLAMA | {"layer_types": ["full_attention"]}, "layer_types` of 1 layers"),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type: dynamic"),
        (LLAMA | {"rope_scaling": {"rope_type": "spiral"}}, "rope_type: spiral"),
        (LLAMA | linear(partial_rotary_factor=0.5), "partial_rotary_factor: 0.5"),
        (LLAMA | linear(rope_type="default", mrope_section=[1, 1, 2]), "mrope_section"),
        (LLAMA | {"rope_parameters": YARN | {"beta_fast": 16}}, "beta_fast: 16"),
        (LLAMA | {"rope_parameters": YARN | {"beta_slow": 2}}, "beta_slow: 2"),
        (LLAMA | {"rope_parameters": YARN | {"truncate": False}}, "truncate: false"),
        (LLAMA | {"rope_parameters": {"full_attention": YARN}}, "rope_parameters"),
        (LLAMA | {"layer_types": ["chunked_attention"] * 2}, "layer_types: chunked_attention"),
        (LLAMA | {"rope_scaling": {"rope_type": "linear"}}, "`factor`"),
        (LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "`low_freq_factor`"),
        (LLAMA | {"model_type": "qwen2", "head_dim": 32}, "head_dim: 32"),
        (LLAMA | {"model_type": "qwen2", "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
          "low_freq_factor": 1.0, "high_freq_factor": 4.0}}, "rope_type: llama3"),
        (LLAMA | {"model_type": "qwen3", "attention_bias": True}, "attention_bias: true"),
        (LLAMA | {"model_type": "phi3", "head_dim": 32}, "head_dim: 32"),
        (LLAMA | {"model_type": "phi3", "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type: linear"),
        (LLAMA | {"model_type": "phi3", "rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}},
         "long_factor: 1 numbers, expected 8"),
        (MOE | {"norm_topk_prob": False}, "norm_topk_prob: false"),
        (MOE | {"decoder_sparse_step": 2}, "decoder_sparse_step: 2"),
        (MOE | {"mlp_only_layers": [0]}, "mlp_only_layers: [0]"),
        (GEMMA | {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar: 100"),
        (GEMMA | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: 50.0"),
        (GEMMA | {"use_bidirectional_attention": True}, "use_bidirectional_attention: true"),
        (GEMMA | {"hidden_activation": "silu"}, "hidden_activation: silu"),
        (GEMMA | {"attention_bias": True}, "attention_bias: true"),
        (GEMMA | {"sliding_window": None}, "sliding_window: null"),
        (GEMMA | {"rope_parameters": {"sliding_attention": {"rope_type": "linear"}}}, "rope_type: linear"),
        (GEMMA | {"rope_scaling": YARN}, "rope_type: yarn"),
    ],
)  # fmt: skip
def test_refused_by_name(config: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as error:
        architecture(config)
    message = str(error.value)
    assert named in message
    assert message.splitlines()[1].startswith("hint: ")


def test_possible_architectures_are_listed() -> None:
    with pytest.raises(UserError, match=", ".join(ARCHITECTURES)):
        architecture({"model_type": "bert"})


@pytest.mark.parametrize("kind", DEFAULTS)
def test_defaults_are_those_of_transformers(kind: str) -> None:
    config = t.AutoConfig.for_model(kind)
    derived = ("head_dim", "num_key_value_heads", "layer_types")
    for key, value in DEFAULTS[kind].items():
        if key in ("rope_theta", "rope_local_base_freq", "sliding_window_pattern", "sliding_window", *derived):
            continue
        assert getattr(config, key) == (value if value is not None or key != "mlp_only_layers" else []), key
    bare = {"model_type": kind, "norm_topk_prob": True}
    keys = {key.partition(".")[2]: value for key, (_, value) in model_metadata(bare, name="", vocab_size=1).items()}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert keys["attention.key_length"] == keys["attention.value_length"] == head_dim
    assert keys["attention.head_count_kv"] == config.num_key_value_heads
    rope = config.rope_parameters
    assert keys["rope.freq_base"] == rope.get("full_attention", rope)["rope_theta"]
    if kind == "gemma3_text":
        assert keys["rope.freq_base_swa"] == rope["sliding_attention"]["rope_theta"]
        assert keys["attention.sliding_window"] == config.sliding_window
        assert "attention.sliding_window_pattern" not in keys  # every sixth is llama.cpp's own


def test_older_config_makes_the_same_keys() -> None:
    new = LLAMA | {"rope_parameters": YARN | {"rope_theta": 5e5, "original_max_position_embeddings": 1024}}
    old = LLAMA | {
        "rope_theta": 5e5,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    }
    assert model_metadata(old, name="a", vocab_size=96) == model_metadata(new, name="a", vocab_size=96)
    local = {"sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}
    new = GEMMA | {
        "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6}} | local
    }
    old = GEMMA | {
        "rope_theta": 2e6,
        "rope_local_base_freq": 2e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    assert model_metadata(old, name="a", vocab_size=96) == model_metadata(new, name="a", vocab_size=96)
    assert model_metadata(new, name="a", vocab_size=96)["gemma3.rope.scaling.factor"] == ("f32", 8.0)


def test_sparse_config_of_gemma3_4b() -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    found = model_metadata({"model_type": "gemma3", "text_config": text}, name="gemma-3-4b-it", vocab_size=262208)
    assert found == {
        "general.architecture": ("string", "gemma3"),
        "general.type": ("string", "model"),
        "general.name": ("string", "gemma-3-4b-it"),
        "general.quantization_version": ("u32", 2),
        "gemma3.context_length": ("u32", 131072),
        "gemma3.embedding_length": ("u32", 2560),
        "gemma3.block_count": ("u32", 34),
        "gemma3.feed_forward_length": ("u32", 10240),
        "gemma3.attention.head_count": ("u32", 8),
        "gemma3.attention.head_count_kv": ("u32", 4),
        "gemma3.attention.layer_norm_rms_epsilon": ("f32", 1e-6),
        "gemma3.attention.key_length": ("u32", 256),
        "gemma3.attention.value_length": ("u32", 256),
        "gemma3.attention.sliding_window": ("u32", 1024),
        "gemma3.vocab_size": ("u32", 262208),
        "gemma3.rope.dimension_count": ("u32", 256),
        "gemma3.rope.freq_base": ("f32", 1e6),
        "gemma3.rope.freq_base_swa": ("f32", 1e4),
        "gemma3.rope.scaling.type": ("string", "linear"),
        "gemma3.rope.scaling.factor": ("f32", 8.0),
    }


@pytest.mark.parametrize("kind", ["mistral", "phi3"])
def test_context_ends_with_a_window_that_llama_cpp_does_not_compute(kind: str) -> None:
    config = LLAMA | {"model_type": kind, "max_position_embeddings": 4096, "sliding_window": 2047}
    assert model_metadata(config, name="a", vocab_size=96)[f"{architecture(config)}.context_length"] == ("u32", 2047)
    assert "2047" in notes(config)[0]
    assert not notes(config | {"sliding_window": None})


@functools.cache
def outline(variant: str = "llama") -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    with torch.device("meta"):
        model = t.AutoModelForCausalLM.from_config(VARIANTS[variant]())
    config = json.loads(model.config.to_json_string(use_diff=False))
    return config, {name: tuple(values.shape) for name, values in model.state_dict().items()}


def test_tensors_without_a_place() -> None:
    config, shapes = outline()
    for name in ("model.layers.2.mlp.up_proj.weight", "model.layers.0.mlp.experts.0.up_proj.weight", "model.norm.bias"):
        with pytest.raises(UserError, match=name):
            places(config, shapes | {name: (4, 4)})
    with pytest.raises(UserError, match=r"lm_head\.weight: missing"):
        places(config, {name: shape for name, shape in shapes.items() if name != "lm_head.weight"})
    with pytest.raises(UserError, match="multiple of 8"):
        places(config, shapes | {"model.layers.0.self_attn.q_proj.weight": (60, 64)})
    assert places(config, shapes | {"model.layers.0.self_attn.rotary_emb.inv_freq": (8,)}) == places(config, shapes)


def test_missing_experts() -> None:
    config = MOE | {"num_experts": 4, "moe_intermediate_size": 8, "tie_word_embeddings": True}
    name = "model.layers.0.mlp.experts.{}.up_proj.weight"
    shapes = {name.format(expert): (8, 64) for expert in range(4)}
    assert gguf_shapes(config, shapes) == {"blk.0.ffn_up_exps.weight": (4, 8, 64)}
    with pytest.raises(UserError, match="3 experts in the checkpoint, expected 4"):
        gguf_shapes(config, {key: shape for key, shape in shapes.items() if "experts.2" not in key})
    with pytest.raises(UserError, match=r"experts\.4"):
        places(config, shapes | {name.format(4): (8, 64)})


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_language_model_of_text_and_images(prefix: str) -> None:
    text, shapes = outline("gemma3")
    config = {"model_type": "gemma3", "text_config": text}
    wrapped = {name.replace("model.", prefix, 1): shape for name, shape in shapes.items()}
    images = {"vision_tower.head.probe": (1, 1, 4), "model.multi_modal_projector.mm_soft_emb_norm.weight": (4,)}
    found = places(config, wrapped | images)
    assert found == {name.replace("model.", prefix, 1): place for name, place in places(text, shapes).items()}
    assert {name for name, why in left_out(config, wrapped | images).items() if "images" in why} == set(images)
    assert model_metadata(config, name="a", vocab_size=96) == model_metadata(text, name="a", vocab_size=96)


def test_file_of_another_architecture_is_refused() -> None:
    config, shapes = outline()
    file = gguf_shapes(config, shapes)
    metadata = plain(model_metadata(config, name="a", vocab_size=96))
    for key, value, named in [
        ("general.architecture", "bert", "'bert'"),
        ("llama.block_count", None, "llama.block_count: missing"),
        ("llama.block_count", 1 << 31, "llama.block_count: 2147483648, but the tensors are of 2"),
        ("llama.embedding_length", 128, "llama.embedding_length: 128, but"),
        ("llama.attention.head_count", 0, "llama.attention.head_count: 0"),
        ("llama.feed_forward_length", "many", "'many'"),
        ("llama.rope.freq_base", "high", "'high'"),
        ("llama.rope.freq_base", float("nan"), "nan"),
        ("llama.attention.head_count", [4, 8], "differs between layers"),
        ("llama.expert_count", 8, "expert_count"),
        ("llama.attention.value_length", 8, "value_length"),
        ("llama.rope.scaling.type", "spiral", "'spiral'"),
    ]:
        with pytest.raises(UserError, match=named):
            config_of(copy.deepcopy(metadata) | {key: value}, file)
    with pytest.raises(UserError, match=r"token_embd\.weight: missing"):
        config_of(metadata, {})
    with pytest.raises(UserError, match=r"blk\.0\.ssm_a: unknown tensor"):
        checkpoint_names(config_of(metadata, file), [*file, "blk.0.ssm_a"])
    assert checkpoint_names(config_of(metadata, file), [*file, "blk.0.attn_q.scale"])  # of NVFP4


JUNK: Any = (
    *(None, True, 0, 1, -1, 1 << 40, 7, 0.5, float("nan"), float("inf"), "x", [], [1], {}, {"a": 1}),
    *({"full_attention": {}}, {"sliding_attention": 3}, {"type": "longrope", "long_factor": 5, "short_factor": [1]}),
    *({"rope_type": "yarn"}, {"rope_type": "llama3", "factor": 0}, {"rope_type": "linear", "factor": -1}),
)


@given(kind=st.sampled_from(sorted(ARCHITECTURES)), data=st.data())
@settings(max_examples=200, deadline=None, database=None, derandomize=True)
def test_junk_in_config_is_refused_or_read(kind: str, data: st.DataObject) -> None:
    config: dict[str, Any] = DEFAULTS.get(kind, {}) | {"model_type": kind, "norm_topk_prob": True}
    keys = [*config, "rope_parameters", "rope_scaling", "text_config", "partial_rotary_factor", "num_local_experts"]
    drawn = data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=2))
    config |= {key: data.draw(st.sampled_from(JUNK)) for key in drawn}
    with contextlib.suppress(UserError):
        for type_, value in model_metadata(config, name="a", vocab_size=9).values():
            assert type_ != "u32" or 0 <= value < 1 << 32
            assert type_ != "f32" or 0 < value < 1e30
        extra_tensors(config)
        notes(config)


@given(variant=st.sampled_from(("llama-yarn", "gemma3-pattern", "phi3", "qwen3")), data=st.data())
@settings(max_examples=200, deadline=None, database=None, derandomize=True)
def test_junk_in_keys_is_refused_or_read(variant: str, data: st.DataObject) -> None:
    config, shapes = outline(variant)
    shapes = gguf_shapes(config, shapes)
    metadata = plain(model_metadata(config, name="a", vocab_size=96))
    more = [f"{architecture(config)}.{key}" for key in ("expert_count", "rope.scale_linear", "rope.scaling.type")]
    keys = data.draw(st.lists(st.sampled_from([*metadata, *more]), min_size=1, max_size=2))
    metadata |= {key: data.draw(st.sampled_from(JUNK)) for key in keys}
    with contextlib.suppress(UserError):
        checkpoint_names(config_of(metadata, shapes), shapes)


def test_no_torch_for_names_and_keys() -> None:
    code = "import sys; from quantkit.formats.gguf import metadata, tensor_names; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
