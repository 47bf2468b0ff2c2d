"""Text that a model generates from one prompt, or in the turns of a chat, as it comes."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from quantkit.errors import RunError, UserError
from quantkit.runtime.engine.llm import LLM
from quantkit.runtime.engine.request import RequestOutput, SamplingParams


@dataclass(frozen=True, slots=True)
class Generation:
    """What was generated from one prompt, and how fast.

    finish_reason   stop, length or abort; stop_reason: the stop string or token that was met
    cached_tokens   of the prompt, how many the cache held already
    first_seconds   from the request to its first token; seconds: to its last
    tokens_per_second  of the tokens behind the first; of all where they came in one step
    drafted, accepted  guesses made, and right; acceptance: their share, None where there were none
    """

    prompt: str
    prompt_tokens: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None
    cached_tokens: int
    first_seconds: float
    seconds: float
    tokens_per_second: float
    drafted: int
    accepted: int
    acceptance: float | None

    @classmethod
    def of(cls, prompt: str, output: RequestOutput) -> "Generation":
        """Of a request that has ended, or was stopped."""
        made, m = output.outputs[0], output.metrics
        times = [time - m.arrival_time for time in m.token_times]
        first, last = (times[0], times[-1]) if times else (0.0, 0.0)
        rate = (len(times) - 1) / (last - first) if last > first else len(times) / last if last else 0.0
        return cls(
            prompt, len(output.prompt_token_ids), made.text, made.token_ids, made.finish_reason, made.stop_reason,
            output.num_cached_tokens, first, last, rate, m.drafted, m.accepted,
            m.accepted / m.drafted if m.drafted else None,
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)

    def summary(self) -> str:
        """One line: tokens, time, speed and how many guesses were right."""
        count = len(self.token_ids)
        drafted = "" if self.acceptance is None else f", {self.acceptance:.0%} of {self.drafted} guesses accepted"
        return (
            f"{count} token{'' if count == 1 else 's'} in {self.seconds:.2f} s, {self.tokens_per_second:.1f} tokens/s"
            f" (prompt of {self.prompt_tokens}, first token after {self.first_seconds:.2f} s){drafted}"
        )


class Writer:
    """Prompts into text, one at a time."""

    def __init__(self, llm: LLM, params: SamplingParams) -> None:
        if llm.tokenizer is None:
            raise UserError(
                "this model has no tokenizer, and text needs one\nhint: copy the original's tokenizer files"
            )
        self.llm, self.params, self.tokenizer = llm, params, llm.tokenizer
        self._last: tuple[str, RequestOutput] | None = None
        self._turns: list[dict[str, str]] = []

    @property
    def last(self) -> Generation | None:
        """What came of the last prompt, also where it was stopped midway; None where nothing did."""
        return None if self._last is None else Generation.of(*self._last)

    def write(self, prompt: str) -> Iterator[str]:
        """The text behind `prompt`, piece by piece. Closing it stops the request. UserError for a refused prompt."""
        yield from self._stream(prompt, prompt)

    def answer(self, message: str) -> Iterator[str]:
        """The answer to a message of a chat, which goes on with each."""
        self._turns.append({"role": "user", "content": message})
        try:
            tokens = self.tokenizer.apply_chat_template(self._turns, add_generation_prompt=True, return_dict=False)
        except Exception as problem:  # templates are programs, and raise what they like
            raise UserError(f"the model's chat template refuses this chat: {problem}") from problem
        yield from self._stream(message, tokens)
        assert self._last is not None
        self._turns.append({"role": "assistant", "content": self._last[1].outputs[0].text})

    def _stream(self, prompt: str, given: Any) -> Iterator[str]:
        # a stop string may come in several tokens: its beginning must not be shown
        held = max((len(stop) for stop in self.params.stop or []), default=1) - 1
        self._last, shown = None, 0
        with closing(self.llm.stream(given, self.params)) as outputs:  # type: ignore[type-var]
            for output in outputs:
                if output.error is not None:
                    raise (RunError if output.outputs[0].token_ids else UserError)(output.error)
                self._last, text = (prompt, output), output.outputs[0].text
                ready = len(text) - (0 if output.finished else held)
                if ready > shown:
                    yield text[shown:ready]
                    shown = ready
