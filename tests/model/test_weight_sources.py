from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from quantkit.errors import UserError
from quantkit.model.block_graph import trace_block
from quantkit.model.weight_sources import ShapeTracer, TensorSlice, assemble, linear_names, weight_sources
from tests.tiny_models import CONFIGS, block_inputs, tiny_model


def saved(model: transformers.PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """The checkpoint transformers writes, tensor by tensor."""
    model.save_pretrained(folder)
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def meta_model(model: transformers.PreTrainedModel) -> nn.Module:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(model.config)


def assert_assembles(
    sources: dict[str, list[TensorSlice]], checkpoint: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    for name, tensor in expected.items():
        if name in sources:
            got = assemble(sources[name], torch.full_like(tensor, float("nan")), checkpoint.__getitem__)
            assert torch.equal(got, tensor), name


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_what_transformers_loads(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    checkpoint = saved(model, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    sources = weight_sources(meta_model(model), checkpoint)
    assert_assembles(sources, checkpoint, loaded.state_dict())
    tied = {"lm_head.weight"} if loaded.config.tie_word_embeddings else set()
    assert loaded.state_dict().keys() - sources.keys() == tied
    assert {piece.name for pieces in sources.values() for piece in pieces} == checkpoint.keys()


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_base_model_checkpoints_lack_the_prefix(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    checkpoint = saved(model.base_model, tmp_path)
    assert not any(key.startswith(f"{model.base_model_prefix}.") for key in checkpoint)
    if not model.config.tie_word_embeddings:
        checkpoint["lm_head.weight"] = model.state_dict()["lm_head.weight"]
    sources = weight_sources(meta_model(model), checkpoint)
    assert_assembles(sources, checkpoint, model.state_dict())


def test_more_than_ten_experts_keep_their_numbers(tmp_path: Path) -> None:
    config = CONFIGS["qwen3_moe"]()
    config.num_experts = 12
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    checkpoint = saved(model, tmp_path)
    assert_assembles(weight_sources(meta_model(model), checkpoint), checkpoint, model.state_dict())


@pytest.mark.parametrize(
    ("name", "stem", "leaves"),
    [
        ("qwen3_moe", "model.layers.1.mlp.experts.", ("gate_proj", "up_proj", "down_proj")),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.", ("w1", "w3", "w2")),
    ],
)
def test_experts_go_under_their_checkpoint_names(name: str, stem: str, leaves: tuple[str, ...], tmp_path: Path) -> None:
    """Every site's rows are, bit for bit, the checkpoint tensors they are said to be written as."""
    model = tiny_model(name)
    checkpoint = saved(model, tmp_path)
    sources = weight_sources(meta_model(model), checkpoint)
    block, args, kwargs = block_inputs(model, index=1)
    graph = trace_block(block, args, kwargs, folds=False)
    written = set()
    for site in graph.sites:
        for module, rows in linear_names(sources, "model.layers.1", site):
            assert torch.equal(site.view(block)[rows], checkpoint[f"{module}.weight"])
            written.add(module)
    assert {f"{stem}{expert}.{leaf}" for expert in range(4) for leaf in leaves} <= written
    assert len(written) == 4 + 4 * 3
    gate_up = next(site for site in graph.sites if site.name.endswith("gate_up_proj.2"))
    names = [module for module, _ in linear_names(sources, "model.layers.1", gate_up)]
    assert names == [f"{stem}2.{leaf}" for leaf in leaves[:2]]


def test_plain_linear_and_conv1d_keep_their_names(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    sources = weight_sources(meta_model(model), saved(model.base_model, tmp_path))
    block, args, kwargs = block_inputs(model)
    graph = trace_block(block, args, kwargs, folds=False)
    names = [linear_names(sources, "transformer.h.0", site) for site in graph.sites]
    assert names[0] == [("h.0.attn.c_attn", slice(None))]


def test_missing_tensor_names_the_parameter(tmp_path: Path) -> None:
    model = tiny_model("llama")
    checkpoint = saved(model, tmp_path)
    del checkpoint["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: no tensor"):
        weight_sources(meta_model(model), checkpoint)


def test_untied_head_must_be_there(tmp_path: Path) -> None:
    model = tiny_model("llama")
    checkpoint = saved(model, tmp_path)
    del checkpoint["lm_head.weight"]
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        weight_sources(meta_model(model), checkpoint)


@pytest.mark.parametrize("expert", [1, 3])
def test_missing_expert_names_the_parameter(expert: int, tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    checkpoint = saved(model, tmp_path)
    del checkpoint[f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight"]
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.experts\.down_proj: .*some are missing"):
        weight_sources(meta_model(model), checkpoint)


def test_wrong_shape_names_both(tmp_path: Path) -> None:
    model = tiny_model("llama")
    checkpoint = saved(model, tmp_path)
    checkpoint["model.norm.weight"] = torch.ones(5)
    with pytest.raises(UserError, match=r"model\.norm\.weight: has shape \[5\].*\[48\]"):
        weight_sources(meta_model(model), checkpoint)


def test_symbols_agree_with_real_tensors() -> None:
    """The operations conversions use, on symbols and on tensors: assembling the pieces gives the same values."""
    files = {f"t{i}": torch.randn(4, 6) for i in range(4)}
    symbols = [ShapeTracer.of(name, tuple(tensor.shape)) for name, tensor in files.items()]

    def fuse(tensors: list) -> list:
        stacked = [torch.stack(tensors[:2], dim=0), torch.stack(tensors[2:], dim=0)]
        fused = torch.cat(stacked, dim=1)
        swapped = torch.transpose(fused, dim0=1, dim1=2)
        return [fused, swapped, *torch.chunk(tensors[0], 2, dim=0), *torch.split(torch.cat(tensors, dim=0), [10, 6], 0)]

    for symbol, tensor in zip(fuse(symbols), fuse(list(files.values())), strict=True):
        assert tuple(symbol.shape) == tuple(tensor.shape)
        pieces = [box.piece(symbol.shape, (4, 6)) for box in symbol.boxes]
        assert torch.equal(assemble(pieces, torch.empty(tensor.shape), files.__getitem__), tensor)


def test_unknown_operation_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="flip"):
        torch.flip(ShapeTracer.of("t", (2, 2)), [0])  # type: ignore[arg-type]
