"""Greedy tokens equal transformers' `generate`: each way to run on one model, each model in one hard way.

All of it on every model: tests/slow/test_engine_equal.py.
"""

from pathlib import Path

import pytest
import torch
from quantkit_kernels.cpu.build import library
from transformers import PreTrainedModel

import quantkit
from quantkit import load
from quantkit.runtime.engine.llm import LLM
from quantkit.runtime.engine.request import SamplingParams
from tests.runtime.engine.equality import NEW, WAYS, check, engine, generated, prompts
from tests.tiny_models import tiny_model

BUNDLED = Path(__file__).resolve().parents[3] / "examples" / "tiny-llama"
MODELS = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox", "opt", "olmo2"]
MODELS += ["cohere", "granite", "qwen3_moe", "mixtral"]


@pytest.fixture(scope="module")
def bundled() -> tuple[PreTrainedModel, list[list[int]], list[list[int]]]:
    model = load(BUNDLED, dtype="float32")
    every = prompts(12, 4096)
    return model, every, [generated(model, prompt) for prompt in every]


@pytest.mark.parametrize("way", WAYS)
def test_each_way(way: str, bundled: tuple[PreTrainedModel, list[list[int]], list[list[int]]]) -> None:
    check(bundled[0], way, bundled[1], bundled[2])


@pytest.mark.parametrize("name", MODELS)
def test_each_model(name: str) -> None:
    """Preempted, in chunks, and with guesses at once."""
    model, every = tiny_model(name), prompts(8, 96)
    llm = engine(model, "preempted", num_blocks=9, max_num_batched_tokens=9, speculate="ngram")
    outputs = llm.generate(every, SamplingParams(temperature=0, max_tokens=NEW))
    for prompt, output in zip(every, outputs, strict=True):
        assert output.outputs[0].token_ids == generated(model, prompt)
    assert llm.stats.preemptions > 0
    llm.scheduler.check()


@pytest.mark.parametrize("scheme", ["W8A8", "FP8_DYNAMIC"])
def test_quantized_folders(scheme: str, tmp_path: Path) -> None:
    """Among others of the step: where inputs are rounded, one other last bit of a sum would show."""
    if scheme.startswith("FP8") and library() is None:
        pytest.skip("without a compiler the order of float sums is torch's business")
    recipe = {"scheme": scheme, "weights": {"algorithm": "rtn"}}
    quantkit.quantize(str(BUNDLED), recipe, tmp_path / "out", progress=False)
    model, every = load(tmp_path / "out", dtype="float32"), prompts(12, 4096)
    check(model, "mixed", every, [generated(model, prompt) for prompt in every])


def test_the_same_model_as_its_own_draft_is_always_right() -> None:
    """So that its cache holds what it should: with chunks, hits, preemption, and guesses cut off at the end."""
    llm = LLM(
        tiny_model("qwen3"), draft=tiny_model("qwen3"), block_size=4, num_blocks=22, max_num_batched_tokens=21,
        num_speculative_tokens=3,
    )  # fmt: skip
    every = prompts(10, 96)
    for _ in range(2):
        llm.generate(every, SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True))
    assert llm.stats.acceptance == 1.0
    assert min(llm.stats.drafted, llm.stats.preemptions, llm.stats.hits) > 0


def test_logits_do_not_depend_on_chunks_or_pages(bundled: tuple[PreTrainedModel, list, list]) -> None:
    """Chunks, page sizes and prefix hits change log-probabilities by float noise only: 1e-4 of logits of about 10."""
    tokens = [torch.randint(3, 4096, (150,), generator=torch.Generator().manual_seed(0)).tolist() for _ in range(2)]
    with torch.no_grad():
        logits = bundled[0](torch.tensor(tokens)).logits.log_softmax(-1)
    wanted = logits[:, :-1].gather(-1, torch.tensor(tokens)[:, 1:, None])[..., 0]
    for options in ({}, {"max_num_batched_tokens": 7}, {"block_size": 16, "max_num_batched_tokens": 100}):
        got = torch.stack(engine(bundled[0], "mixed", **options).score(tokens))
        assert torch.allclose(got, wanted, atol=1e-4)


def test_the_folder_itself() -> None:
    """A path, text, and its tokenizer."""
    llm = LLM(BUNDLED, dtype="float32")
    output = llm.generate("def ", SamplingParams(temperature=0, max_tokens=8))[0]
    assert output.prompt == "def "
    assert llm.tokenizer is not None
    whole = llm.tokenizer.decode(output.prompt_token_ids + output.outputs[0].token_ids)
    assert whole == "def " + output.outputs[0].text
