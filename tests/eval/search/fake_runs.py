"""Rows, and a pool that makes them up: what a sweep does with its runs, without running any."""

import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantkit_eval.results import Interval
from quantkit_eval.search.results import Row, write_row
from quantkit_eval.search.run_worker import Job


def row_of(job: Job, size: int, kl: float, half: float = 0.001) -> Row:
    """A row whose figures are all alike but for size and KL."""
    one = Interval(0.5, 0.4, 0.6)
    model, recipe, text = job.hashes
    return Row(
        name=job.name, recipe=job.recipe, size_bytes=size, bits_per_weight=4.0, kl=Interval(kl, kl - half, kl + half),
        kl_p99=one, top1=one, flips=one, perplexity=one, perplexity_ratio=one, text_tokens=100, tasks={}, seconds=1.0,
        evaluation_seconds=1.0, resumed=False, peak_memory_bytes=1, tokens_per_second=1.0, device="cpu",
        versions={"python": "3"}, model_hash=model, recipe_hash=recipe, text_hash=text,
    )  # fmt: skip


@dataclass
class FakePool:
    """Each run is done at once: its size grows with its bits, its KL falls.

    fail: labels of runs that fail; die_after: runs until Ctrl-C
    """

    slots: int = 1
    fail: tuple[str, ...] = ()
    die_after: int | None = None
    started: list[Job] = field(default_factory=list)

    def start(self, job: Job) -> Hashable:
        if len(self.started) == self.die_after:
            raise KeyboardInterrupt
        self.started.append(job)
        return job.name

    def wait(self, running: Sequence[Hashable]) -> list[tuple[Hashable, str | None]]:
        job = next(job for job in self.started if job.name == running[0])
        if job.label in self.fail:
            return [(job.name, "it broke")]
        weights: dict[str, Any] = job.recipe["weights"]
        group = weights["group_size"]
        size = 1000 * weights["bits"] + (0 if isinstance(group, str) else 3200 // group)
        kl = 0.1 * 4.0 ** -weights["bits"] * (2.0 if "rtn" in weights["algorithm"] else 1.0)
        kl *= 0.5 if group == 32 else 1.0
        Path(job.folder).mkdir(parents=True, exist_ok=True)
        (Path(job.folder) / "recipe.json").write_text(json.dumps(job.recipe))
        write_row(Path(job.row), row_of(job, size, kl, kl / 100))
        return [(job.name, None)]

    def __enter__(self) -> "FakePool":
        return self

    def __exit__(self, *_: object) -> None:
        return None
