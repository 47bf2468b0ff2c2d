"""The engine's step: schedule, compute, choose tokens, and hand out what ended. One fault fails one request."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quantkit.errors import UserError
from quantkit.runtime.engine import sampling
from quantkit.runtime.engine.request import CompletionOutput, Request, RequestOutput, SamplingParams
from quantkit.runtime.engine.runner import Piece, Runner
from quantkit.runtime.engine.scheduler import Scheduled, Scheduler
from quantkit.runtime.engine.speculation import Drafter
from quantkit.runtime.engine.text import CONTEXT, check_end, decode

Prompt = str | Sequence[int] | Mapping[str, Any]


@dataclass
class EngineStats:
    """Counts since the engine was made. tokens: computed, of prompts and outputs; hits: found in the cache instead."""

    steps: int = 0
    tokens: int = 0
    generated: int = 0
    hits: int = 0
    preemptions: int = 0
    drafted: int = 0
    accepted: int = 0
    most_running: int = 0
    most_blocks: int = 0
    model_seconds: float = 0.0

    @property
    def acceptance(self) -> float | None:
        """The share of guesses that were right; None where there were none."""
        return self.accepted / self.drafted if self.drafted else None


class Engine:
    """Requests from `add` to the step that ends them.

    ends     tokens that end a sequence; longest: tokens of a prompt and its output together
    seed     of requests that have none; clock: seconds, for the times in a request's metrics
    drafter  where guesses come from, if any are made
    """

    def __init__(
        self, runner: Runner, scheduler: Scheduler, tokenizer: PreTrainedTokenizerBase | None, *, ends: set[int],
        longest: int, drafter: Drafter | None = None, seed: int = 0, clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        self.runner, self.scheduler, self.tokenizer, self.drafter = runner, scheduler, tokenizer, drafter
        self.ends, self.max_model_len, self.seed, self.clock = ends, longest, seed, clock
        self.vocabulary: int = runner.model.get_input_embeddings().num_embeddings  # type: ignore
        self.stats = EngineStats()
        self._requests: dict[str, Request] = {}
        self._refused: list[Request] = []
        self._added = 0

    def add(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        on_output: Callable[[RequestOutput], None] | None = None,
    ) -> str:
        """Queue a request and return its id. One that cannot run comes out of the next step with `error` set."""
        return self._add(prompt, params or SamplingParams(), priority=priority, on_output=on_output)

    def cancel(self, request_id: str) -> bool:
        """Stop a request and free what it holds; False where it has ended already or there is none."""
        request = self._requests.get(request_id)
        if request is None or (request.finish_reason is not None and request not in self._refused):
            return False
        del self._requests[request_id]
        if request in self._refused:
            self._refused.remove(request)
        else:
            self._end(request, "abort")
        return True

    @property
    def unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self._requests)

    def step(self) -> list[RequestOutput]:
        """Compute one batch of tokens; the outputs of requests that ended."""
        ended = [self._output(self._requests.pop(request.id)) for request in self._refused]
        self._refused.clear()
        if self.drafter is not None:
            for request in self.scheduler.running:
                decoding = request.computed == len(request.tokens) - 1
                self.drafter.want(request, request.limit - len(request.tokens) - 1 if decoding else 0)
        plan = self.scheduler.schedule()
        if not plan:
            return ended
        began = time.perf_counter()
        try:
            if self.drafter is not None:
                self.drafter.fill(plan)
            pieces = [self._piece(item) for item in plan]
            logits_RV = self.runner.run(pieces)
        except BaseException:  # what the step was to write into known blocks may not be there
            self.scheduler.blocks.forget()
            raise
        tokens = self._likeliest(plan, logits_RV)
        self._count(plan, time.perf_counter() - began)
        row = 0
        for item, piece in zip(plan, pieces, strict=True):
            rows = slice(row, row + piece.rows)
            row += piece.rows
            if item.request.finish_reason is not None:  # another one's callback has cancelled it
                continue
            ends = self._advance(item, logits_RV[rows], None if tokens is None else tokens[rows])
            if ends and self._requests.pop(item.request.id, None) is not None:
                ended.append(self._output(item.request))
        return ended

    def _add(
        self, prompt: Prompt, params: SamplingParams | None, *, priority: int = 0,
        on_output: Callable[[RequestOutput], None] | None = None,
        on_logits: Callable[[int, Tensor], None] | None = None,
    ) -> str:  # fmt: skip
        """params None: nothing is generated."""
        text, tokens = self._tokens(prompt)
        self._added += 1
        score = params is None
        params = SamplingParams() if params is None else params
        room = self.max_model_len if score or params.max_tokens is None else len(tokens) + params.max_tokens
        limit = len(tokens) if score else min(room, self.max_model_len)
        request = Request(
            str(self._added), tokens, len(tokens), limit, params, text, priority,
            on_logits=on_logits, on_output=on_output,
        )  # fmt: skip
        request.metrics.arrival_time = self.clock()
        request.decoded = max(0, len(tokens) - CONTEXT), len(tokens)
        if not params.greedy:
            request.generator = torch.Generator(self.runner.device)
            request.generator.manual_seed(self.seed + self._added if params.seed is None else params.seed)
        self._requests[request.id] = request
        request.error = self._fault(request, score)
        if request.error is None:
            self.scheduler.add(request)
        else:
            request.finish_reason = "error"
            self._refused.append(request)
        return request.id

    def _tokens(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            unknown = set(prompt) - {"prompt", "prompt_token_ids"}
            if unknown or not prompt:
                raise UserError(f"a prompt has {sorted(unknown)}; the engine takes prompt or prompt_token_ids")
            prompt = prompt.get("prompt_token_ids", prompt.get("prompt"))
        if not isinstance(prompt, str | Iterable):
            raise UserError(f"a prompt is {prompt!r}; expected a text or a list of token ids")
        if not isinstance(prompt, str):
            return None, [int(t) if isinstance(t, Integral) else t for t in prompt]  # type: ignore
        if self.tokenizer is None:
            raise UserError("this model came without a tokenizer\nhint: give lists of token ids, or tokenizer=")
        return prompt, self.tokenizer(prompt, verbose=False)["input_ids"]  # type: ignore[return-value]

    def _fault(self, request: Request, score: bool) -> str | None:
        """Why a request cannot run."""
        tokens, longest, blocks = request.tokens, self.max_model_len, self.scheduler.blocks
        bad = [t for t in tokens if not isinstance(t, int) or not 0 <= t < self.vocabulary]
        if not tokens:
            return "the prompt has no tokens"
        if bad:
            return f"token id {bad[0]!r} of the prompt is not one of the model's, 0 to {self.vocabulary - 1}"
        if len(tokens) + (not score) > longest:
            left = "" if score else ", and one is to come"
            return f"the prompt has {len(tokens)} tokens{left}; the model's context has {longest}"
        if "" in (request.params.stop or []):
            return "a stop string is empty"
        if request.params.stop and self.tokenizer is None:
            return "stop strings need a tokenizer, and the model came without one"
        if (needed := self.scheduler.most_blocks(request)) > blocks.blocks:
            return f"{request.limit} tokens need {needed} blocks of {blocks.block_size}; the cache has {blocks.blocks}"
        return None

    def _piece(self, item: Scheduled) -> Piece:
        request, stop = item.request, item.start + item.count - item.drafts
        del request.drafts[item.drafts :]
        rows = 1 + item.drafts if item.ends else 0
        if request.wants_prompt_logits and item.start < request.prompt_length:
            rows = item.count
        faithful = self.runner.exact or request.wants_prompt_logits
        whole = request.prompt_length if faithful and item.start < request.prompt_length else 0
        return Piece(request.tokens[item.start : stop] + request.drafts, item.start, request.blocks, rows, whole)

    def _likeliest(self, plan: list[Scheduled], logits_RV: Tensor) -> list[int] | None:
        """The likeliest token of each row where that is all that is asked for."""
        if any(item.ends and not sampling.plain(item.request) for item in plan):
            return None
        return logits_RV.argmax(-1).tolist()

    def _advance(self, item: Scheduled, logits_RV: Tensor, likeliest: list[int] | None) -> bool:
        """Take what the step computed for one request; whether it ended."""
        request = item.request
        request.computed = item.start + item.count - item.drafts
        try:
            if request.wants_prompt_logits and item.start < request.prompt_length:
                self._take_prompt(request, item.start, logits_RV)
                logits_RV = logits_RV[-1 - item.drafts :]
                likeliest = None if likeliest is None else likeliest[-1 - item.drafts :]
            if not item.ends:
                return False
            if request.limit == request.prompt_length:
                return self._end(request, "length")
            self._choose(item, logits_RV, likeliest)
            if request.finish_reason is not None:
                self.scheduler.finish(request)
            if request.on_output is not None:
                request.on_output(self._output(request))
        except Exception as problem:  # a user's callback, or parameters that do not fit these logits
            request.error = f"{type(problem).__name__}: {problem}"
            request.finish_reason = "error"
            if request in self.scheduler.running:
                self.scheduler.finish(request)
        return request.finish_reason is not None

    def _choose(self, item: Scheduled, logits_RV: Tensor, likeliest: list[int] | None) -> None:
        """Append the next token, and one more for each guess that is right."""
        request, params = item.request, item.request.params
        now = self.clock()
        request.metrics.first_token_time = request.metrics.first_token_time or now
        self.stats.drafted += item.drafts
        request.metrics.drafted += item.drafts
        forbidden = {*(() if params.ignore_eos else self.ends), *(params.stop_token_ids or [])}
        for row in range(item.drafts + 1):
            token = likeliest[row] if likeliest else sampling.next_token(logits_RV[row], request, forbidden)
            if params.logprobs is not None:
                request.logprobs += sampling.logprobs(logits_RV[row : row + 1], [token], params.logprobs, self._text)
            request.tokens.append(token)
            request.metrics.token_times.append(now)
            check_end(request, self.tokenizer, self.ends)
            if request.finish_reason is not None:
                request.metrics.finished_time = now
            right = row < item.drafts and token == request.drafts[row]
            request.computed += right
            request.metrics.accepted += right
            self.stats.accepted += right
            self.stats.generated += 1
            if request.finish_reason is not None or not right:
                break
        request.drafts = []
        request.drafts_wanted = 0

    def _take_prompt(self, request: Request, start: int, logits_RV: Tensor) -> None:
        """Logits of the prompt's tokens from `start` on, those that a preempted request computes again left out."""
        skip = request.prompt_rows - start
        rows_RV = logits_RV[max(skip, 0) : request.prompt_length - start]
        first = max(start, request.prompt_rows)
        if not len(rows_RV):
            return
        request.prompt_rows = first + len(rows_RV)
        if request.on_logits is not None:
            request.on_logits(first, rows_RV)
        if (count := request.params.prompt_logprobs) is not None:
            targets = request.tokens[first + 1 : min(first + 1 + len(rows_RV), request.prompt_length)]
            request.prompt_logprobs += sampling.logprobs(rows_RV[: len(targets)], targets, count, self._text)

    def _text(self, token: int) -> str | None:
        return None if self.tokenizer is None else str(self.tokenizer.decode([token]))

    def _end(self, request: Request, reason: Any) -> bool:
        request.finish_reason = reason
        request.metrics.finished_time = self.clock()
        self.scheduler.finish(request)
        return True

    def _output(self, request: Request) -> RequestOutput:
        finished = request.finish_reason is not None
        if finished and not (request.params.stop and isinstance(request.stop_reason, str)):
            decode(request, self.tokenizer, last=True)
        params, chosen = request.params, request.logprobs
        total = sum(next(iter(entry.values())).logprob for entry in chosen) if params.logprobs is not None else None
        listed = chosen if params.logprobs is not None else None
        completion = CompletionOutput(
            0, request.text, request.output, total, listed, request.finish_reason, request.stop_reason
        )
        return RequestOutput(
            request.id, request.prompt, request.tokens[: request.prompt_length],
            request.prompt_logprobs if params.prompt_logprobs is not None else None, [completion], finished,
            request.metrics, request.cached or 0, request.error,
        )  # fmt: skip

    def _count(self, plan: list[Scheduled], seconds: float) -> None:
        stats, scheduler = self.stats, self.scheduler
        stats.steps += 1
        stats.model_seconds += seconds
        stats.tokens += sum(item.count for item in plan)
        stats.hits, stats.preemptions = scheduler.hits, scheduler.preemptions
        stats.most_running = max(stats.most_running, len(scheduler.running))
        stats.most_blocks = max(stats.most_blocks, scheduler.blocks.blocks - scheduler.blocks.free)
