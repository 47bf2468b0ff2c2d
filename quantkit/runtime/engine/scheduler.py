"""Which tokens of which requests the next step computes. No tensors: plain lists, the same for the same requests.

A step has one budget of tokens. Running requests come first, oldest first: each its next token and its drafts, or the
next chunk of its prompt. Where no block is left for one, the newest running request is preempted: it gives its blocks
up and later computes its tokens again. What is left of the budget admits waiting requests in their order.

The order is that of arrival. A priority of p (lower is sooner) moves a request behind those that arrive in the next
p * PATIENCE steps, and no further: nobody waits for ever.
"""

from bisect import insort
from dataclasses import dataclass

from quantkit.runtime.engine.blocks import BlockManager
from quantkit.runtime.engine.request import Request

PATIENCE = 1000


@dataclass(frozen=True, slots=True)
class Scheduled:
    """The request's tokens start .. start + count - 1 are computed, the last `drafts` of which are guesses."""

    request: Request
    start: int
    count: int
    drafts: int

    @property
    def ends(self) -> bool:
        """Whether the step computes the request's last known token, so that the next one can be chosen."""
        return self.start + self.count - self.drafts == len(self.request.tokens)


class Scheduler:
    """Requests from `add` until `finish`.

    max_num_seqs            requests that run at a time
    max_num_batched_tokens  tokens of a step
    """

    def __init__(self, blocks: BlockManager, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.blocks, self.max_num_seqs, self.budget = blocks, max_num_seqs, max_num_batched_tokens
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.steps = self.preemptions = self.hits = self._arrivals = 0

    def add(self, request: Request) -> None:
        """Queue a request; `most_blocks` says beforehand whether it fits at all."""
        self._arrivals += 1
        request.turn = self.steps + request.priority * PATIENCE, self._arrivals
        insort(self.waiting, request, key=_turn)

    def most_blocks(self, request: Request) -> int:
        """Blocks the request holds in the end. Its last token is chosen and never computed."""
        return self.blocks.needed(max(request.prompt_length, request.limit - 1))

    def schedule(self) -> list[Scheduled]:
        """The next step's work, with blocks for all of it; empty only where nobody waits or runs."""
        self.steps += 1
        budget, preempted = self.budget, self.preemptions
        plan: list[Scheduled] = []
        position = 0
        while position < len(self.running) and budget:
            request = self.running[position]
            drafts = request.drafts_wanted
            count = min(len(request.tokens) + drafts - request.computed, budget)
            drafts = max(0, request.computed + count - len(request.tokens))
            while not self.blocks.grow(request, request.computed + count):
                if drafts:  # nobody is preempted for a guess
                    count, drafts = count - drafts, 0
                    continue
                victim = self.running.pop()
                self._preempt(victim)
                if victim is request:
                    break
            else:
                plan.append(self._planned(request, count, drafts))
                budget -= count
                position += 1
        while self.waiting and budget and len(self.running) < self.max_num_seqs and preempted == self.preemptions:
            request = self.waiting[0]
            if not self.blocks.admit(request, self.blocks.match(request)):
                break
            self.hits += request.computed
            request.cached = request.computed if request.cached is None else request.cached
            insort(self.running, self.waiting.pop(0), key=_turn)
            count = min(len(request.tokens) - request.computed, budget)
            plan.append(self._planned(request, count, 0))
            budget -= count
        return plan

    def finish(self, request: Request) -> None:
        """Forget a request, whether it waits or runs, and free its blocks."""
        queue = self.running if request in self.running else self.waiting
        queue.remove(request)
        self.blocks.release(request)

    def check(self) -> None:
        """AssertionError where a block is lost or held wrongly, or where the queues are not in order."""
        self.blocks.check([*self.running, *self.waiting])
        assert all(not request.blocks for request in self.waiting), "a waiting request holds blocks"
        assert len(self.running) <= self.max_num_seqs
        for queue in (self.running, self.waiting):
            assert queue == sorted(queue, key=_turn)

    def _planned(self, request: Request, count: int, drafts: int) -> Scheduled:
        planned = Scheduled(request, request.computed, count, drafts)
        self.blocks.register(request, min(planned.start + count, len(request.tokens)))
        return planned

    def _preempt(self, request: Request) -> None:
        self.preemptions += 1
        self.blocks.release(request)
        insort(self.waiting, request, key=_turn)


def _turn(request: Request) -> tuple[int, int]:
    return request.turn
