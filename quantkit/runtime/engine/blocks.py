"""Blocks of the paged cache: who holds which, and which of them hold tokens that another request can share.

A block is `block_size` consecutive tokens of a sequence. A full block is known by a digest of its tokens and of all
before them (blake2b, chained), and its tokens are compared as well. Shared blocks are full and never written again, so
nothing is ever copied. A block that nobody holds stays known until it is needed for something else, the one unused
for longest first.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from quantkit.runtime.engine.request import Request


class BlockManager:
    """The blocks 0 .. blocks - 1 of a cache.

    watermark  blocks that stay free when a request is admitted beside running ones, for these to grow into
    """

    def __init__(self, blocks: int, block_size: int, *, prefix_caching: bool = True, watermark: int | None = None):
        self.blocks, self.block_size, self.prefix_caching = blocks, block_size, prefix_caching
        self.watermark = max(1, blocks // 100) if watermark is None else watermark
        self.references = [0] * blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))  # the next to be taken first
        self._known: dict[bytes, int] = {}
        self._contents: dict[int, tuple[bytes, tuple[int, ...]]] = {}

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def needed(self, tokens: int) -> int:
        """Blocks for so many tokens."""
        return -(-tokens // self.block_size)

    def match(self, request: Request) -> list[int]:
        """The known blocks that begin with the request's tokens; at least one token is left to compute."""
        found: list[int] = []
        if not self.prefix_caching or request.wants_prompt_logits:
            return found
        for index in range((len(request.tokens) - 1) // self.block_size):
            tokens = self._tokens(request, index)
            block = self._known.get(self._digest(request, index))
            if block is None or self._contents[block][1] != tokens:
                break
            found.append(block)
        return found

    def admit(self, request: Request, blocks: Sequence[int]) -> bool:
        """Give the request the known `blocks`, and new ones for its other tokens; False where too few are free."""
        needed = self.needed(len(request.tokens)) - len(blocks)
        idle = sum(self.references[block] == 0 for block in blocks)
        spare = self.watermark if self.free < self.blocks else 0
        if self.free - idle - needed < spare:
            return False
        for block in blocks:
            self.references[block] += 1
            self._free.pop(block, None)
        request.blocks = [*blocks, *self._take(needed)]
        request.computed = request.drafted = len(blocks) * self.block_size
        request.registered = len(blocks)
        return True

    def grow(self, request: Request, tokens: int) -> bool:
        """Blocks for the request's first `tokens` tokens; False, and nothing changed, where there are too few."""
        more = self.needed(tokens) - len(request.blocks)
        if more > self.free:
            return False
        if more > 0:
            request.blocks += self._take(more)
        return True

    def register(self, request: Request, tokens: int) -> None:
        """Make the full blocks of the request's first `tokens` tokens known: they hold them after this step."""
        if not self.prefix_caching:
            return
        for index in range(request.registered, tokens // self.block_size):
            digest, block = self._digest(request, index), request.blocks[index]
            if digest not in self._known:
                self._known[digest] = block
                self._contents[block] = digest, self._tokens(request, index)
            request.registered = index + 1

    def release(self, request: Request) -> None:
        """Take all blocks from the request; known ones can still be found, the first of a sequence for longest."""
        for block in reversed(request.blocks):
            self.references[block] -= 1
            if self.references[block] == 0:
                self._free[block] = None
                if block not in self._contents:
                    self._free.move_to_end(block, last=False)
        request.blocks, request.computed, request.registered = [], 0, 0

    def forget(self) -> None:
        """No block is known any more: what a failed step was to write is not there."""
        self._known.clear()
        self._contents.clear()

    def check(self, requests: Iterable[Request]) -> None:
        """AssertionError unless every block is free or held by exactly these requests, and shared ones are full."""
        held = [0] * self.blocks
        for request in requests:
            assert len(set(request.blocks)) == len(request.blocks), f"{request.id} holds a block twice"
            for index, block in enumerate(request.blocks):
                held[block] += 1
                assert held[block] == 1 or index < request.registered, f"block {block} is shared and not full"
            assert request.computed <= len(request.blocks) * self.block_size, f"{request.id} lacks blocks"
        assert held == self.references, "references do not match what requests hold"
        assert {block for block, count in enumerate(held) if count == 0} == set(self._free), "a block is lost"
        assert {digest: block for block, (digest, _) in self._contents.items()} == self._known

    def _take(self, count: int) -> list[int]:
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self.references[block] = 1
            if block in self._contents:
                del self._known[self._contents.pop(block)[0]]
        return taken

    def _tokens(self, request: Request, index: int) -> tuple[int, ...]:
        return tuple(request.tokens[index * self.block_size : (index + 1) * self.block_size])

    def _digest(self, request: Request, index: int) -> bytes:
        """Of the request's full block `index` and all before it; computed once."""
        while len(request.digests) <= index:
            before = request.digests[-1] if request.digests else b""
            tokens = self._tokens(request, len(request.digests))
            request.digests.append(blake2b(before + repr(tokens).encode(), digest_size=16).digest())
        return request.digests[index]
