"""How tokens are chosen: each parameter against its definition, and speculation leaves the distribution as it is."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.errors import UserError
from quantkit.runtime.engine.llm import LLM
from quantkit.runtime.engine.request import Request, SamplingParams
from quantkit.runtime.engine.sampling import adjusted, logprobs, next_token, probabilities
from tests.tiny_models import tiny_model

V = 50


def logits(seed: int = 0, size: int = V) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


def request(params: SamplingParams, prompt: list[int], output: list[int]) -> Request:
    return Request("1", prompt + output, len(prompt), 99, params)


def reference(x: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """In float64, token by token."""
    p = torch.softmax(x.double() / temperature, -1)
    p[p < min_p * p.max()] = 0
    if top_k > 0:
        p[p < p.sort(descending=True).values[min(top_k, len(p)) - 1]] = 0
    p /= p.sum()
    kept, total = [], 0.0
    for token in p.argsort(descending=True, stable=True).tolist():
        if total >= top_p:
            break
        kept.append(token)
        total += p[token].item()
    mask = torch.zeros_like(p)
    mask[kept] = 1
    return p * mask / (p * mask).sum()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, -1, 1, 7, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 1.0])
def test_probabilities(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    got = probabilities(logits(), params).double()
    wanted = reference(logits(), temperature, top_k, top_p, min_p)
    assert torch.allclose(got / got.sum(), wanted, atol=1e-6)


def test_penalties() -> None:
    params = SamplingParams(repetition_penalty=1.5, presence_penalty=0.3, frequency_penalty=0.2)
    x, prompt, output = logits(), [1, 2, 2], [3, 4, 3, 3]
    wanted = x.clone()
    for token in {1, 2, 3, 4}:
        wanted[token] = wanted[token] / 1.5 if wanted[token] > 0 else wanted[token] * 1.5
    wanted[3] -= 3 * 0.2 + 0.3
    wanted[4] -= 0.2 + 0.3
    kept = x.clone()
    assert torch.allclose(adjusted(x, request(params, prompt, output), set()), wanted, atol=1e-6)
    assert torch.equal(x, kept)


def test_an_early_end_is_ruled_out() -> None:
    best = int(logits().argmax())
    params = SamplingParams(temperature=0, min_tokens=2)
    assert next_token(logits(), request(params, [1], [2]), {best}) != best
    assert next_token(logits(), request(params, [1], [2, 3]), {best}) == best


def test_logprobs() -> None:
    rows = torch.stack([logits(0), logits(1)])
    first, second = logprobs(rows, [7, int(logits(1).argmax())], 3)
    shares = rows.log_softmax(-1)
    assert next(iter(first)) == 7
    assert math.isclose(first[7].logprob, shares[0, 7].item(), abs_tol=1e-6)
    assert first[7].rank == int((shares[0] > shares[0, 7]).sum()) + 1
    assert len(second) == 3
    assert [entry.rank for entry in second.values()] == [1, 2, 3]
    assert list(logprobs(rows, [7, 8], 0)[0]) == [7]


def test_logprobs_of_an_output_and_its_prompt() -> None:
    """Of the untouched logits, whatever is done to them before a token is chosen; chunks and preemption add nothing."""
    model = tiny_model("llama")
    prompt = list(range(5, 25))
    params = SamplingParams(
        temperature=0.7, seed=1, max_tokens=6, logprobs=2, prompt_logprobs=1, repetition_penalty=1.3, ignore_eos=True
    )
    llm = LLM(tiny_model("llama"), block_size=4, num_blocks=12, max_num_batched_tokens=7)
    outputs = llm.generate([prompt, prompt[::-1]], params)
    for output in outputs:
        tokens = output.prompt_token_ids + output.outputs[0].token_ids
        with torch.no_grad():
            shares = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        assert output.prompt_logprobs is not None
        assert output.outputs[0].logprobs is not None
        assert output.prompt_logprobs[0] is None
        entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        assert len(entries) == len(tokens) - 1
        for position, entry in enumerate(entries):
            assert entry is not None
            assert math.isclose(
                entry[tokens[position + 1]].logprob, shares[position, tokens[position + 1]], abs_tol=1e-4
            )
        total = sum(next(iter(entry.values())).logprob for entry in output.outputs[0].logprobs)
        assert output.outputs[0].cumulative_logprob == pytest.approx(total)
    assert llm.stats.preemptions > 0


@pytest.mark.parametrize("budget", [1, 5])
def test_prompts_of_one_token_and_chunks_of_one(budget: int) -> None:
    """A chunk may hold the prompt's last token alone, which says nothing of the prompt."""
    llm = LLM(tiny_model("llama"), num_blocks=8, max_num_batched_tokens=budget)
    params = SamplingParams(temperature=0, max_tokens=2, logprobs=0, prompt_logprobs=0, ignore_eos=True)
    for output in llm.generate([[5], [5, 6, 7, 8, 9, 10]], params):
        assert output.prompt_logprobs is not None
        assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    assert [len(each) for each in llm.score([[5], [5, 6], [5] * 6])] == [0, 1, 5]


