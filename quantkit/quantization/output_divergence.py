"""How far a changed model's output is from the original's, at the cost of the blocks behind the change.

The model is whole in memory. The states that enter one of its blocks are kept; a run that asks what a change in that
block does to the output passes over the blocks before it.

Shapes: S = samples, T = tokens of one, H = hidden size, V = vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantkit.errors import RunError, UserError
from quantkit.model.meta_model import find_blocks
from quantkit.model.streamed_model import Stop

LOGITS_BYTES = 64 << 20  # of float32 logits that are computed at a time
WORKING = 4  # arrays of that size: logits, their logarithms, probabilities, products


class OutputDivergence:
    """KL of next-token distributions from those of the model as it is when this is made.

    block  index of the block whose inputs are kept: 0 at first; that many blocks are not run
    """

    def __init__(self, model: PreTrainedModel, ids_ST: Tensor) -> None:
        """ids_ST: int64 [S, T], at least one sample; the log-probabilities of all are kept (4 * S * T * V bytes)."""
        self.model, self.block = model.eval(), 0
        _, self.blocks = find_blocks(model)
        vocabulary = model.config.get_text_config().vocab_size
        samples = max(1, LOGITS_BYTES // (4 * vocabulary * ids_ST.shape[1]))
        self.ids = ids_ST.split(samples)
        self._states: list[Tensor] = []
        self._answer: Callable[[Tensor], Any] = lambda hidden: hidden
        self._log_p = [self._log_probabilities(i) for i in range(len(self.ids))]

    @staticmethod
    def sizes(samples: int, seq_len: int, vocabulary: int, hidden: int) -> list[int]:
        """Bytes of the largest tensors: log-probabilities, states, and what a part of the logits is computed with."""
        tokens, part = samples * seq_len, max(LOGITS_BYTES, 4 * vocabulary * seq_len)
        kept = [4 * tokens * vocabulary, 2 * 4 * tokens * hidden]
        return [*kept, *[min(part, kept[0])] * WORKING]

    def measure(self) -> float:
        """Nats per token. What was changed lies in block `block` or behind it, or anywhere while `block` is 0."""
        total, tokens = 0.0, 0
        for i, log_p in enumerate(self._log_p):
            log_q = self._log_probabilities(i)
            total += float((log_p.exp() * log_q.neg_().add_(log_p)).sum(-1).double().sum())
            tokens += log_p[..., 0].numel()
        if total != total:
            raise RunError("the model's output became NaN on the calibration text")
        return max(0.0, total / tokens)

    def rewind(self) -> None:
        """Back to block 0."""
        self.block, self._states = 0, []

    def advance(self) -> None:
        """Go on to the next block: the one at `block` as it is now makes the states."""
        block, seen = self.blocks[self.block], []

        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            seen.append(output)
            raise Stop

        hook = block.register_forward_hook(keep)
        try:
            for i in range(len(self.ids)):
                try:
                    self._run(i)
                except Stop:
                    continue
                raise UserError(f"{type(self.model).__name__} does not run its blocks one after the other")
        finally:
            hook.remove()
        rest = () if isinstance(seen[0], Tensor) else tuple(seen[0][1:])
        if not isinstance(seen[0], Tensor):
            self._answer = lambda hidden: (hidden, *rest)
        self._states = [output if isinstance(output, Tensor) else output[0] for output in seen]
        self.block += 1

    def _log_probabilities(self, i: int) -> Tensor:
        return self._run(i).logits.float().log_softmax(-1)

    def _run(self, i: int) -> Any:
        with self._passed_over(i), torch.no_grad():
            return self.model(input_ids=self.ids[i].to(self.model.device), use_cache=False)

    @contextmanager
    def _passed_over(self, i: int) -> Iterator[None]:
        """The blocks before `block` only return the states that enter it."""
        passed = self.blocks[: self.block]
        try:
            if passed:
                output = self._answer(self._states[i].clone())  # blocks may write into what they are given
                for block in passed:
                    block.forward = lambda *args, **kwargs: output
            yield
        finally:
            for block in passed:
                del block.forward
