"""Latencies of requests and their percentiles. No torch.

TTFT  time to the first token, from arrival
TPOT  time per output token behind the first: (last - first) / (tokens - 1)
ITL   time between steps that gave a request tokens (one step gives several where guesses are right)
E2E   from arrival to the last token
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class Timeline:
    """When a request arrived, and when each of its tokens came, in seconds of one clock."""

    arrival: float
    tokens: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and percentiles of a number of values, in seconds."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    most: float


def percentile(values: Sequence[float], percent: float) -> float:
    """Between the two nearest ranks, linearly (numpy's default). values: sorted, at least one."""
    at = (len(values) - 1) * percent / 100
    low = int(at)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (at - low)


def spread(values: Sequence[float]) -> Spread | None:
    """None where there are no values."""
    if not values:
        return None
    ranked = sorted(values)
    p50, p90, p95, p99 = (percentile(ranked, percent) for percent in PERCENTILES)
    return Spread(len(ranked), sum(ranked) / len(ranked), p50, p90, p95, p99, ranked[-1])


@dataclass(frozen=True, slots=True)
class Latencies:
    """Of a number of requests; TPOT and ITL are None where no request has two tokens."""

    ttft: Spread | None
    tpot: Spread | None
    itl: Spread | None
    e2e: Spread | None

    @classmethod
    def of(cls, requests: Sequence[Timeline]) -> "Latencies":
        """Of requests that have ended."""
        ended = [request for request in requests if request.tokens]
        several = [request for request in ended if len(request.tokens) > 1]
        steps = [sorted(set(request.tokens)) for request in several]
        return cls(
            spread([request.tokens[0] - request.arrival for request in ended]),
            spread([(r.tokens[-1] - r.tokens[0]) / (len(r.tokens) - 1) for r in several]),
            spread([later - sooner for times in steps for sooner, later in pairwise(times)]),
            spread([request.tokens[-1] - request.arrival for request in ended]),
        )

    def to_json(self) -> dict[str, Any]:
        """Its fields, in seconds."""
        return asdict(self)


def tokens_per_second(requests: Sequence[Timeline]) -> float:
    """Tokens by the seconds from the first arrival to the last token."""
    count = sum(len(request.tokens) for request in requests)
    first = min(request.arrival for request in requests)
    last = max((request.tokens[-1] for request in requests if request.tokens), default=first)
    return count / (last - first) if last > first else 0.0
