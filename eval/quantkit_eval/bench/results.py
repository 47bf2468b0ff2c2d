"""What a benchmark found. Everything is a plain number; `to_json` is what `quantkit bench --json` writes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from quantkit_eval.bench.machine import Peak
from quantkit_eval.bench.options import Scenario
from quantkit_eval.bench.regime import Regime
from quantkit_eval.bench.statistics import Latencies, Timeline, tokens_per_second


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of one scenario: its speed, and the moments of each request (arrival, first and last token).

    seconds  of the clock, without those in which nothing was there to do; processor_seconds: of all threads
    """

    tokens_per_second: float
    seconds: float
    processor_seconds: float
    requests: tuple[tuple[float, float, float], ...]

    @classmethod
    def of(cls, timelines: Sequence[Timeline], seconds: float, processor_seconds: float) -> "Sample":
        """Of requests that have ended."""
        moments = tuple((line.arrival, line.tokens[0], line.tokens[-1]) for line in timelines)
        return cls(tokens_per_second(timelines), seconds, processor_seconds, moments)


@dataclass(frozen=True, slots=True)
class Compared:
    """A baseline in one scenario.

    speedup  tokens a second of the engine, in the runs before and after the baseline's, by the baseline's
    processor_ratio  seconds of the processor that the baseline took, by those of the engine in these two runs: what
                     other programs take of the machine does not count
    same     of the requests, how many got the engine's tokens
    """

    name: str
    speedup: float
    processor_ratio: float
    same: int
    latencies: Latencies
    sample: Sample


@dataclass(frozen=True, slots=True)
class Measured:
    """The engine in one scenario, over all its runs.

    prompt_tokens, output_tokens  of one run; samples: one of each run
    memory   most bytes of the process; on a GPU that torch had allocated
    blocks   most that were held at a time, of all `cache_blocks`; block_bytes of each
    hits     tokens of prompts that the cache held already, of a run; acceptance: share of guesses that were right
    """

    scenario: Scenario
    prompt_tokens: int
    output_tokens: int
    latencies: Latencies
    prefill: Regime
    decode: Regime
    memory: int
    blocks: int
    cache_blocks: int
    block_size: int
    block_bytes: int
    hits: int
    preemptions: int
    drafted: int
    acceptance: float | None
    samples: tuple[Sample, ...]
    baselines: tuple[Compared, ...]

    @property
    def tokens_per_second(self) -> float:
        """The mean over runs."""
        return sum(sample.tokens_per_second for sample in self.samples) / len(self.samples)


@dataclass(frozen=True, slots=True)
class LlamaBench:
    """A row of llama-bench: tokens a second of prompts and of decoding, one sequence at a time; None: not measured."""

    name: str
    bytes: int
    prompt: float | None
    decode: float | None


@dataclass(frozen=True, slots=True)
class KindOfWork:
    """Seconds of a profiled run that went into one kind of operators."""

    kind: str
    seconds: float
    share: float


@dataclass(frozen=True, slots=True)
class Benchmark:
    """All of a run. options: as they were given; profile: seconds by kind of work, where a trace was asked for."""

    model: str
    options: dict[str, Any]
    device: str
    threads: int
    dtype: str
    kv_cache: str
    peak: Peak
    scenarios: tuple[Measured, ...]
    llama_bench: tuple[LlamaBench, ...]
    profile: tuple[KindOfWork, ...]
    seconds: float
    versions: dict[str, str]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Its fields, and each scenario's mean speed."""
        found = asdict(self)
        for entry, scenario in zip(found["scenarios"], self.scenarios, strict=True):
            entry["tokens_per_second"] = scenario.tokens_per_second
        return found
