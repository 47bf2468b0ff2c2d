"""Calibration states and what is gathered from them while one block runs.

Statistics are sums over tokens, so several processes may gather their own and add them up.
Shapes: S = samples, T = tokens of a sample, H = hidden size, M = tokens of one batch, K = input features of a group.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import RunError
from quantkit.model.block_arguments import handed, handed_on
from quantkit.model.block_graph import BlockGraph, run_until
from quantkit.model.block_trial import note_returned
from quantkit.model.streamed_model import BlockCall, Returned, StreamedModel
from quantkit.quantization.calibration.block_calls import BlockCalls
from quantkit.quantization.calibration.spill import allocate

BATCH_FLOATS = 1 << 23  # hidden-state elements that run through a block at a time, so sums depend on the model alone
BATCH_TOKENS = (2048, 8192)  # at least and at most this many tokens


def batch_samples(hidden_size: int, seq_len: int) -> int:
    """Samples that run through a block at a time."""
    least, most = BATCH_TOKENS
    return max(1, min(max(BATCH_FLOATS // hidden_size, least), most) // seq_len)


class HiddenStates:
    """The hidden states of all calibration samples between two blocks, and how each batch calls every block."""

    def __init__(self, streamed: StreamedModel, ids_ST: Tensor, folder: Path) -> None:
        S, self.seq_len = ids_ST.shape
        self.device, self.tokens = streamed.device, ids_ST.numel()
        step = batch_samples(streamed.model.config.get_text_config().hidden_size, self.seq_len)
        self.slices = [slice(i, min(i + step, S)) for i in range(0, S, step)]
        self.calls = BlockCalls(self.device, folder)
        self.handed: dict[int, dict[int | str, Any]] = {}  # by first sample: containers that blocks write into
        self.wanted = set[Returned]()  # what blocks return for blocks behind them
        self.returned: dict[int, dict[Returned, Any]] = {}  # by first sample
        self.samples_dim = 0  # of the hidden states as blocks take them
        for part in self.slices:
            hidden, calls = streamed.first_call(ids_ST[part])
            self.calls.add(part, calls)
            self.handed[part.start] = handed_on(calls)
            self.wanted |= {value for call in calls for value in call.handed()}
            self.returned[part.start] = {}
            if part.start == 0:
                self.samples_dim = _samples_dim(streamed, ids_ST[part], hidden)
            hidden = hidden.movedim(self.samples_dim, 0)
            if part.start == 0:
                self.hidden_STH = allocate((S, *hidden.shape[1:]), hidden.dtype, folder)
            self.hidden_STH[part] = hidden.cpu()

    def fork(self, folder: Path) -> "HiddenStates":
        """A second stream of states that starts where this one is."""
        other = copy.copy(self)
        other.hidden_STH = allocate(tuple(self.hidden_STH.shape), self.hidden_STH.dtype, folder)
        other.hidden_STH.copy_(self.hidden_STH)
        other.returned = {start: dict(values) for start, values in self.returned.items()}
        other.handed = {
            start: {place: handed(copy.copy(container)) for place, container in containers.items()}
            for start, containers in self.handed.items()
        }
        return other

    def batches(self, block: int, *, keep: bool = False) -> Iterator[tuple[slice, Tensor, BlockCall]]:
        """(samples, hidden states on the device, how to call the block) of every batch.

        keep: what this run of the block writes into containers is what later blocks will read there.
        """
        for part in self.slices:
            containers = self.handed[part.start]
            for container in containers.values():
                container.open = keep
            hidden = self.hidden_STH[part].to(self.device).movedim(0, self.samples_dim)
            returned = self.returned[part.start]
            call = self.calls.of(part, block).with_arguments(containers).with_returned(returned)
            if keep and (hands_on := {value.position: value for value in self.wanted if value.block == block}):
                call = replace(call, on_output=partial(note_returned, hands_on, returned))
            yield part, hidden, call

    def put(self, part: slice, output: Tensor, index: int) -> None:
        """Store block `index`'s output for these samples; RunError where it is NaN or infinite."""
        if not torch.isfinite(output.sum()):
            raise RunError(f"block {index}: the hidden states became NaN or infinite on the calibration text")
        self.hidden_STH[part] = output.movedim(self.samples_dim, 0).cpu()

    def advance(self, block: nn.Module, index: int) -> None:
        """Replace every state by the block's output for it."""
        for part, hidden, call in self.batches(index, keep=True):
            self.put(part, call.run(block, hidden), index)


def _samples_dim(streamed: StreamedModel, ids_ST: Tensor, hidden: Tensor) -> int:
    """The dimension of the hidden states that counts samples: the one that changes with their number."""
    if hidden.dim() == 3:
        return 0
    other, _ = streamed.first_call(torch.cat([ids_ST[:1]] * (len(ids_ST) + 1)))
    return next(dim for dim, (one, two) in enumerate(zip(hidden.shape, other.shape, strict=True)) if one != two)


Observer = Callable[[int, slice, Tensor], None]


def run(
    states: HiddenStates,
    block: nn.Module,
    graph: BlockGraph,
    index: int,
    groups: set[int],
    observe: Observer,
    *,
    advance: bool,
) -> None:
    """Run the block on all states; observe(group, tokens, x_MK) sees every input of the groups asked for.

    tokens are the batch's rows among all calibration tokens (of no meaning for an expert, which sees only some).
    advance replaces the states by the block's outputs; otherwise the run stops behind the last group asked for.
    """
    for part, hidden, call in states.batches(index, keep=advance):
        tokens = slice(part.start * states.seq_len, part.stop * states.seq_len)

        def see(group: int, x_MK: Tensor, tokens: slice = tokens) -> None:
            if group in groups:
                observe(group, tokens, x_MK)

        until = None if advance else max(groups)
        output = run_until(block, graph, (hidden, *call.args), call.kwargs, see, until)
        if advance:
            assert output is not None
            states.put(part, call.states_of(output), index)
