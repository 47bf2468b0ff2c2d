"""What a user asks for and gets, with vLLM's names and meanings for one output each, and a request on its way.

Differences from vLLM: a field that is not here is an error, and a faulty request gives an output with `error` set
instead of an exception, so that the others go on. No torch: the command checks its options by these.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, Self

from quantkit.errors import UserError

if TYPE_CHECKING:
    from torch import Generator, Tensor


KINDS = {"int": Integral, "float": Real, "bool": bool, "None": type(None), "str": str}  # of a field, by its annotation
KINDS |= {"list[str]": Sequence, "list[int]": Sequence}


class UnknownFieldError(UserError, TypeError):
    """An argument that does not exist here."""


@dataclass(slots=True)
class SamplingParams:
    """How tokens are chosen and when to stop; vLLM's defaults. UserError for values out of their range.

    max_tokens None: up to the model's context. temperature 0: the likeliest token. seed None: from the engine's.
    logprobs, prompt_logprobs: how many of the likeliest tokens are listed beside the token itself.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __new__(cls, *_: Any, **given: Any) -> Self:
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in given if name not in known]:
            raise UnknownFieldError(
                f"SamplingParams has no field {unknown[0]!r}: the paged engine does not do this\n"
                f"hint: it has {', '.join(known)}"
            )
        return object.__new__(cls)

    def __post_init__(self) -> None:
        for each in fields(self):
            value, kinds = getattr(self, each.name), tuple(KINDS[kind] for kind in str(each.type).split(" | "))
            if not isinstance(value, kinds):
                raise UserError(f"SamplingParams: {each.name} is {value!r}; expected {each.type}")
        self.stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        self.stop_token_ids = list(self.stop_token_ids or [])
        most = float("inf") if self.max_tokens is None else self.max_tokens
        for name, good, wanted in (
            ("n", self.n == 1, "1: a prompt has one output"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "-2 to 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "-2 to 2"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "more than 0"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0, at most 1"),
            ("top_k", self.top_k >= -1, "a number of tokens; 0 or -1 for all"),
            ("stop", all(isinstance(text, str) for text in self.stop), "texts"),
            ("stop_token_ids", all(isinstance(token, Integral) for token in self.stop_token_ids), "token ids"),
            ("seed", abs(self.seed or 0) < 2**63, "a number of 63 bits"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("max_tokens", most >= 1, "1 or more, or None"),
            ("min_tokens", 0 <= self.min_tokens <= most, "0 to max_tokens"),
            ("logprobs", (self.logprobs or 0) >= 0, "0 or more, or None"),
            ("prompt_logprobs", (self.prompt_logprobs or 0) >= 0, "0 or more, or None"),
        ):
            if not good:
                raise UserError(f"SamplingParams: {name} is {getattr(self, name)!r}; expected {wanted}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature < 1e-5

    @property
    def penalties(self) -> bool:
        """Whether tokens seen before are made less or more likely."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability (nats, before temperature and penalties) of a token, its rank from 1, and its text."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """What was generated. finish_reason: stop, length, abort, error; stop_reason: the stop string or token met."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: Literal["stop", "length", "abort", "error"] | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestMetrics:
    """Seconds of the engine's clock, token_times those of each token; drafted, accepted: guesses made, and right."""

    arrival_time: float = field(default_factory=time.perf_counter)
    first_token_time: float | None = None
    finished_time: float | None = None
    preemptions: int = 0
    drafted: int = 0
    accepted: int = 0
    token_times: list[float] = field(default_factory=list)


@dataclass
class RequestOutput:
    """A request's state. error: why it failed; num_cached_tokens: of the prompt, how many the cache held already."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int = 0
    error: str | None = None


@dataclass(eq=False)
class Request:
    """One sequence in the engine.

    tokens      the prompt and what was generated; computed: how many of them lie in the cache
    limit       tokens at which it ends
    drafts      guesses at the tokens behind them; drafts_wanted: how many the next step may verify
    turn        place in the queue; digests, registered: of its full blocks
    on_logits   called with (position of the first row, logits [rows, V] of the prompt) in chunks
    on_output   called with a RequestOutput at each step that gave tokens
    """

    id: str
    tokens: list[int]
    prompt_length: int
    limit: int
    params: SamplingParams
    prompt: str | None = None
    priority: int = 0
    generator: Generator | None = None
    on_logits: Callable[[int, Tensor], None] | None = None
    on_output: Callable[[RequestOutput], None] | None = None
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    turn: tuple[int, int] = (0, 0)
    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    registered: int = 0
    computed: int = 0
    drafted: int = 0  # how many tokens lie in the draft model's cache
    cached: int | None = None
    drafts: list[int] = field(default_factory=list)
    drafts_wanted: int = 0
    prompt_rows: int = 0  # how many of the prompt's logits were handed out
    text: str = ""
    decoded: tuple[int, int] = (0, 0)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] = field(default_factory=lambda: [None])
    finish_reason: Literal["stop", "length", "abort", "error"] | None = None
    stop_reason: int | str | None = None
    error: str | None = None

    @property
    def output(self) -> list[int]:
        """The generated tokens."""
        return self.tokens[self.prompt_length :]

    @property
    def wants_prompt_logits(self) -> bool:
        """Whether logits of the prompt are asked for, so that all of it must be computed."""
        return self.params.prompt_logprobs is not None or self.on_logits is not None
