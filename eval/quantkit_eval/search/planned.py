"""What each run of a sweep will take here, by the planner: impossible ones are known before any work."""

from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import DiskFullError, UserError
from quantkit.planner.advice import GB
from quantkit.planner.estimate import estimate
from quantkit.planner.this_machine import Machine
from quantkit.quantization.early_checks import check_folder
from quantkit.report.plan import Plan
from quantkit_eval.evaluation import BATCH_BYTES
from quantkit_eval.search.grid import Combination, Impossible

FLOAT = 4  # bytes; both models are evaluated in float32 on a CPU


@dataclass(frozen=True, slots=True)
class Planned:
    """A combination that can run here.

    peak_bytes: of memory; size_bytes: of its folder; disk_bytes: while it runs
    """

    combination: Combination
    peak_bytes: int
    size_bytes: int
    disk_bytes: int


def plan_run(combination: Combination, folder: Path, machine: Machine, trust_remote_code: bool) -> Planned | Impossible:
    """What a run will take; Impossible for what a run refuses, in its words, and for more memory than is free."""
    recipe = combination.recipe
    try:
        check_folder(recipe, folder, calibrated=True)  # the evaluation reads text
        plan = estimate(recipe, folder, machine=machine, trust_remote_code=trust_remote_code)
    except UserError as error:
        return Impossible(combination.settings, " ".join(str(error).split("\nhint:")[0].split()))
    peak = max(plan.peak_memory_bytes, _evaluation_bytes(plan, machine))
    if peak > machine.free_memory:
        free = machine.free_memory / GB
        return Impossible(combination.settings, f"needs about {peak / GB:.1f} GB of memory, {free:.1f} GB are free")
    return Planned(combination, peak, plan.bytes_after, plan.disk_bytes)


def _evaluation_bytes(plan: Plan, machine: Machine) -> int:
    """Of the process that evaluates: both models, and logits of a batch as they are compared."""
    return machine.process + FLOAT * sum(plan.params.values()) + plan.bytes_after + 6 * BATCH_BYTES


def check_room(runs: list[Planned], keep: str, slots: int, folder: Path, free: int) -> None:
    """DiskFullError where the disk has no room for what the runs still have to write.

    Of a front, at most one folder for each size is kept.
    """
    sizes = [run.size_bytes for run in runs]
    kept = {"none": 0, "all": sum(sizes)}.get(keep, sum(set(sizes)))
    needed = kept + sum(sorted((run.disk_bytes for run in runs), reverse=True)[:slots])
    if needed > free:
        hint = "free some, or write elsewhere" if keep == "none" else "pass --keep none, free some, or write elsewhere"
        raise DiskFullError(
            f"{folder}: no room for the sweep's folders: {len(runs)} runs need {needed / GB:.3g} GB with "
            f"--keep {keep}, {free / GB:.3g} GB are free\nhint: {hint}"
        )
