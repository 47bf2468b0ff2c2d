"""Greedy continuations against generate(), and where two of them part."""

from pathlib import Path
from typing import Any

import pytest
import torch
from quantkit_eval.report.original_outliers import original_outliers
from quantkit_eval.report.side_by_side import common, compare, continuation, greedy, prompts_from
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantkit.algorithms.outliers import weight_peak
from quantkit.errors import RunError

MODEL = Path(__file__).parents[3] / "examples" / "tiny-llama"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def test_greedy_is_what_generate_writes(model: Any, tokenizer: Any) -> None:
    ids = tokenizer("def main(", return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    run = greedy(model, ids[0].tolist(), 12)
    assert run.tokens[: len(expected)] == expected
    assert run.prefill > 0
    assert run.decode > 0


def test_a_model_without_a_cache_is_named(model: Any) -> None:
    class Forgetful:
        device = model.device

        def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any: ...

        def __call__(self, **given: Any) -> Any:
            return type("Output", (), {"logits": torch.zeros(1, 1, 4)})

    with pytest.raises(RunError, match="keeps no cache"):
        greedy(Forgetful(), [1, 2], 2)


def test_samples_part_at_the_first_token_that_differs(model: Any, tokenizer: Any) -> None:
    other = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    for name, weight in other.named_parameters():
        if "proj" in name:
            weight.data += 0.5 * weight.data.std() * torch.randn_like(weight)
    prompt = tokenizer("import os\n\ndef ")["input_ids"]
    (sample,), speed = compare(other, model, tokenizer, [prompt], None)
    mine, theirs = greedy(model, prompt, sample.tokens).tokens, greedy(other, prompt, sample.tokens).tokens
    assert sample.shared_tokens == common(mine, theirs) < sample.tokens
    assert sample.reference.shared == sample.model.shared
    assert sample.reference.differing != sample.model.differing
    for side, ids in ((sample.reference, mine), (sample.model, theirs)):
        whole = side.shared + side.differing + side.rest
        assert sample.prompt + whole == tokenizer.decode([*prompt, *ids])
    assert min(speed.model.prefill, speed.model.decode, speed.reference.prefill, speed.reference.decode) > 0
    (equal,), _ = compare(model, model, tokenizer, [prompt], None)
    assert equal.shared_tokens == equal.tokens
    assert (equal.model.differing, equal.model.rest) == ("", "")


def test_a_short_model_writes_less(model: Any, tokenizer: Any) -> None:
    windows = [torch.arange(3, 3 + 6 * 16).view(6, 16)]
    prompts = prompts_from(windows, 16)
    assert [len(prompt) for prompt in prompts] == [8] * 4
    assert prompts[0] == list(range(3, 11))
    samples, speed = compare(model, model, tokenizer, prompts, 16)
    assert max(sample.tokens for sample in samples) == speed.new_tokens == 8


def test_cuts_lie_before_half_characters(tokenizer: Any) -> None:
    prompt, ids = tokenizer("a")["input_ids"], tokenizer("é世b", add_special_tokens=False)["input_ids"]
    whole = tokenizer.decode([*prompt, *ids])[len(tokenizer.decode(prompt)) :]
    for shared in range(len(ids) + 1):
        parts = continuation(tokenizer, prompt, ids, shared)
        assert parts.shared + parts.differing + parts.rest == whole
        assert "\N{REPLACEMENT CHARACTER}" not in parts.shared


def test_outliers_of_the_original(model: Any) -> None:
    name = "model.layers.1.mlp.down_proj"
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, given: seen.append(given[0].double()))
    ids = torch.arange(5, 5 + 40).view(2, 20)
    (found,) = original_outliers(model, [name, "model.layers.1.mlp.experts.0.up_proj"], ids)
    handle.remove()
    mean_K = torch.cat(seen).reshape(-1, seen[0].shape[-1]).square().mean(0)
    assert found.name == name
    assert found.weight == pytest.approx(weight_peak(model.get_submodule(name).weight))
    assert found.input == pytest.approx(float((mean_K.max() / mean_K.median()).sqrt()), rel=1e-4)
    assert not model.get_submodule(name)._forward_pre_hooks
