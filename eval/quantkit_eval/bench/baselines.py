"""The same requests through transformers: `generate` one by one or in padded batches, and `generate_batch`."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from quantkit.errors import RunError
from quantkit.library_output import quiet_libraries
from quantkit.runtime.load import load
from quantkit_eval.bench.engine_run import VirtualClock
from quantkit_eval.bench.statistics import Timeline
from quantkit_eval.bench.workload import Arrival

BATCH = 8  # sequences of a padded batch
PAGES = 512  # of 256 tokens, for generate_batch


@dataclass
class BaselineRun:
    """Each request's tokens and times, in the order of arrival."""

    outputs: list[list[int]]
    timelines: list[Timeline]


class _Times(StoppingCriteria):
    """Notes when each token comes, and stops nothing."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock, self.times = clock, list[float]()

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # type: ignore[override]
        self.times.append(self.clock())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Transformers:
    """A model of transformers, its packed linears those of `quantkit.load`."""

    def __init__(self, model: str, dtype: str, device: str, trust_remote_code: bool = False) -> None:
        with quiet_libraries():
            self.model: Any = load(model, dtype, device, trust_remote_code=trust_remote_code)
        self._attention = self.model.config._attn_implementation

    def run(self, kind: str, requests: Sequence[Arrival]) -> BaselineRun:
        """kind: generate, batched or generate_batch."""
        with quiet_libraries():
            if kind == "generate_batch":
                return self._continuous(requests)
            return self._static(requests, BATCH if kind == "batched" else 1)

    def _static(self, requests: Sequence[Arrival], size: int) -> BaselineRun:
        """Those that have arrived, up to `size` at a time, padded on the left, until the longest of them is done."""
        found, clock, at = BaselineRun([], []), VirtualClock(), 0
        while at < len(requests):
            clock.wait_until(requests[at].time)
            now = clock()
            part = [request for request in requests[at : at + size] if request.time <= now]
            at += len(part)
            width, times = max(len(request.prompt) for request in part), _Times(clock)
            pads = [width - len(request.prompt) for request in part]
            ids = torch.tensor([[0] * pad + request.prompt for pad, request in zip(pads, part, strict=True)])
            mask = torch.tensor(
                [[0] * pad + [1] * len(request.prompt) for pad, request in zip(pads, part, strict=True)]
            )
            device, most = self.model.device, max(request.output for request in part)
            config = GenerationConfig(do_sample=False, max_new_tokens=most, pad_token_id=0)
            out = self.model.generate(
                ids.to(device), attention_mask=mask.to(device), generation_config=config,
                stopping_criteria=StoppingCriteriaList([times]), eos_token_id=None,
            )  # fmt: skip
            for request, row in zip(part, out[:, width:].tolist(), strict=True):
                found.outputs.append(row[: request.output])
                found.timelines.append(Timeline(request.time, tuple(times.times[: request.output])))
        return found

    def _continuous(self, requests: Sequence[Arrival]) -> BaselineRun:
        """By transformers' own continuous batching, all at once. RunError where it loses a request."""
        from transformers import ContinuousBatchingConfig

        self.model.set_attn_implementation("paged|eager")
        config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        batching = ContinuousBatchingConfig(max_batch_tokens=512, num_blocks=PAGES)
        ended: dict[str, Any] = {}
        start = time.perf_counter()
        try:
            with self.model.continuous_batching_context_manager(
                generation_config=config, continuous_batching_config=batching, block=True, timeout=5
            ) as manager:
                ids = [
                    manager.add_request(
                        request.prompt, max_new_tokens=request.output, record_timestamps=True, eos_token_id=-1
                    )
                    for request in requests
                ]
                while len(ended) < len(ids):
                    result = manager.get_result(timeout=1)
                    if result is not None and result.is_finished():
                        ended[result.request_id] = result
                    elif result is None and not manager.is_running():
                        raise RunError("transformers' continuous batching ended before all requests had")
        finally:
            self.model.set_attn_implementation(self._attention)
        found = BaselineRun([], [])
        for request_id in ids:
            result = ended[request_id]
            if result.error is not None:
                raise RunError(f"transformers' continuous batching: {result.error}")
            found.outputs.append(list(result.generated_tokens))
            found.timelines.append(Timeline(0.0, tuple(moment - start for moment in result.timestamps)))
        return found
