"""The next token of each sequence, from its logits, as vLLM's SamplingParams say.

The order is vLLM's: tokens that would end a sequence too early are ruled out, then come the penalties, the temperature,
min_p, top_k and top_p. Log-probabilities are those of the untouched logits.

Guesses are verified by choosing every token as if there were none: a guess is right where it is the token chosen. So
speculation changes neither greedy output nor the distribution of sampled output, nor, with a seed, a single token.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from quantkit.runtime.engine.request import Logprob, Request, SamplingParams


def plain(request: Request) -> bool:
    """Whether the likeliest token of the untouched logits is the next one."""
    params = request.params
    early = len(request.tokens) - request.prompt_length < params.min_tokens
    return params.greedy and not params.penalties and not early


def next_token(logits_V: Tensor, request: Request, ends: Collection[int]) -> int:
    """The token behind request.tokens, drawn from logits float32 [V]. ends: tokens that would end the sequence."""
    params = request.params
    logits_V = adjusted(logits_V, request, ends)
    if params.greedy:
        return int(logits_V.argmax())
    return int(torch.multinomial(probabilities(logits_V, params), 1, generator=request.generator))


def adjusted(logits_V: Tensor, request: Request, ends: Collection[int]) -> Tensor:
    """Logits with early ends ruled out, and penalties taken from tokens that were seen."""
    params, output = request.params, request.output
    if len(output) < params.min_tokens and ends:
        logits_V = logits_V.index_fill(0, torch.tensor(sorted(ends), device=logits_V.device), -torch.inf)
    if not params.penalties:
        return logits_V
    V = len(logits_V)
    if params.repetition_penalty != 1:
        seen = torch.tensor(request.tokens, device=logits_V.device)
        penalty = torch.ones_like(logits_V).index_fill_(0, seen, params.repetition_penalty)
        logits_V = torch.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
    counts = torch.bincount(torch.tensor(output, dtype=torch.int64, device=logits_V.device), minlength=V)
    return logits_V - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)


def probabilities(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """What is drawn from, float32 [V]; not greedy."""
    logits_V = logits_V / params.temperature
    if params.min_p > 0:
        # p < min_p * max p, on logits
        least = logits_V.max() + torch.log(torch.tensor(params.min_p))
        logits_V = logits_V.masked_fill(logits_V < least, -torch.inf)
    if 0 < params.top_k < len(logits_V):
        kth = logits_V.topk(params.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < kth, -torch.inf)
    shares = torch.softmax(logits_V, -1)
    if params.top_p < 1:
        ranked, order = shares.sort(descending=True, stable=True)
        beyond = ranked.cumsum(-1) - ranked >= params.top_p  # the likeliest always stays
        shares = shares.index_fill(0, order[beyond], 0.0)
    return shares


def logprobs(
    logits_RV: Tensor, tokens: Sequence[int], count: int, text: Callable[[int], str | None] = lambda token: None
) -> list[dict[int, Logprob]]:
    """For each row the `count` likeliest tokens and `tokens[row]`, by token, that of the row first; text: its text."""
    shares = torch.log_softmax(logits_RV, -1)
    chosen = torch.tensor(tokens, dtype=torch.int64, device=shares.device)[:, None]
    own = shares.gather(-1, chosen)
    ranks = (shares > own).sum(-1).add(1).tolist()
    top = shares.topk(min(count, shares.shape[-1]), -1) if count else None
    found = []
    for row, token in enumerate(tokens):
        entry = {token: Logprob(own[row].item(), ranks[row], text(token))}
        if top is not None:
            ranked = zip(top.indices[row].tolist(), top.values[row].tolist(), strict=True)
            for rank, (other, value) in enumerate(ranked, 1):
                entry.setdefault(other, Logprob(value, rank, text(other)))
        found.append(entry)
    return found
