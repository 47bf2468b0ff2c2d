"""Runs side by side, each in a process of its own, on this machine."""

import os
import subprocess
import sys
import threading
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from types import TracebackType
from typing import NamedTuple, Protocol

from quantkit_eval.search.run_worker import Job, encoded

WORKER = "quantkit_eval.search.run_worker"


class Outcome(NamedTuple):
    """A run that has ended. error: why it failed, None where its row is written."""

    job: Job
    error: str | None


class Pool(Protocol):
    """What runs jobs: processes here, or tasks of Ray. slots: how many at a time."""

    slots: int

    def start(self, job: Job) -> Hashable:
        """Begin a run; returns what stands for it."""
        ...

    def wait(self, running: Sequence[Hashable]) -> list[tuple[Hashable, str | None]]:
        """Those that have ended, at least one, each with why it failed or None."""
        ...

    def __enter__(self) -> "Pool": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End every run that still goes on."""
        ...


def run_all(jobs: Iterator[Job], pool: Pool) -> Iterator[Outcome]:
    """Every run as it ends. The next job is asked for when a slot is free: it may depend on what has ended."""
    running: dict[Hashable, Job] = {}
    while True:
        while len(running) < pool.slots and (job := next(jobs, None)) is not None:
            running[pool.start(job)] = job
        if not running:
            return
        for done, error in pool.wait(list(running)):
            yield Outcome(running.pop(done), error)


def fitting(wanted: int, peaks: Sequence[int], free: int) -> int:
    """How many runs fit side by side, at least 1 and at most `wanted`: any of them, so the largest count.

    peaks: bytes that each run will take, by the plan; free: bytes of memory.
    """
    count, held = 0, 0
    for peak in sorted(peaks, reverse=True)[:wanted]:
        held += peak
        if held > free:
            break
        count += 1
    return max(1, count)


class Processes:
    """A pool of processes of this machine, which share its cores."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._threads = ThreadPoolExecutor(slots)
        self._running: set[subprocess.Popen[str]] = set()
        self._lock, self._closed = threading.Lock(), False
        cores = str(max(1, (os.cpu_count() or 1) // slots))
        self._environment = {"OMP_NUM_THREADS": cores} | os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}

    def start(self, job: Job) -> Future[str | None]:
        """A thread that waits for the process."""
        return self._threads.submit(self._run, job)

    def wait(self, running: Sequence[Hashable]) -> list[tuple[Hashable, str | None]]:
        """See Pool."""
        ended = wait([one for one in running if isinstance(one, Future)], return_when=FIRST_COMPLETED).done
        return [(one, one.result()) for one in ended]

    def _run(self, job: Job) -> str | None:
        with self._lock:
            if self._closed:
                return "interrupted"
            process = subprocess.Popen(
                [sys.executable, "-m", WORKER], env=self._environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            )  # fmt: skip
            self._running.add(process)
        assert process.stdin is not None
        assert process.stderr is not None
        try:
            process.stdin.write(encoded(job))
            process.stdin.flush()  # and it stays open: the process ends when it is closed
            text = process.stderr.read()
            return _failure(process.wait(), text)
        except BrokenPipeError:
            return _failure(process.wait(), process.stderr.read())
        finally:
            self._running.discard(process)
            process.stderr.close()
            with suppress(BrokenPipeError):
                process.stdin.close()

    def __enter__(self) -> "Processes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """See Pool. Returns when all processes are gone."""
        with self._lock:
            self._closed = True
            running = list(self._running)
        for process in running:
            process.kill()  # what it has written is kept and taken up again; nothing else needs an orderly end
        self._threads.shutdown(cancel_futures=True)


def _failure(code: int, text: str) -> str | None:
    """Why a process failed, None where it did not: its own message, or how it ended."""
    if code == 0:
        return None
    if code < 0:
        return f"its process was ended by signal {-code}" + (" (out of memory?)" if code == -9 else "")
    lines = text.strip().splitlines()
    own = [at for at, line in enumerate(lines) if line.startswith("error: ")]
    message = "\n".join(lines[own[-1] :]) if own else (lines or [f"its process ended with code {code}"])[-1]
    return message.removeprefix("error: ")
