"""How surprised a causal language model is by a text: windows of tokens, and the loss of every token in them.

Windowing: the text is tokenized once with no special tokens added and cut into consecutive windows of T tokens; a last
window that is not full is dropped. Position t of a window predicts token t + 1, so a window gives P = T - 1 losses.
Where the model expects a begin-of-sequence token each window is that and T - 1 tokens of the text: again P losses, of
tokens of the text alone.

Shapes: W = windows, B = windows of one batch, T = tokens of a window, P = T - 1, R = rows of a chunk, V = vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from quantkit.errors import UserError
from quantkit_eval.texts import Text

CHUNK_BYTES = 64 << 20  # of float32 log-probabilities at a time


@dataclass(frozen=True, slots=True)
class Windows:
    """ids_WT int64 [W, T], and how many bytes of UTF-8 a token of the text stands for on average."""

    ids_WT: Tensor
    bytes_per_token: float

    @property
    def predicted(self) -> int:
        """How many tokens get a loss."""
        W, T = self.ids_WT.shape
        return W * (T - 1)


def cut(text: Text, tokenizer: Any, context: int, max_tokens: int | None = None, *, bos: int | None = None) -> Windows:
    """Cut `text` (its first `max_tokens` tokens) into windows of `context` tokens.

    bos: this token begins each window, before context - 1 tokens of the text; None: windows hold text alone.
    UserError when there are fewer than two windows: one window has no confidence interval.
    """
    if context < 2:
        raise UserError(f"context must be at least 2 tokens, got {context}")
    offsets = bool(getattr(tokenizer, "is_fast", False))
    # verbose=False: the warning about texts longer than the model's context is not about us, we cut them
    encoded = tokenizer(text.content, add_special_tokens=False, return_offsets_mapping=offsets, verbose=False)
    ids, size = encoded["input_ids"], context if bos is None else context - 1
    limit = len(ids) if max_tokens is None else min(len(ids), max_tokens)
    used = limit - limit % size
    if used < 2 * size:
        raise UserError(
            f"{text.name}: too short: {limit} tokens, but two windows of {context} need {2 * size}\n"
            "hint: give more text or a smaller context"
        )
    tokens, covered = len(ids), text.content
    if offsets:  # count the bytes of what is used only; without offsets the whole text stands for it
        tokens, covered = used, text.content[: encoded["offset_mapping"][used - 1][1]]
    ids_WT = torch.tensor(ids[:used], dtype=torch.int64).view(-1, size)
    if bos is not None:
        ids_WT = torch.cat([ids_WT.new_full((len(ids_WT), 1), bos), ids_WT], dim=1)
    return Windows(ids_WT, len(covered.encode()) / tokens)


def token_losses(logits_BTV: Tensor, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats of every token but each window's first, and whether it was the likeliest one.

    Returns float32 [B, P] and bool [B, P] on the logits' device; the log-softmax is taken in float32, chunk by chunk.
    """
    B, T, _ = logits_BTV.shape
    losses_N, right_N = [], []
    for b, rows in chunks(logits_BTV):
        logits_RV, targets_R = logits_BTV[b, rows].float(), ids_BT[b, 1:][rows]
        losses_N.append(functional.cross_entropy(logits_RV, targets_R, reduction="none"))
        right_N.append(logits_RV.argmax(-1) == targets_R)
    return torch.cat(losses_N).view(B, T - 1), torch.cat(right_N).view(B, T - 1)


def chunks(logits_BTV: Tensor) -> list[tuple[int, slice]]:
    """(window, positions) pieces which cover all predicting positions in order, of CHUNK_BYTES float32 at most."""
    B, T, V = logits_BTV.shape
    step = max(1, CHUNK_BYTES // (4 * V))
    return [(b, slice(start, min(start + step, T - 1))) for b in range(B) for start in range(0, T - 1, step)]
