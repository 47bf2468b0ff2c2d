"""Scores with which llama.cpp's sentencepiece tokenizer ("llama") builds the tokens that merges build.

llama.cpp has no merges there: of all neighbours whose texts together are a token, it joins the pair with the highest
score, the leftmost of equals. Scores that fall in the order of the merges make that byte-pair encoding, provided that
every pair of tokens that makes a token is among the merges; it is in tokenizers converted from sentencepiece.
"""

import heapq
from collections.abc import Mapping, Sequence


def scores_of_merges(tokens: Sequence[str], merges: Sequence[tuple[str, str]]) -> list[float]:
    """A score for each token: minus the rank of its first merge among tokens that merges make; the rest come last."""
    order: dict[str, int] = {}
    for left, right in merges:
        order.setdefault(left + right, len(order))
    last = len(order)
    return [-float(order.get(token, last)) for token in tokens]


def pairs_of_pieces(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, in the order in which sentencepiece joins them: highest score first."""
    pairs = [
        (-score, i, piece[:i], piece[i:])
        for piece, score in scores.items()
        for i in range(1, len(piece))
        if piece[:i] in scores and piece[i:] in scores
    ]
    return [(left, right) for _, _, left, right in sorted(pairs)]


def llama_tokens(text: str, ids: Mapping[str, int], scores: Sequence[float]) -> list[int] | None:
    """The ids that llama.cpp makes of `text` (spaces already U+2581); None where it needs a byte that is no token.

    Source: the algorithm of llama.cpp's llm_tokenizer_spm_session.
    """
    symbols: list[str] = list(text)
    after = [*range(1, len(text)), -1]
    before = list(range(-1, len(text) - 1))
    queue: list[tuple[float, int, int, str]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right >= 0 and (token := ids.get(symbols[left] + symbols[right])) is not None:
            heapq.heappush(queue, (-scores[token], left, right, symbols[left] + symbols[right]))

    for i in range(1, len(symbols)):
        offer(i - 1, i)
    while queue:
        _, left, right, joined = heapq.heappop(queue)
        if not symbols[left] or not symbols[right] or symbols[left] + symbols[right] != joined:
            continue
        symbols[left], symbols[right] = joined, ""
        after[left] = after[right]
        if after[right] >= 0:
            before[after[right]] = left
        offer(before[left], left)
        offer(left, after[left])
    found: list[int] = []
    for symbol in filter(None, symbols):
        names = [symbol] if symbol in ids else [f"<0x{byte:02X}>" for byte in symbol.encode("utf-8", "surrogatepass")]
        if any(name not in ids for name in names):
            return None
        found += [ids[name] for name in names]
    return found
