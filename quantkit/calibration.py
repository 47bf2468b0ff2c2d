"""Calibration states and what is gathered from them while one block runs.

Statistics are sums over tokens, so several processes may gather their own and add them up.
Shapes: S = samples, T = tokens of a sample, H = hidden size, M = tokens of one batch, K = input features of a group.
"""

import copy
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from quantkit.algorithms.gptq import accumulate, finish
from quantkit.blocks import BlockCall, Skeleton
from quantkit.errors import RunError
from quantkit.graph import BlockGraph, run_until

STATES_LIMIT = 2 << 30  # bytes of one array of states kept in memory; a larger one is a memory-mapped file
BATCH_FLOATS = 1 << 23  # hidden-state elements that run through a block at a time, so sums depend on the model alone
BATCH_TOKENS = (2048, 8192)  # at least and at most this many tokens


def allocate(shape: tuple[int, ...], dtype: torch.dtype, folder: Path) -> Tensor:
    """A zeroed array in memory, or in a memory-mapped file in `folder` where it is larger than STATES_LIMIT.

    The file has no name from the start, so a killed run leaves nothing behind.
    """
    count = torch.Size(shape).numel()
    if count * dtype.itemsize <= STATES_LIMIT:
        return torch.zeros(shape, dtype=dtype)
    handle, path = tempfile.mkstemp(suffix=".states", dir=folder)
    try:
        os.posix_fallocate(handle, 0, count * dtype.itemsize)
        return torch.from_file(path, shared=True, size=count, dtype=dtype).reshape(shape)
    except OSError as error:
        raise RunError(
            f"{folder}: no room for {count * dtype.itemsize / 2**30:.1f} GiB of calibration states"
        ) from error
    finally:
        os.close(handle)
        os.unlink(path)


