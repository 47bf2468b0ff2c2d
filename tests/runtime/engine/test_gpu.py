"""The engine over Triton's kernels: on a GPU, and elsewhere in their interpreter."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

pytest.importorskip("triton")

from quantkit.runtime.engine import gpu
from quantkit.runtime.engine.llm import LLM
from quantkit.runtime.engine.runner import Runner
from quantkit.types import KVSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(DEVICE, torch.float16).eval()


@pytest.mark.parametrize("cache", ["auto", "int8", "fp8", {"keys": "int8", "values": "fp8"}, "int4"])
def test_equal_to_the_plain_path(cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks and decoding; formats without a kernel go the plain way over the same memory."""
    tokens = [torch.randint(3, 64, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (21, 1, 30)]
    options = {"kv_cache": cache, "block_size": 16, "num_blocks": 12, "max_num_batched_tokens": 24}
    monkeypatch.setattr(gpu, "kernel_cache", lambda pages: None)
    wanted = LLM(model(), **options).score(tokens)
    monkeypatch.undo()
    launched = []
    attend = gpu.attend_on_gpu
    init = Runner.__init__

    def on_gpu(self: Runner, model: PreTrainedModel) -> None:
        init(self, model)
        self.on_gpu = True

    monkeypatch.setattr(Runner, "__init__", on_gpu)
    monkeypatch.setattr(
        "quantkit.runtime.engine.attention.attend_on_gpu",
        lambda *args: launched.append(out := attend(*args)) or out,
    )
    got = LLM(model(), **options).score(tokens)
    assert all((out is None) == (cache == "int4") for out in launched)
    assert launched
    for ours, theirs in zip(got, wanted, strict=True):
        # sums in another order move single codes by a step
        assert (ours - theirs).abs().sum() <= 0.02 * max(len(ours), 1), (ours - theirs).abs().mean()


def test_kinds() -> None:
    from quantkit.runtime.engine.cache import Pages

    def pages(spec: KVSpec | None, dtype: torch.dtype = torch.float16, block: int = 16, **more: Any) -> Pages:
        return Pages(2, block, 2, 32, spec, dtype, torch.device(DEVICE), **{"tokens_first": True} | more)

    assert gpu.kernel_cache(pages(None)) is not None
    for without in (
        pages(None, torch.float32),
        pages(None, block=8),
        pages(None, tokens_first=False),
        pages(KVSpec(8, "int", "token", symmetric=False)),
        pages(KVSpec(8, "float"), static=torch.tensor(0.1)),
    ):
        assert gpu.kernel_cache(without) is None
