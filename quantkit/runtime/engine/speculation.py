"""Guesses at a sequence's next tokens, which the model then verifies all in one step."""

from collections.abc import Sequence
from typing import Protocol

from quantkit.runtime.engine.request import Request
from quantkit.runtime.engine.runner import Piece, Runner
from quantkit.runtime.engine.scheduler import Scheduled


class Drafter(Protocol):
    """Where guesses come from."""

    def want(self, request: Request, most: int) -> None:
        """Set `drafts_wanted` of a request that is about to be scheduled, `most` at most."""
        ...

    def fill(self, plan: Sequence[Scheduled]) -> None:
        """Set `drafts` of the planned requests, at least as many as were planned."""
        ...


class PromptLookup:
    """The tokens that followed the last few tokens where these last stood before (n-gram prompt lookup).

    longest, shortest: tokens looked for, longer runs first; depth: tokens guessed
    """

    def __init__(self, depth: int = 4, longest: int = 3, shortest: int = 1) -> None:
        self.depth, self.longest, self.shortest = depth, longest, shortest

    def want(self, request: Request, most: int) -> None:
        request.drafts = self._find(request.tokens)[: max(0, min(most, self.depth))]
        request.drafts_wanted = len(request.drafts)

    def fill(self, plan: Sequence[Scheduled]) -> None:
        pass

    def _find(self, tokens: list[int]) -> list[int]:
        for size in range(min(self.longest, len(tokens) - 1), self.shortest - 1, -1):
            end = tokens[-size:]
            last = end[-1]
            for at in range(len(tokens) - 2, size - 2, -1):
                if tokens[at] == last and tokens[at - size + 1 : at + 1] == end:
                    return tokens[at + 1 : at + 1 + self.depth]
        return []


class DraftModel:
    """The likeliest tokens by a smaller or quantized model, whose own cache lies in blocks of the same numbers.

    It computes every token that the model does, in the same step, so that shared blocks hold both models' entries.
    """

    def __init__(self, runner: Runner, depth: int = 4) -> None:
        self.runner, self.depth = runner, depth

    def want(self, request: Request, most: int) -> None:
        request.drafts = []
        request.drafts_wanted = max(0, min(most, self.depth))

    def fill(self, plan: Sequence[Scheduled]) -> None:
        pieces, drafting = [], []
        for item in plan:
            request = item.request
            known = item.start + item.count - item.drafts
            start = min(request.drafted, item.start)
            pieces.append(Piece(request.tokens[start:known], start, request.blocks, 1))
            request.drafted = known + max(item.drafts - 1, 0)
            if item.drafts:
                drafting.append((len(pieces) - 1, item))
        chosen = self.runner.run(pieces).argmax(-1).tolist()
        for index, item in drafting:
            item.request.drafts = [chosen[index]]
        for depth in range(1, max((item.drafts for item in plan), default=0)):
            going = [item for item in plan if item.drafts > depth]
            pieces = []
            for item in going:
                known = item.start + item.count - item.drafts
                pieces.append(Piece(item.request.drafts[-1:], known + depth - 1, item.request.blocks, 1))
            for item, token in zip(going, self.runner.run(pieces).argmax(-1).tolist(), strict=True):
                item.request.drafts.append(token)