class States:
    """The hidden states of all calibration samples between two blocks, and how each batch calls every block."""

    def __init__(self, skeleton: Skeleton, ids_ST: Tensor, folder: Path) -> None:
        S, self.seq_len = ids_ST.shape
        self.device, self.tokens = skeleton.device, ids_ST.numel()
        least, most = BATCH_TOKENS
        tokens = min(max(BATCH_FLOATS // skeleton.model.config.get_text_config().hidden_size, least), most)
        step = max(1, tokens // self.seq_len)
        self.slices = [slice(i, min(i + step, S)) for i in range(0, S, step)]
        self.calls: dict[int, list[BlockCall]] = {}  # by batch size: all samples have one length and no padding
        for part in self.slices:
            hidden, calls = skeleton.first_call(ids_ST[part])
            self.calls.setdefault(part.stop - part.start, calls)
            if part.start == 0:
                self.hidden_STH = allocate((S, *hidden.shape[1:]), hidden.dtype, folder)
            self.hidden_STH[part] = hidden.cpu()

    def fork(self, folder: Path) -> "States":
        """A second stream of states that starts where this one is."""
        other = copy.copy(self)
        other.hidden_STH = allocate(tuple(self.hidden_STH.shape), self.hidden_STH.dtype, folder)
        other.hidden_STH.copy_(self.hidden_STH)
        return other

    def batches(self, block: int) -> Iterator[tuple[slice, Tensor, BlockCall]]:
        """(samples, hidden states on the device, how to call the block) of every batch."""
        for part in self.slices:
            yield part, self.hidden_STH[part].to(self.device), self.calls[part.stop - part.start][block]

    def put(self, part: slice, output: Tensor, index: int) -> None:
        """Store block `index`'s output for these samples; RunError where it is NaN or infinite."""
        if not torch.isfinite(output.sum()):
            raise RunError(f"block {index}: the hidden states became NaN or infinite on the calibration text")
        self.hidden_STH[part] = output.cpu()

    def advance(self, block: nn.Module, index: int) -> None:
        """Replace every state by the block's output for it."""
        for part, hidden, call in self.batches(index):
            self.put(part, call.run(block, hidden), index)


Observer = Callable[[int, slice, Tensor], None]


def run(
    states: States,
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
    for part, hidden, call in states.batches(index):
        tokens = slice(part.start * states.seq_len, part.stop * states.seq_len)

        def see(group: int, x_MK: Tensor, tokens: slice = tokens) -> None:
            if group in groups:
                observe(group, tokens, x_MK)

        until = None if advance else max(groups)
        output = run_until(block, graph, (hidden, *call.args), call.kwargs, see, until)
        if advance:
            assert output is not None
            states.put(part, output if isinstance(output, Tensor) else output[0], index)


@dataclass(slots=True)
class Statistic:
    """Sums over the tokens that reached one input group; those nobody asked for are None.

    square_sum_K  of x^2; it is the hessian's diagonal where there is one, and then complete after `finish`
    hessian_KK  X^T X, where an algorithm asks for it; blocks_Bbb its blocks of b columns on the diagonal, where only
                those are asked for
    """

    count: int
    square_sum_K: Tensor
    abs_sum_K: Tensor | None = None
    hessian_KK: Tensor | None = None
    blocks_Bbb: Tensor | None = None

    @staticmethod
    def empty(x_MK: Tensor, *, hessian: bool, block: int | None = None, magnitude: bool = False) -> "Statistic":
        """No token yet, for inputs like x_MK."""
        K = x_MK.shape[1]
        zeros = torch.zeros(K, dtype=torch.float64, device=x_MK.device)
        found = Statistic(0, zeros, zeros.clone() if magnitude else None)
        if hessian:
            found.hessian_KK = torch.zeros(K, K, dtype=torch.float32, device=x_MK.device)
        elif block is not None:
            found.blocks_Bbb = torch.zeros(K // block, block, block, dtype=torch.float32, device=x_MK.device)
        return found

    def add(self, x_MK: Tensor) -> None:
        """Add one batch of inputs [M, K]."""
        x_MK = x_MK.float()
        self.count += len(x_MK)
        if self.abs_sum_K is not None:
            self.abs_sum_K += torch.linalg.vector_norm(x_MK, 1, dim=0)
        if self.hessian_KK is not None:
            accumulate(self.hessian_KK, x_MK)
        else:
            self.square_sum_K += torch.linalg.vector_norm(x_MK, dim=0).double().square()
        if self.blocks_Bbb is not None:
            x_BMb = x_MK.reshape(len(x_MK), *self.blocks_Bbb.shape[:2]).transpose(0, 1)
            self.blocks_Bbb.baddbmm_(x_BMb.mT, x_BMb)

    def finish(self) -> None:
        """Complete the hessian, of which `add` fills only one half."""
        if self.hessian_KK is not None:
            finish(self.hessian_KK)
            self.square_sum_K.copy_(self.hessian_KK.diagonal())

    def diagonal_blocks(self, size: int) -> Tensor | None:
        """The hessian's blocks of `size` columns [G, size, size]; None where they were not gathered."""
        whole = self.hessian_KK[None] if self.hessian_KK is not None else self.blocks_Bbb
        if whole is None or whole.shape[1] % size:
            return None
        B, b, _ = whole.shape
        parts = whole.reshape(B, b // size, size, b // size, size)
        index = torch.arange(b // size, device=whole.device)
        return parts[:, index, :, index, :].transpose(0, 1).reshape(-1, size, size)


def merged(statistics: list[Statistic]) -> Statistic:
    """The sum of statistics of inputs with the same features; the first one is added to in place."""
    total = statistics[0]
    for other in statistics[1:]:
        total.count += other.count
        total.square_sum_K += other.square_sum_K
        if total.abs_sum_K is not None and other.abs_sum_K is not None:
            total.abs_sum_K += other.abs_sum_K
        if total.hessian_KK is not None and other.hessian_KK is not None:
            total.hessian_KK += other.hessian_KK
    total.finish()
    return total
