"""Where a run's seconds and memory go."""

import resource
import time


class Clock:
    """Seconds by stage, and the process's peak resident memory."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}
        self.begin = self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.stages[stage] = self.stages.get(stage, 0.0) + now - self._last
        self._last = now

    @staticmethod
    def peak_bytes() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
