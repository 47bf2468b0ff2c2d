"""What batches give to blocks beside the hidden states: kept once where it is the same, per batch where it is not."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama as llama

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import UserError
from quantkit.model.meta_model import build_meta_model, read_config
from quantkit.model.streamed_model import BlockCall, StreamedModel
from quantkit.model.weight_sources import weight_sources
from quantkit.quantization import pipeline
from quantkit.quantization.calibration.block_calls import BlockCalls
from quantkit.quantization.calibration.hidden_states import HiddenStates
from quantkit.recipe import load as recipe
from tests.tiny_models import tiny_model


@pytest.mark.parametrize("limit", [None, 100])
def test_each_batch_gets_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None) -> None:
    if limit is not None:
        monkeypatch.setattr("quantkit.quantization.calibration.spill.STATES_LIMIT", limit)
    calls, shared = BlockCalls(torch.device("cpu"), tmp_path), torch.arange(5.0)
    given = {}
    for batch in range(3):
        part, own = slice(2 * batch, 2 * batch + 2), torch.randn(2, 7, generator=torch.Generator().manual_seed(batch))
        given[batch] = part, own
        calls.add(
            part, [BlockCall((own,), {"mask": shared, "n": 1}), BlockCall((own * 2,), {"mask": shared, "n": batch})]
        )
    for part, own in given.values():
        first, second = calls.of(part, 0), calls.of(part, 1)
        assert torch.equal(first.args[0], own)
        assert torch.equal(second.args[0], own * 2)
        assert first.kwargs["mask"] is shared
        assert second.kwargs["n"] == part.start // 2
    assert 0 < calls.kept_bytes <= 2 * 2 * 64 * 3, "only what differs is kept"


def save(name: str, folder: Path) -> tuple[Path, Tensor]:
    model = tiny_model(name)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder, torch.randint(3, 96, (24, 16), generator=torch.Generator().manual_seed(0))


def test_arguments_that_depend_on_the_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Llama whose blocks get something of each token, as Gemma 3n's do: every batch runs on its own."""
    folder, ids = save("llama", tmp_path / "m")
    forward, outer = llama.LlamaDecoderLayer.forward, llama.LlamaModel.forward

    def adding(self: nn.Module, hidden: Tensor, *args: object, extra: Tensor, **kwargs: object) -> Tensor:
        return forward(self, hidden + extra, *args, **kwargs)

    def giving(self: nn.Module, input_ids: Tensor, **kwargs: object) -> object:
        return outer(self, input_ids=input_ids, extra=(input_ids % 7 - 3).float()[..., None], **kwargs)

    monkeypatch.setattr(llama.LlamaDecoderLayer, "forward", adding)
    monkeypatch.setattr(llama.LlamaModel, "forward", giving)
    monkeypatch.setattr("quantkit.quantization.calibration.hidden_states.BATCH_TOKENS", (48, 48))  # 3 samples
    checkpoint, model = Checkpoint.open(folder), build_meta_model(read_config(folder))
    sources = weight_sources(model, checkpoint.tensors)
    streamed = StreamedModel(model, sources, checkpoint, torch.float32, torch.device("cpu"))
    states = HiddenStates(streamed, ids, tmp_path)
    assert len(states.slices) == 8
    reference = llama.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = reference.model(ids, output_hidden_states=True).hidden_states
    for index in range(2):
        states.advance(streamed.fill(index), index)
        found = states.hidden_STH if index == 0 else reference.model.norm(states.hidden_STH)
        torch.testing.assert_close(found, expected[index + 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reader", [None, 1])
def test_blocks_that_hand_each_other_more_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: int | None
) -> None:
    """Only where one reads what another has written: notes that no block reads do no harm."""
    folder, _ = save("llama", tmp_path / "m")
    layer, model = llama.LlamaDecoderLayer, llama.LlamaModel
    forward, outer = layer.forward, model.forward

    def writing(self: nn.Module, hidden: Tensor, *args: object, notes: list, **kwargs: object) -> Tensor:
        if self.self_attn.layer_idx == reader:
            hidden = hidden + notes[0]
        else:
            notes[0] = hidden
        return forward(self, hidden, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", writing)
    monkeypatch.setattr(model, "forward", lambda self, *args, **kwargs: outer(self, *args, notes=[0.0], **kwargs))
    if reader is not None:  # blocks of one structure are looked at once
        init = layer.__init__

        def marked(self: nn.Module, config: object, layer_idx: int) -> None:
            init(self, config, layer_idx)
            self.role = str(layer_idx)

        monkeypatch.setattr(layer, "__init__", marked)
    loaded = recipe.from_data({"scheme": "FP8_DYNAMIC", "model": str(folder)})
    if reader is None:
        pipeline.quantize(loaded, tmp_path / "out", progress=False)
        return
    words = r"model\.layers\.0 \(LlamaDecoderLayer\): it writes into its argument notes, which block 1 reads"
    with pytest.raises(UserError, match=words):
        pipeline.quantize(loaded, tmp_path / "out", progress=False)
    assert not (tmp_path / "out.partial").exists()
