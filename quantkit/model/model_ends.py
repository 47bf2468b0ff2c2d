"""What surrounds a model's blocks, run alone: from token ids to the first block, from the last block to the logits.

Shapes: B = sequences, T = tokens of one, at most as many as the model has positions, H = hidden size, V = vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quantkit.errors import RunError, UserError
from quantkit.model.streamed_model import (
    RETURNS,
    BlockCall,
    Stop,
    StreamedModel,
    check_finite,
    read_param,
    set_param,
    unchanged,
)

HEAD_BYTES = 64 << 20  # of the head's weight, as stored, that are read at a time


class _AtHead(TorchFunctionMode):
    """Hands each input of the product with the head's weight to `answer`, whose result stands for the product."""

    def __init__(self, weight: Tensor | None, answer: Callable[[Tensor, Tensor | None], Tensor]) -> None:
        super().__init__()
        self.weight, self.answer = weight, answer

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.linear and len(args) > 1 and args[1] is self.weight:
            return self.answer(args[0], args[2] if len(args) > 2 else kwargs.get("bias"))
        return func(*args, **kwargs)


def model_ends(streamed: StreamedModel, ids: Tensor) -> tuple[Tensor, Tensor] | None:
    """What enters block 0 and, did the blocks change nothing, the head: both [..., hidden], for ids [batch, seq].

    None where the head is not a linear of those states.
    """
    seen: list[Tensor] = []

    def keep(x: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(x)
        raise Stop

    for answer in RETURNS:
        record: list[tuple[int, Tensor, BlockCall]] = []
        seen.clear()
        _run(streamed, ids, record, answer, keep)
        hidden = [entry[1] for entry in record]
        if seen and len(record) == len(streamed.blocks) and all(unchanged(h, hidden[0]) for h in hidden):
            return hidden[0], seen[0]
    return None


@dataclass(frozen=True, slots=True)
class Head:
    """Another head in place of the checkpoint's.

    rows  its rows [n, H] for an index (int64 [n]); turn: what it reads [..., H], from what the checkpoint's would read
    """

    rows: Callable[[Tensor], Tensor]
    turn: Callable[[Tensor], Tensor] = lambda x: x


def logits(streamed: StreamedModel, hidden_BTH: Tensor, head: Head | None = None) -> Tensor | None:
    """The logits [B, T, V] for states [B, T, H] that leave the last block: final norm, head, and what follows it.

    The head's rows are read from the checkpoint, or `head`, a part at a time. None where the head is not a linear that
    reads one whole tensor of the checkpoint. The states are those of the model as it is stored, not of one rewritten.
    """
    streamed.fill_surroundings()
    module = streamed.model.get_output_embeddings()
    name = head_tensor(streamed)
    if name is None or module is None:
        return None
    path = next(path for path, other in streamed.model.named_modules() if other is module)
    if isinstance(bias := getattr(module, "bias", None), nn.Parameter) and bias.is_meta:
        stored = read_param(streamed.checkpoint, streamed.sources[f"{path}.bias"], bias.shape, streamed.dtype)
        set_param(module, "bias", stored.to(streamed.device))

    def product(x: Tensor, bias: Tensor | None) -> Tensor:
        info = streamed.checkpoint.info(name)
        x = x if head is None else head.turn(x).to(x)
        step = max(1, HEAD_BYTES // max(1, info.nbytes // info.shape[0]))
        parts = []
        for start in range(0, info.shape[0], step):
            index = torch.arange(start, min(start + step, info.shape[0]))
            rows = streamed.checkpoint.rows(name, index) if head is None else head.rows(index)
            check_finite(rows, name)
            parts.append(nn.functional.linear(x, rows.to(streamed.device, streamed.dtype)))
        whole = torch.cat(parts, -1)
        return whole if bias is None else whole + bias

    output = _behind_blocks(streamed, hidden_BTH, product)
    return None if output is None else output.logits


def head_inputs(streamed: StreamedModel, hidden_BTH: Tensor) -> Tensor | None:
    """What the head reads [B, T, H] for states [B, T, H] that leave the last block; None where it is not a linear."""
    seen: list[Tensor] = []

    def keep(x: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(x)
        raise Stop

    _behind_blocks(streamed, hidden_BTH, keep)
    return seen[0] if seen else None


def head_tensor(streamed: StreamedModel) -> str | None:
    """The checkpoint tensor that the head reads whole; None where there is no such."""
    head = streamed.model.get_output_embeddings()
    path = next((name for name, module in streamed.model.named_modules() if module is head), None)
    pieces = streamed.sources.get(f"{path}.weight", [])
    whole = len(pieces) == 1 and not (pieces[0].where or pieces[0].part or pieces[0].transposed)
    return pieces[0].name if whole else None


def _behind_blocks(
    streamed: StreamedModel, hidden_BTH: Tensor, at_head: Callable[[Tensor, Tensor | None], Tensor]
) -> Any:
    """The model's output for states that leave its last block; None where it does not come to an end."""
    ids = torch.zeros(hidden_BTH.shape[:2], dtype=torch.int64)
    for answer in RETURNS:
        record: list[tuple[int, Tensor, BlockCall]] = []
        given = hidden_BTH.to(streamed.device, streamed.dtype)
        output = _run(streamed, ids, record, lambda _, answer=answer, given=given: answer(given), at_head)
        if output is not None and len(record) == len(streamed.blocks):
            return output
    return None


def _run(
    streamed: StreamedModel,
    ids: Tensor,
    record: list[tuple[int, Tensor, BlockCall]],
    answer: Callable[[Tensor], Any],
    at_head: Callable[[Tensor, Tensor | None], Tensor],
) -> Any:
    """The model's output for ids [batch, seq] with blocks that only note their calls and `answer`; None if it ends."""
    streamed.fill_surroundings()
    head = streamed.model.get_output_embeddings()
    try:
        with streamed.streaming(record, answer, stop=False), _AtHead(getattr(head, "weight", None), at_head):
            return streamed.model(input_ids=ids.to(streamed.device), use_cache=False)
    except (UserError, RunError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # Stop, or a model that expects its blocks to return something else
        return None
