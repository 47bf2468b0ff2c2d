"""Runs as tasks of Ray, on this machine or on a cluster whose machines see the same folders."""

import logging
import os
import sys
from collections.abc import Hashable, Sequence
from types import TracebackType
from typing import Any

from quantkit.errors import UserError
from quantkit_eval.search.run_worker import Job, attempt

HERE = "local"  # in place of an address: a Ray of this machine, for this sweep alone


class RayTasks:
    """A pool of Ray tasks, each in a process of its own; Ray decides when and where, by cores and memory.

    wanted   how many at a time; None: as many as there are cores. A Ray that runs in this process is used as it is.
    """

    def __init__(self, address: str, wanted: int | None) -> None:
        import ray

        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        self._ray: Any = ray
        self._own = not ray.is_initialized()
        if self._own:
            try:
                ray.init(address, include_dashboard=None, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, ValueError, RuntimeError) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise UserError(
                    f"--ray {address}: no Ray answers there ({reason})\nhint: `ray start --head`, or --ray alone"
                ) from error
        there = ray.cluster_resources()
        cores = max(1, int(there.get("CPU", 1)))
        self.slots = min(wanted or cores, cores)
        self._memory = int(there.get("memory", 0))
        environment = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": str(cores // self.slots)}
        self._task: Any = ray.remote(
            max_calls=1, max_retries=0, num_cpus=cores // self.slots, runtime_env={"env_vars": environment}
        )(attempt)
        self._started: list[Any] = []

    def start(self, job: Job) -> Hashable:
        """A task; it waits until its memory is free, and takes all of it where the plan asks for more than there is."""
        task = self._task.options(memory=min(job.peak_bytes, self._memory)).remote(job)
        self._started.append(task)
        return task

    def wait(self, running: Sequence[Hashable]) -> list[tuple[Hashable, str | None]]:
        """See Pool."""
        ended, _ = self._ray.wait(list(running), num_returns=1)
        return [(task, self._result(task)) for task in ended]

    def _result(self, task: Any) -> str | None:
        try:
            return self._ray.get(task)
        except self._ray.exceptions.RayError as error:
            return (str(error).strip().splitlines() or [type(error).__name__])[0]

    def __enter__(self) -> "RayTasks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """See Pool."""
        if kind is not None:
            for task in self._started:
                self._ray.cancel(task, force=True)
        if self._own:
            self._ray.shutdown()
