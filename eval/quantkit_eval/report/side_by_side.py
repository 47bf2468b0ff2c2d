"""Two models continue the same prompts greedily, in turn: what each writes, and how fast.

Shapes: T = tokens of a prompt, V = vocabulary.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import RunError
from quantkit.report.measurements import Continuation, Sample, Speed, SpeedComparison
from quantkit_eval.cached_model import cache_argument

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 4, 32, 48


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens that a model wrote, the seconds until the first of them, and of all the others together."""

    tokens: list[int]
    prefill: float
    decode: float


def prompts_from(windows: Sequence[Tensor], positions: int | None) -> list[list[int]]:
    """The first tokens of windows spread over texts [W, T]; positions: the longest that the model takes."""
    room = PROMPT_TOKENS if positions is None else max(1, min(PROMPT_TOKENS, positions // 2))
    rows = [row for ids_WT in windows for row in ids_WT[:: max(1, len(ids_WT) // PROMPTS)][:PROMPTS]]
    return [row[:room].tolist() for row in rows[:: max(1, len(rows) // PROMPTS)][:PROMPTS]]


@torch.inference_mode()
def greedy(model: Any, prompt: list[int], count: int) -> Run:
    """`count` tokens behind the prompt, each the likeliest. RunError for a model without a cache."""
    ids_1T = torch.tensor([prompt], device=model.device)
    found: list[int] = []
    started = time.perf_counter()
    first, cache, name = started, None, cache_argument(model)
    for _ in range(count):
        out = model(input_ids=ids_1T, use_cache=True, **({} if name is None else {name: cache}))
        if (cache := getattr(out, name or "", None)) is None:
            raise RunError("this model keeps no cache of keys and values")
        ids_1T = out.logits[:, -1:].argmax(-1)
        found.append(int(ids_1T))  # waits for the device
        if len(found) == 1:
            first = time.perf_counter()
    return Run(found, first - started, time.perf_counter() - first)


def compare(
    model: Any, reference: Any, tokenizer: Any, prompts: Sequence[list[int]], positions: int | None
) -> tuple[list[Sample], SpeedComparison]:
    """Samples of every prompt, and medians of both models' speeds. RunError as `greedy`."""
    longest = max(map(len, prompts))
    count = NEW_TOKENS if positions is None else max(2, min(NEW_TOKENS, positions - longest))
    for one in (reference, model):
        greedy(one, prompts[0], 2)  # the first run of a kernel compiles and allocates
    pairs = [(greedy(reference, prompt, count), greedy(model, prompt, count)) for prompt in prompts]
    samples = [
        _sample(tokenizer, prompt, one.tokens, other.tokens)
        for prompt, (one, other) in zip(prompts, pairs, strict=True)
    ]

    def speed(runs: Sequence[Run]) -> Speed:
        rates = [len(prompt) / run.prefill for prompt, run in zip(prompts, runs, strict=True)]
        return Speed(statistics.median(rates), statistics.median((count - 1) / run.decode for run in runs))

    references, models = [one for one, _ in pairs], [other for _, other in pairs]
    dtype = str(reference.dtype).removeprefix("torch.")
    sizes = len(prompts), longest, count
    return samples, SpeedComparison(speed(models), speed(references), *sizes, str(model.device), dtype)


def _sample(tokenizer: Any, prompt: list[int], reference: list[int], model: list[int]) -> Sample:
    reference, model = _until_end(tokenizer, reference), _until_end(tokenizer, model)
    shared = common(reference, model)
    return Sample(
        tokenizer.decode(prompt, skip_special_tokens=True),
        max(len(reference), len(model)),
        shared,
        continuation(tokenizer, prompt, reference, shared),
        continuation(tokenizer, prompt, model, shared),
    )


def _until_end(tokenizer: Any, tokens: list[int]) -> list[int]:
    """The tokens up to the end-of-sequence token, which is kept: to end is an answer too."""
    end = getattr(tokenizer, "eos_token_id", None)
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def continuation(tokenizer: Any, prompt: list[int], tokens: list[int], shared: int) -> Continuation:
    """The text behind the prompt, cut before and behind token number `shared`.

    A token may hold part of a character: the cut then lies before that character.
    """
    whole = tokenizer.decode([*prompt, *tokens])
    cuts = [common(tokenizer.decode([*prompt, *tokens[:n]]), whole) for n in (0, shared, shared + 1)]
    return Continuation(whole[cuts[0] : cuts[1]], whole[cuts[1] : cuts[2]], whole[cuts[2] :])


def common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items two sequences share from their beginning."""
    same = (a == b for a, b in zip(one, other, strict=False))
    return sum(1 for _ in takewhile(bool, same))