@pytest.mark.parametrize(
    ("field", "value"),
    [("n", 2), ("temperature", -1), ("top_p", 0), ("top_p", 1.1), ("top_k", -2), ("min_p", 2), ("max_tokens", 0),
     ("min_tokens", 99), ("logprobs", -1), ("presence_penalty", 3), ("repetition_penalty", 0)],
)  # fmt: skip
def test_values_out_of_range(field: str, value: float) -> None:
    with pytest.raises(UserError, match=field):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["best_of", "logit_bias", "guided_decoding", "temprature"])
def test_an_unknown_field_is_named(field: str) -> None:
    with pytest.raises(UserError, match=field):
        SamplingParams(**{field: 1})  # type: ignore[arg-type]


SAMPLED: dict[str, Any] = {"max_tokens": 10, "temperature": 1.5, "top_k": 40, "seed": 3, "ignore_eos": True}


@pytest.mark.parametrize("way", ["ngram", "draft"])
def test_a_seed_gives_the_same_tokens_with_and_without_guesses(way: str) -> None:
    """And alone or among others, preempted or not."""
    params = SamplingParams(**SAMPLED)
    prompt = [5, 6, 7, 5, 6, 7, 5, 6]
    alone = LLM(tiny_model("llama"), num_blocks=8).generate(prompt, params)[0].outputs[0].token_ids
    guess = {"ngram": {"speculate": "ngram"}, "draft": {"draft": tiny_model("llama")}}[way]
    llm = LLM(tiny_model("llama"), block_size=4, num_blocks=9, **guess)
    for output in llm.generate([prompt] * 4, params):
        assert output.outputs[0].token_ids == alone
    assert llm.stats.drafted > llm.stats.accepted > 0 or way == "ngram"
    other = SamplingParams(**SAMPLED | {"seed": 4})
    assert llm.generate(prompt, other)[0].outputs[0].token_ids != alone


def test_without_a_seed_requests_differ_and_runs_do_not() -> None:
    params = SamplingParams(**SAMPLED | {"seed": None})
    first = [o.outputs[0].token_ids for o in LLM(tiny_model("llama"), num_blocks=8).generate([[5, 6]] * 2, params)]
    again = [o.outputs[0].token_ids for o in LLM(tiny_model("llama"), num_blocks=8).generate([[5, 6]] * 2, params)]
    other = LLM(tiny_model("llama"), num_blocks=8, seed=9).generate([[5, 6]], params)[0].outputs[0].token_ids
    assert first[0] != first[1]
    assert first == again
    assert other != first[0]


@pytest.mark.parametrize("way", ["ngram", "draft"])
def test_guesses_keep_the_distribution(way: str) -> None:
    """Chi-squared at 1e-3: the third token of 1500 outputs against its exact distribution, by enumeration."""
    model = tiny_model("llama")
    params = {"temperature": 0.8, "top_k": 3, "max_tokens": 3, "ignore_eos": True}
    prompt = [5, 6, 5, 6, 5]
    wanted: dict[int, float] = {}

    def spread(tokens: list[int], share: float, left: int) -> None:
        with torch.no_grad():
            p = probabilities(model(torch.tensor([tokens])).logits[0, -1], SamplingParams(**params)).tolist()
        for token, own in ((token, own) for token, own in enumerate(p) if own > 0):
            if left == 1:
                wanted[token] = wanted.get(token, 0) + share * own
            else:
                spread([*tokens, token], share * own, left - 1)

    spread(prompt, 1.0, 3)
    guess: dict[str, Any] = {"ngram": {"speculate": "ngram"}, "draft": {"draft": tiny_model("llama")}}[way]
    llm = LLM(tiny_model("llama"), block_size=16, num_blocks=200, max_num_seqs=100, **guess)
    count = 1500
    seen: dict[int, int] = {}
    for output in llm.generate([prompt] * count, [SamplingParams(**params, seed=i) for i in range(count)]):
        token = output.outputs[0].token_ids[2]
        seen[token] = seen.get(token, 0) + 1
    assert set(seen) <= set(wanted)
    common = [token for token, share in wanted.items() if share * count >= 8]
    pairs = [(seen.get(token, 0), wanted[token] * count) for token in common]
    rest = count - sum(n for n, _ in pairs), count - sum(e for _, e in pairs)
    pairs += [rest] if rest[1] >= 8 else []
    chi = sum((n - e) ** 2 / e for n, e in pairs)
    degrees = len(pairs) - 1
    # Wilson and Hilferty's approximation of the 0.999 quantile
    limit = degrees * (1 - 2 / (9 * degrees) + 3.09 * math.sqrt(2 / (9 * degrees))) ** 3
    assert chi < limit, f"{chi} of {degrees} degrees of freedom"
    assert llm.stats.drafted > 0
