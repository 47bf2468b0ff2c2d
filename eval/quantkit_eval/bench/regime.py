"""What limits prefill and decode, with the shares that say so. No torch.

compute    arithmetic a second, of the peak that products of matrices reached in this run
bandwidth  bytes a second, of what copying reached in this run: all weights once a step, and the cache of its sequences
host       time of a step outside the model: the engine's own Python
operators  time in the model that neither arithmetic nor bytes account for: starting small operators, slow kernels
capacity   time of steps in which a request waited for blocks of the cache
scheduler  slots that were idle while a request waited that had its blocks

Bandwidth may exceed 1: weights that stay in the processor's caches are read faster than memory is.

The name: capacity or scheduler where that is most of the time; else compute or bandwidth where one of them reaches
0.4, for kernels seldom come nearer to both peaks; else the larger one of host and operators.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step of the engine.

    seconds, model_seconds  of the step; of the model in it
    prompt_tokens, tokens   of prompts (or of preempted sequences, again); all of them
    sequences  with tokens in it; slots: how many could have had; waiting: requests that did not
    no_blocks  whether these waited for blocks
    flops, bytes  arithmetic; weights and cached entries read
    """

    seconds: float
    model_seconds: float
    prompt_tokens: int
    tokens: int
    sequences: int
    slots: int
    waiting: int
    no_blocks: bool
    flops: float
    bytes: float


@dataclass(frozen=True, slots=True)
class Regime:
    """Of the steps of one kind: what limits them, and the shares that say so. name None: there were none."""

    name: str | None
    steps: int
    seconds: float
    tokens: int
    compute: float
    bandwidth: float
    host: float
    operators: float
    capacity: float
    scheduler: float

    def to_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


SHARES = ("compute", "bandwidth", "host", "operators", "capacity", "scheduler")
MOST, NEAR_PEAK = 0.5, 0.4


def regime(steps: Iterable[StepRecord], peak_flops: float, copy_bytes: float) -> Regime:
    """What limits these steps. peak_flops, copy_bytes: a second, as measured."""
    steps = list(steps)
    seconds = sum(step.seconds for step in steps)
    if not steps or seconds <= 0:
        return Regime(None, len(steps), 0.0, 0, *([0.0] * len(SHARES)))
    idle = sum(
        min(step.slots - step.sequences, step.waiting) for step in steps if step.waiting > 0 and not step.no_blocks
    )
    compute = sum(step.flops for step in steps) / seconds / peak_flops
    bandwidth = sum(step.bytes for step in steps) / seconds / copy_bytes
    host = 1 - sum(step.model_seconds for step in steps) / seconds
    shares = {
        "compute": compute,
        "bandwidth": bandwidth,
        "host": host,
        "operators": max(0.0, 1 - host - max(compute, bandwidth)),
        "capacity": sum(step.seconds for step in steps if step.no_blocks) / seconds,
        "scheduler": idle / sum(step.slots for step in steps),
    }
    return Regime(_name(shares), len(steps), seconds, sum(step.tokens for step in steps), **shares)


def _name(shares: dict[str, float]) -> str:
    for names, least in ((("capacity", "scheduler"), MOST), (("compute", "bandwidth"), NEAR_PEAK)):
        name = max(names, key=lambda one: shares[one])
        if shares[name] >= least:
            return name
    return max(("host", "operators"), key=lambda one: shares[one])


def phases(steps: Sequence[StepRecord]) -> tuple[list[StepRecord], list[StepRecord]]:
    """Steps with tokens of prompts, and steps that decode alone."""
    return [step for step in steps if step.prompt_tokens], [step for step in steps if not step.prompt_tokens]
