"""How far the quantized model is from the original on text it was not calibrated on, measured while blocks pass by.

A few windows go through every block twice: as the original computes it, and as an engine computes the quantized one,
inputs of linears and cached keys and values rounded as the recipe says. What leaves the last block becomes logits.

Shapes: M = tokens of the windows, H = hidden size, V = vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from quantkit.cache_spec import CacheSpec
from quantkit.grids.activations import KVRange, fake_quantize, quantize_cache
from quantkit.model.matmul_tracing import OnProduct, TraceMatmuls, WeightKey
from quantkit.model.model_ends import HEAD_BYTES, Head, logits
from quantkit.quantization.calibration.hidden_states import HiddenStates
from quantkit.quantization.gguf_tables import quantized_ends
from quantkit.quantization.run_context import BlockContext, RunContext
from quantkit.quantization.targets import LinearTarget
from quantkit.report.records import HeldOutRecord
from quantkit.types import ActivationRange

SHARE = 16  # calibration tokens per held-out token
MOST_TOKENS = 4096
LOGITS_BYTES = 32 << 20  # of float32 logits of one model at a time

Ranges = dict[str, ActivationRange | None]  # of a block's linears with rounded inputs, by name


def windows_for(samples: int, seq_len: int) -> int:
    """How many held-out windows a run of so many calibration windows affords: at least one."""
    return max(1, min(samples * seq_len // SHARE, MOST_TOKENS) // seq_len)


def stream_sizes(tokens: int, hidden: int) -> list[int]:
    """Bytes of the states that are held from the first block to the last."""
    return [4 * tokens * hidden] * 2


def logits_sizes(tokens: int, vocabulary: int, hidden: int, itemsize: int) -> list[int]:
    """Bytes of the tensors alive at the end: logits of both models in parts and whole, what is made of them, the head.

    itemsize: bytes of a number of the head as it is stored.
    """
    rows = min(HEAD_BYTES // itemsize, vocabulary * hidden)
    return [min(LOGITS_BYTES, 4 * tokens * vocabulary)] * 8 + [itemsize * rows, 4 * rows]


def input_rounding(linears: Sequence[LinearTarget], ranges: Ranges) -> OnProduct:
    """Rounds the inputs of a block's linears as their schemes say; for TraceMatmuls."""
    rounding: dict[tuple[str, int | None], Callable[[Tensor], Tensor]] = {}
    for linear in linears:
        if (spec := linear.scheme.activations) is not None:
            range_ = ranges.get(linear.name)
            rounding[linear.site.param, linear.site.index] = lambda x, spec=spec, range_=range_: fake_quantize(
                x, spec, range_
            )

    def on_product(weight: WeightKey, x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        found = rounding.get((weight.param, weight.index))
        return product(x if found is None else found(x))

    return on_product


class HeldOut:
    """The two streams of the held-out windows; blocks pass in order, first as they are and then quantized."""

    def __init__(self, run: RunContext, ids_ST: Tensor, cache_places: list[int | str]) -> None:
        """ids_ST int64 [windows, seq]; cache_places of the blocks, empty where the cache stays as it is."""
        self.run, self.places = run, cache_places
        self.original = HiddenStates(run.streamed, ids_ST, run.folder)
        streamed, self.head = quantized_ends(run)
        if streamed is run.streamed:
            self.quantized = self.original.fork(run.folder)
        else:
            self.quantized = HiddenStates(streamed, ids_ST, run.folder)

    def run_original(self, context: BlockContext) -> None:
        """Advance the original stream; the block's weights are those of the original model."""
        self.original.advance(context.block, context.index)

    def run_quantized(self, context: BlockContext, ranges: Ranges, kv: KVRange) -> None:
        """Advance the quantized stream; the block holds dequantized weights.

        ranges  of the static inputs; kv: what calibration found for the block's cache
        """
        on_product = input_rounding(context.linears, ranges)
        states, index, spec = self.quantized, context.index, self.run.targets.kv
        for part, hidden, call in states.batches(index, keep=True):
            if spec is not None:
                call = call.with_cache(self.places[index], _RoundingCache(spec, kv))
            with TraceMatmuls(context.block, on_product):
                states.put(part, call.run(context.block, hidden), index)

    def finish(self, head: Head | None = None) -> HeldOutRecord | None:
        """KL of the quantized model's next-token distributions from the original's; None where there are no logits.

        head: that of the quantized model, where it is quantized as the blocks are
        """
        head = head or self.head
        if (
            self.original.hidden_STH.dim() != 3
        ):  # several states per token, of which the model makes one behind its blocks
            return None
        leaving = [self._leaving(states) for states in (self.original, self.quantized)]
        M, V = len(leaving[0]), self.run.streamed.model.config.get_text_config().vocab_size
        step = max(1, min(LOGITS_BYTES // (4 * V), self.original.seq_len))  # no more positions than the model has
        total = agree = 0.0
        for start in range(0, M, step):
            pair = [states[start : start + step] for states in leaving]
            both = self._logits(pair, head)
            if both is None:
                return None
            log_p, log_q = (each.float().log_softmax(-1) for each in both)
            del both
            p = log_p.exp()
            total += float(torch.where(p > 0, p * (log_p - log_q), 0.0).sum(dtype=torch.float64))
            agree += float((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        return HeldOutRecord(M, total / M, agree / M)

    def _logits(self, pair: list[Tensor], head: Head | None) -> Tensor | list[Tensor] | None:
        """Logits of the original's and the quantized model's states [m, H]; None where there are none."""
        if head is None:
            return logits(self.run.streamed, torch.stack(pair))  # the head is read once for the two
        each = [logits(self.run.streamed, pair[0][None]), logits(self.run.streamed, pair[1][None], head)]
        return None if each[0] is None or each[1] is None else [each[0][0], each[1][0]]

    def _leaving(self, states: HiddenStates) -> Tensor:
        """What leaves the last block [M, H], in the basis of the model as it is stored."""
        hidden_MH = states.hidden_STH.flatten(0, -2)
        return hidden_MH if self.run.rotation is None else self.run.rotation.restore(hidden_MH)


class _RoundingCache(DynamicCache):
    """A cache that rounds each key and value [B, H, T, D] as it comes in."""

    def __init__(self, spec: CacheSpec, ranges: KVRange) -> None:
        super().__init__()
        self.spec, self.ranges = spec, ranges

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = quantize_cache(key_states, value_states, self.spec, self.ranges)
        return super().update(keys, values, layer_idx, *args, **kwargs)
