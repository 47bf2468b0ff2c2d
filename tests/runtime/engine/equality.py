"""Ways to run the engine that must all give the tokens of transformers' `generate` in float32."""

import copy
import random
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from quantkit.runtime.engine.llm import LLM
from quantkit.runtime.engine.request import SamplingParams

NEW = 20
# how the engine runs: its arguments, and what must have happened (an EngineStats field that is not 0)
WAYS: dict[str, tuple[dict[str, Any], str]] = {
    "one request": ({}, "steps"),
    "mixed": ({"block_size": 16}, "steps"),
    "preempted": ({"block_size": 8, "num_blocks": 14, "enable_prefix_caching": False}, "preemptions"),
    "chunks of 1": ({"max_num_batched_tokens": 1}, "steps"),
    "chunks of 7": ({"max_num_batched_tokens": 7, "block_size": 4}, "steps"),
    "chunks of 64": ({"max_num_batched_tokens": 64}, "steps"),
    "prefix hits": ({"block_size": 4, "max_num_batched_tokens": 33}, "hits"),
    "n-gram speculation": ({"speculate": "ngram", "block_size": 16}, "accepted"),
    "draft model": ({"draft": True, "block_size": 8, "num_blocks": 40, "num_speculative_tokens": 3}, "accepted"),
}


def prompts(count: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Mixed lengths; every third repeats itself, so that n-grams are found, and every second begins as others do."""
    choose = random.Random(seed)
    shared = [choose.randrange(3, vocabulary) for _ in range(13)]
    made = []
    for index in range(count):
        own = [choose.randrange(3, vocabulary) for _ in range(choose.randint(1, 12))]
        made.append((shared if index % 2 else []) + (own * 2 if index % 3 == 0 else own))
    return made


def generated(model: PreTrainedModel, prompt: list[int], new: int = NEW) -> list[int]:
    """What transformers generates greedily."""
    with torch.no_grad():
        out = model.generate(  # type: ignore[operator]
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=new, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def engine(model: PreTrainedModel, way: str, **more: Any) -> LLM:
    """An engine of a copy of the model; a draft model differs from it a little."""
    options = WAYS[way][0] | more
    if options.get("draft"):
        draft = copy.deepcopy(model)
        torch.manual_seed(1)
        with torch.no_grad():
            for param in draft.parameters():
                param.mul_(1 + 0.03 * torch.randn_like(param))
        options = options | {"draft": draft}
    return LLM(copy.deepcopy(model), **options)


def check(
    model: PreTrainedModel, way: str, every: Sequence[list[int]], wanted: Sequence[list[int]], others: int = 0,
    **more: Any,
) -> None:  # fmt: skip
    """AssertionError where a token differs (in more than `others` outputs), or what the way is about did not happen."""
    transformers.logging.set_verbosity_error()
    llm = engine(model, way, **more)
    params = SamplingParams(temperature=0, max_tokens=NEW)
    if way == "one request":
        outputs = [llm.generate(prompt, params)[0] for prompt in every]
    else:
        outputs = llm.generate(list(every), params)
    differ = []
    for prompt, output, tokens in zip(every, outputs, wanted, strict=True):
        assert output.error is None, output.error
        differ += [prompt] if output.outputs[0].token_ids != tokens else []
    assert len(differ) <= others, f"{way}: prompts {differ}"
    assert getattr(llm.stats, WAYS[way][1]) > 0, f"{way} did not happen: {llm.stats}"
    llm.scheduler.check()
    assert llm.scheduler.blocks.free == llm.scheduler.blocks.blocks
