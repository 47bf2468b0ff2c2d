from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import UserError
from quantkit.model.block_graph import trace_block
from quantkit.model.block_trial import (
    once_per_structure,
)
from quantkit.model.meta_model import build_meta_model, find_blocks, read_config
from quantkit.model.streamed_model import (
    StreamedModel,
)
from quantkit.model.weight_sources import weight_sources
from tests.tiny_models import tiny_model

IDS = torch.arange(3, 15).reshape(1, -1)


@pytest.fixture
def streamed(tmp_path: Path) -> StreamedModel:
    tiny_model("llama").save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    model = build_meta_model(read_config(tmp_path))
    sources = weight_sources(model, checkpoint.tensors)
    return StreamedModel(model, sources, checkpoint, torch.float32, torch.device("cpu"))


def loop_over_blocks(streamed: StreamedModel, step: Callable[[Tensor, int, nn.Module], Tensor]) -> None:
    """Let the model run its blocks by `step`."""

    def forward(input_ids: Tensor, use_cache: bool) -> None:
        hidden = streamed.model.get_input_embeddings()(input_ids)
        for index, block in enumerate(streamed.blocks):
            hidden = step(hidden, index, block)

    streamed.model.forward = forward


@pytest.mark.parametrize("count", [1, 2, 3])
def test_blocks_may_return_tuples(streamed: StreamedModel, count: int) -> None:
    def step(hidden: Tensor, _: int, block: nn.Module) -> Tensor:
        result = block(hidden)
        if not isinstance(result, tuple):
            raise TypeError("not a tuple")
        hidden, *rest = result
        assert len(rest) == count - 1
        return hidden

    loop_over_blocks(streamed, step)
    hidden, calls = streamed.first_call(IDS)
    assert torch.equal(hidden, streamed.checkpoint.read("model.embed_tokens.weight")[IDS])
    assert len(calls) == 2


def skip(hidden: Tensor, index: int, block: nn.Module) -> Tensor:
    return block(hidden) if index == 0 else hidden


def twice(hidden: Tensor, _: int, block: nn.Module) -> Tensor:
    return block(block(hidden))


def scaled(hidden: Tensor, index: int, block: nn.Module) -> Tensor:
    return block(hidden * 2 if index else hidden)


def failing(hidden: Tensor, index: int, block: nn.Module) -> Tensor:
    if index:
        raise AttributeError("'NoneType' object has no attribute 'pixels'\nmore")
    return block(hidden)


@pytest.mark.parametrize(
    ("step", "says"),
    [
        (skip, r"model\.layers\.1 \(LlamaDecoderLayer\): LlamaForCausalLM does not run this block on text, 1 of 2"),
        (twice, r"model\.layers: LlamaForCausalLM does not run its blocks once each in their order"),
        (scaled, r"model\.layers\.1: LlamaForCausalLM changes the hidden states between blocks 0 and 1"),
        (failing, r"LlamaForCausalLM fails .* model\.layers\.0: AttributeError: 'NoneType' object .* 'pixels'; "),
    ],
)
def test_a_model_that_does_not_chain_its_blocks_is_refused(
    streamed: StreamedModel, step: Callable[[Tensor, int, nn.Module], Tensor], says: str
) -> None:
    loop_over_blocks(streamed, step)
    with pytest.raises(UserError, match=says):
        streamed.first_call(IDS)


def test_a_block_that_fails_on_its_own_is_named(streamed: StreamedModel) -> None:
    def look(index: int, *_: Any) -> None:
        raise KeyError("sliding_attention")

    with pytest.raises(UserError, match=r"model\.layers\.0 \(LlamaDecoderLayer\).*KeyError: 'sliding_attention'"):
        once_per_structure(streamed, look)
    assert all(param.is_meta for param in streamed.blocks[0].parameters())


@pytest.mark.parametrize("error", [MemoryError("no room"), torch.OutOfMemoryError("no room")])
def test_out_of_memory_is_no_fault_of_the_model(streamed: StreamedModel, error: Exception) -> None:
    def look(index: int, *_: Any) -> None:
        raise error

    with pytest.raises(type(error)):
        once_per_structure(streamed, look)


class Rewrite:
    """Doubles what it reads."""

    def rotate_block(self, block: nn.Module, index: int) -> None:
        for param in block.parameters():
            param.data.mul_(2 + index)

    def outside(self, name: str, rows: Tensor) -> Tensor:
        return rows * 2


def test_a_rewrite_holds_for_the_new_model_alone(streamed: StreamedModel) -> None:
    rewritten = streamed.with_rewrite(Rewrite())
    for _ in range(2):
        hidden, _ = streamed.first_call(IDS)
        doubled, _ = rewritten.first_call(IDS)
        assert torch.equal(doubled, hidden * 2)
        weight = streamed.fill(1).get_parameter("mlp.up_proj.weight").clone()
        assert torch.equal(rewritten.fill(1).get_parameter("mlp.up_proj.weight"), weight * 3)


def test_the_same_block_twice_is_refused() -> None:
    model = tiny_model("llama")
    blocks = model.get_submodule("model.layers")
    assert isinstance(blocks, nn.ModuleList)
    blocks[1] = blocks[0]
    with pytest.raises(UserError, match=r"model\.layers\.1\.self_attn\.q_proj\.weight: .* belongs to model\.layers\.0"):
        find_blocks(model)


class Narrow(nn.Module):
    """A block whose own code refuses float64."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.norm = where, nn.RMSNorm(16)
        self.up, self.down = nn.Linear(16, 24, bias=False), nn.Linear(24, 16, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.up(self.norm(hidden))
        if x.dtype == torch.float64 and self.where == "always":
            raise TypeError("float64 is not supported by this kernel")
        return hidden + self.down(x)


def test_a_failing_fold_search_means_no_fold() -> None:
    block = Narrow("always").requires_grad_(False)
    kept = {name: param.clone() for name, param in block.named_parameters()}
    graph = trace_block(block, (torch.randn(1, 12, 16),), {})
    assert [site.name for site in graph.sites] == ["up", "down"]
    assert not graph.folds
    assert "TypeError: float64 is not supported by this kernel" in graph.rejected[0][1]
    for name, param in block.named_parameters():
        assert torch.equal(param, kept[name])
        assert param.dtype == kept[name].dtype


def test_one_producer_that_fails_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantkit.model.fold_search import Search

    def broken(self: Search, path: str, quantizable: set[str]) -> None:
        raise IndexError("index 5 is out of bounds")

    monkeypatch.setattr(Search, "from_norm", broken)
    graph = trace_block(Narrow("never").requires_grad_(False), (torch.randn(1, 12, 16),), {})
    assert [fold.producer for fold in graph.folds] == ["up"]
    assert ("norm -> nothing", "IndexError: index 5 is out of bounds") in [
        (pair, reason.partition("float64: ")[2]) for pair, reason in graph.rejected
    ]
