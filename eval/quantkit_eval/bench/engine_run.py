"""Requests through the paged engine: real steps on a clock that jumps over the time in which nothing is there to do."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch

from quantkit.errors import RunError, UserError
from quantkit.runtime.engine.blocks import BlockManager
from quantkit.runtime.engine.llm import LLM
from quantkit.runtime.engine.request import Request, RequestOutput, SamplingParams
from quantkit.runtime.engine.scheduler import Scheduled
from quantkit.runtime.engine.speculation import DraftModel
from quantkit_eval.bench.machine import ModelCost
from quantkit_eval.bench.regime import StepRecord
from quantkit_eval.bench.statistics import Timeline
from quantkit_eval.bench.workload import Arrival


class VirtualClock:
    """Seconds since it was made, and those it was moved on by."""

    def __init__(self, real: Callable[[], float] = time.perf_counter) -> None:
        self._real, self._start = real, real()

    def __call__(self) -> float:
        return self._real() - self._start

    def wait_until(self, moment: float) -> None:
        """Be at `moment` at least."""
        self._start -= max(0.0, moment - self())


@dataclass
class EngineRun:
    """What happened: each request's tokens and times, in the order of arrival, and each step.

    hits, preemptions, drafted, accepted  as in EngineStats, of this run; blocks: most that were held at a time
    memory  most bytes: of the process, or on a GPU those torch had allocated
    """

    outputs: list[list[int]] = field(default_factory=list)
    timelines: list[Timeline] = field(default_factory=list)
    steps: list[StepRecord] = field(default_factory=list)
    hits: int = 0
    preemptions: int = 0
    drafted: int = 0
    accepted: int = 0
    blocks: int = 0
    memory: int = 0


@dataclass
class _Watch:
    """What one step planned, and how long the model took."""

    plan: list[Scheduled] = field(default_factory=list)
    model_seconds: float = 0.0
    waiting: int = 0
    no_blocks: bool = False
    blocks: int = 0
    began: float = 0.0


def run(llm: LLM, requests: Sequence[Arrival], cost: ModelCost, *, slots: int | None = None) -> EngineRun:
    """The requests, greedily and to their last token. slots: how many run at a time. Nothing is cached beforehand.

    UserError where a request is refused, RunError where one fails on its way.
    """
    scheduler, found, clock = llm.scheduler, EngineRun(), VirtualClock()
    scheduler.blocks.forget()
    before = llm.stats
    kept = scheduler.max_num_seqs, llm.clock
    counts = scheduler.hits, scheduler.preemptions, before.drafted, before.accepted
    scheduler.max_num_seqs, llm.clock = slots or kept[0], clock
    waiting, ended, ids = deque(requests), dict[str, RequestOutput](), list[str]()
    try:
        with watched(llm) as watch:
            while waiting or llm.unfinished:
                if not llm.unfinished:
                    clock.wait_until(waiting[0].time)
                while waiting and waiting[0].time <= clock():
                    request = waiting.popleft()
                    params = SamplingParams(temperature=0, max_tokens=request.output, ignore_eos=True)
                    ids.append(llm.add(request.prompt, params))
                began = time.perf_counter()
                outputs = llm.step()
                seconds = time.perf_counter() - began
                for output in outputs:
                    if output.error is not None:
                        kind = RunError if output.outputs[0].token_ids else UserError
                        raise kind(f"request {output.request_id} failed: {output.error}")
                    ended[output.request_id] = output
                if watch.plan:
                    found.steps.append(_record(watch, seconds, scheduler.max_num_seqs, cost))
                found.blocks = max(found.blocks, watch.blocks)
                found.memory = max(found.memory, memory(llm.runner.device))
    finally:
        scheduler.max_num_seqs, llm.clock = kept
        for request_id in ids:
            llm.cancel(request_id)
    for request, request_id in zip(requests, ids, strict=True):
        output = ended[request_id]
        found.outputs.append(output.outputs[0].token_ids)
        found.timelines.append(Timeline(request.time, tuple(output.metrics.token_times)))
    after = scheduler.hits, scheduler.preemptions, llm.stats.drafted, llm.stats.accepted
    found.hits, found.preemptions, found.drafted, found.accepted = (b - a for a, b in zip(counts, after, strict=True))
    return found


def memory(device: torch.device) -> int:
    """Bytes now: of the process, or on a GPU the most that torch ever had allocated."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def prompt_tokens(item: Scheduled) -> int:
    """How many of the planned tokens are of a prompt, or of a preempted sequence that is computed again."""
    decoding = item.count - item.drafts == 1 and item.start >= item.request.prompt_length
    return 0 if decoding else item.count


def _record(watch: _Watch, seconds: float, slots: int, cost: ModelCost) -> StepRecord:
    plan = watch.plan
    tokens = sum(item.count for item in plan)
    pairs = sum(item.count * (item.start + (item.count + 1) / 2) for item in plan)
    rows = sum(1 + item.drafts for item in plan if item.ends)
    cached = sum(item.start + item.count for item in plan)
    return StepRecord(
        seconds, watch.model_seconds, sum(map(prompt_tokens, plan)), tokens, len(plan), slots, watch.waiting,
        watch.no_blocks, cost.flops(tokens, rows, pairs), cost.bytes(cached),
    )  # fmt: skip


@contextmanager
def watched(llm: LLM) -> Iterator[_Watch]:
    """Note what each step plans, and the model's time in it (on a GPU until its work is done)."""
    watch, scheduler = _Watch(), llm.scheduler
    schedule = scheduler.schedule

    def noted() -> list[Scheduled]:
        watch.plan, watch.model_seconds = schedule(), 0.0
        blocks = scheduler.blocks
        watch.waiting, watch.blocks = len(scheduler.waiting), blocks.blocks - blocks.free
        slots_left = scheduler.max_num_seqs > len(scheduler.running)
        watch.no_blocks = slots_left and bool(scheduler.waiting) and lacks_blocks(blocks, scheduler.waiting[0])
        return watch.plan

    def begin(*_: Any) -> None:
        _finish(llm.runner.device)
        watch.began = time.perf_counter()

    def end(*_: Any) -> None:
        _finish(llm.runner.device)
        watch.model_seconds += time.perf_counter() - watch.began

    runners = [llm.runner, *([llm.drafter.runner] if isinstance(llm.drafter, DraftModel) else [])]
    with ExitStack() as undo:
        setattr(scheduler, "schedule", noted)  # noqa: B010
        undo.callback(delattr, scheduler, "schedule")
        for runner in runners:
            undo.callback(runner.model.register_forward_pre_hook(begin).remove)
            undo.callback(runner.model.register_forward_hook(end).remove)
        yield watch


def lacks_blocks(blocks: BlockManager, request: Request) -> bool:
    """Whether too few blocks are free for a request to begin, those it shares with others not counted."""
    shared = blocks.match(request)
    idle = sum(blocks.references[block] == 0 for block in shared)
    spare = blocks.watermark if blocks.free < blocks.blocks else 0
    return blocks.needed(len(request.tokens)) - len(shared) > blocks.free - idle - spare


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
