"""One run of a block instead of one per stage: all batches halt before a stage's first product and go on from there.

GPTQ wants each group of linears to see the quantized ones before it. Running the block again for every group computes
its beginning again and again; here each batch runs in a thread of its own, halted inside the block where the next
group's input is ready, while the group is quantized. One thread runs at a time and always in the same order, so the
sums are the very same, bit by bit. The price is what a halted batch holds: its live activations.
"""

import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

from quantkit.model.block_graph import BlockGraph
from quantkit.model.matmul_tracing import TraceMatmuls, WeightKey
from quantkit.model.streamed_model import BlockCall
from quantkit.quantization.calibration.hidden_states import HiddenStates, Observer
from quantkit.quantization.calibration.spill import STATES_LIMIT
from quantkit.quantization.resources import (
    end_worker_threads,
)

RESIDUALS = 4  # hidden-size activations a halted batch holds beside the widest input, about


class _Stop(BaseException):
    """Ends a halted batch that is not wanted any more; no `except Exception` of a model may swallow it."""


def fits(states: HiddenStates, graph: BlockGraph, widest: int) -> bool:
    """Whether the halted batches fit into memory and every stage is a single group (experts of a layer are not)."""
    small = fits_in_memory(states.tokens, states.hidden_STH.shape[-1], widest)
    return small and all(len(stage) == 1 for stage in graph.stages)


def fits_in_memory(tokens: int, hidden: int, widest: int) -> bool:
    """Whether all tokens may be halted inside a block of this hidden size, before its widest input."""
    return 4 * tokens * (widest + RESIDUALS * hidden) <= STATES_LIMIT


class StagedForward:
    """The batches of some states, halted and run on together: `begin` a block, `stop_at` its groups in order, `finish`.

    The threads live until `close`: new ones for each block would start with cold pools of their own.
    """

    def __init__(self, states: HiddenStates) -> None:
        self.states = states
        self.target: int | None = None
        self.group_of: dict[tuple[str, int | None], int] = {}
        self.runs = [_PausedBatch(self) for _ in states.slices]

    def begin(self, block: nn.Module, graph: BlockGraph, index: int) -> None:
        """Set every batch before its run of this block; a run that was never finished is dropped."""
        self.drop()
        self.index = index
        self.group_of = {(site.param, site.index): graph.group_of(site.name) for site in graph.sites}
        for run, batch in zip(self.runs, self.states.batches(index, keep=True), strict=True):
            run.prepare(block, *batch)

    def stop_at(self, group: int, observe: Observer) -> None:
        """Run every batch up to this group's input; observe(group, tokens, x_MK) gets it."""
        self.target = group
        for run in self.runs:
            run.go_on()
            assert run.x_MK is not None
            observe(group, slice(run.part.start * self.states.seq_len, run.part.stop * self.states.seq_len), run.x_MK)
            run.x_MK = None

    def finish(self) -> None:
        """Run every batch to its end and store the block's outputs as the new states."""
        self.target = None
        for run in self.runs:
            run.go_on()
            assert run.output is not None
            self.states.put(run.part, run.output, self.index)
            run.output = None

    def drop(self) -> None:
        """End the batches that are halted somewhere, and free what they hold."""
        for run in self.runs:
            run.drop()

    def close(self) -> None:
        """End all threads; this object is of no use afterwards."""
        for run in self.runs:
            run.close()


class _PausedBatch:
    """One batch's thread; it runs only between `go_on` and the next halt, when its owner waits."""

    def __init__(self, owner: StagedForward) -> None:
        self.owner = owner
        self.x_MK: Tensor | None = None  # the input it halted at
        self.output: Tensor | None = None
        self.error: BaseException | None = None
        self.seen: set[int] = set()
        self.inside = self.dropped = self.closed = False
        self.may_run, self.halted = threading.Semaphore(0), threading.Semaphore(0)
        self.thread = threading.Thread(target=self._serve, daemon=True)

    def prepare(self, block: nn.Module, part: slice, hidden: Tensor, call: BlockCall) -> None:
        self.job = (block, hidden, call)
        self.part = part
        self.seen.clear()

    def go_on(self) -> None:
        if self.thread.ident is None:
            self.thread.start()
        end_worker_threads()
        self.may_run.release()
        self.halted.acquire()
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def drop(self) -> None:
        if self.inside:
            self.dropped = True
            self.go_on()
            self.dropped = False
        self.x_MK = self.output = None

    def close(self) -> None:
        self.drop()
        self.closed = True
        if self.thread.is_alive():
            self.may_run.release()
            self.thread.join()

    def _serve(self) -> None:
        while True:
            self.may_run.acquire()
            if self.closed:
                return
            self.inside = True
            try:
                block, hidden, call = self.job
                del self.job
                with torch.no_grad(), TraceMatmuls(block, self._on_product):
                    self.output = call.run(block, hidden)
            except _Stop:
                pass
            except BaseException as error:  # handed to the owner, whose thread it belongs to
                self.error = error
            block = hidden = call = None
            self.inside = False
            end_worker_threads()
            self.halted.release()

    def _on_product(self, weight: WeightKey, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        group = self.owner.group_of.get((weight.param, weight.index))
        if group is not None and group not in self.seen:
            self.seen.add(group)
            if group == self.owner.target:
                self.x_MK = x.detach().reshape(-1, x.shape[-1])
                end_worker_threads()
                self.halted.release()
                self.may_run.acquire()
                if self.dropped:
                    raise _Stop
        return run(x)
