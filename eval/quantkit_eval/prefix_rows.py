"""Rows of a batch that hold several token lists at once: what lists have in common at their start is computed once.

A row is a prefix tree, written from its root on: the first list whole, of each further one what the list before it
lacks. A token sees the tokens of its own list alone, by a mask, and stands at the position it has there. So a
multiple-choice question costs its context once, whatever the number of choices (tree attention as in SpecInfer, Miao et
al. 2023, section 4).

Shapes: B = rows, T = tokens of the longest row, K = positions whose logits are asked for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ROW_TOKENS = 1024  # a row grows to so many tokens, or to twice its first list: attention costs their square


@dataclass(frozen=True, slots=True)
class Continuation:
    """Tokens to be scored behind a context: the last `scored` of `tokens`, each predicted by those before it."""

    tokens: list[int]
    scored: int

    @property
    def inputs(self) -> list[int]:
        """What the model reads: all but the last."""
        return self.tokens[:-1]

    @property
    def targets(self) -> list[int]:
        """What it is to predict."""
        return self.tokens[-self.scored :]


@dataclass(slots=True)
class Row:
    """Token lists that share their beginnings. ids, depths: of each token itself and its position in its own lists.

    paths    of each list, int64: where its tokens lie in the row
    members  of each list, whose it is: numbers of the caller
    """

    ids: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    paths: list[NDArray[np.int64]] = field(default_factory=list)
    members: list[list[int]] = field(default_factory=list)

    @property
    def branches(self) -> bool:
        """Whether a mask is needed: more than one list, and not all of them beginnings of the last."""
        return any(len(path) and path[-1] != len(path) - 1 for path in self.paths)

    def add(self, tokens: list[int], shared: int, member: int) -> None:
        """Append a list that has its first `shared` tokens in common with the one that was added last."""
        fresh = np.arange(len(self.ids), len(self.ids) + len(tokens) - shared)
        before = self.paths[-1][:shared] if self.paths else fresh[:0]
        self.paths.append(np.concatenate([before, fresh]))
        self.members.append([member])
        self.ids += tokens[shared:]
        self.depths += range(shared, len(tokens))

    def sees(self) -> NDArray[np.bool_]:
        """bool [T, T] of the row's own length: which tokens (columns) each token attends to."""
        T = len(self.ids)
        seen_TT = np.eye(T, dtype=bool)
        done = 0
        for path in self.paths:
            start = int(np.searchsorted(path, done))  # later tokens of the path are new
            fresh = path[start:]
            if len(fresh):
                seen_TT[fresh[:, None], path[None, :start]] = True
                seen_TT[fresh[0] : fresh[-1] + 1, fresh[0] : fresh[-1] + 1] = np.tri(len(fresh), dtype=bool)
                done = int(fresh[-1]) + 1
        return seen_TT


def pack(requests: Sequence[Continuation], *, longest: int | None) -> list[Row]:
    """Rows that hold every request, the longest first; equal inputs are computed once.

    Requests come together that share a context, or half of their tokens or more. longest: requests of more input
    tokens than this lie in rows of their own, and so do all where it is 0; None: no limit.
    """
    order = sorted(range(len(requests)), key=lambda i: requests[i].tokens)
    rows: list[Row] = []
    last: Continuation | None = None
    for i in order:
        request = requests[i]
        tokens = request.inputs
        shared = 0 if last is None else _shared(last.inputs, tokens)
        if last is not None and shared == len(tokens) == len(last.inputs):
            rows[-1].members[-1].append(i)
            continue
        if last is None or not _together(last, request, shared, rows[-1], longest):
            rows.append(Row())
            shared = 0
        rows[-1].add(tokens, shared, i)
        last = request
    return sorted(rows, key=lambda row: -len(row.ids))


def _together(last: Continuation, request: Continuation, shared: int, row: Row, longest: int | None) -> bool:
    """Whether a request may follow `last` in its row, with `shared` tokens in common."""
    size = len(request.inputs)
    context = min(len(each.tokens) - each.scored for each in (last, request))
    alike = shared > 0 and (shared >= context or 2 * shared >= size)
    fits = len(row.ids) + size - shared <= max(ROW_TOKENS, 2 * len(row.paths[0]))
    return alike and fits and (longest is None or max(size, len(last.inputs)) <= longest)


def _shared(one: list[int], other: list[int]) -> int:
    """How many tokens both lists begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def batches(rows: Sequence[Row], size: int, tokens: int | None) -> Iterator[list[Row]]:
    """Consecutive rows, at most `size` of them and, padded to their longest, at most `tokens` (None: any number).

    Rows with and without branches lie in batches of their own: those without need no mask.
    """
    for kind in (True, False):
        batch: list[Row] = []
        for row in (row for row in rows if row.branches is kind):
            longest = max([len(row.ids), *(len(other.ids) for other in batch)])
            if batch and (len(batch) == size or (tokens is not None and (len(batch) + 1) * longest > tokens)):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch


def model_inputs(rows: Sequence[Row], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Arguments of a model of transformers: input_ids int64 [B, T] padded at the right with zeros, and where a row
    branches position_ids int64 [B, T] and attention_mask [B, 1, T, T] of `dtype`, which is added to the scores.
    """
    B, T = len(rows), max(len(row.ids) for row in rows)
    ids_BT = torch.zeros(B, T, dtype=torch.int64)
    for b, row in enumerate(rows):
        ids_BT[b, : len(row.ids)] = torch.tensor(row.ids)
    if not any(row.branches for row in rows):
        return {"input_ids": ids_BT.to(device)}
    positions_BT = torch.zeros(B, T, dtype=torch.int64)
    seen_BTT = np.zeros((B, T, T), dtype=bool)
    seen_BTT[:, np.arange(T), np.arange(T)] = True  # padding sees itself: a row of nothing would be NaN
    for b, row in enumerate(rows):
        positions_BT[b, : len(row.ids)] = torch.tensor(row.depths)
        seen_BTT[b, : len(row.ids), : len(row.ids)] = row.sees()
    hidden = torch.zeros(B, 1, T, T, dtype=dtype)
    hidden.masked_fill_(~torch.from_numpy(seen_BTT)[:, None], torch.finfo(dtype).min)
    return {
        "input_ids": ids_BT.to(device),
        "position_ids": positions_BT.to(device),
        "attention_mask": hidden.to(device),
    }
