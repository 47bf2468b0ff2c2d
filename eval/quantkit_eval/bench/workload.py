"""Requests of a benchmark: lengths, arrivals and prompts, the same for the same seed. No torch."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from quantkit_eval.bench.options import Scenario


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: its prompt, how many tokens are generated, and seconds from the start to its arrival."""

    prompt: list[int]
    output: int
    time: float


def workload(
    scenario: Scenario, source: Sequence[int], *, rate: float | None = None, shared_prefix: int = 0, seed: int = 0
) -> list[Arrival]:
    """The requests in their order of arrival.

    source  tokens of a text, of which each prompt is a piece from a random place on (around its end as well)
    rate    requests a second, with exponential times between them (a Poisson process); None: all arrive at 0

    Lengths, places and times are drawn from generators of their own: another rate gives the same prompts.
    """
    sizes, places, times = (random.Random(f"{seed} {what}") for what in ("lengths", "places", "times"))
    shared, now, found = _piece(source, places, shared_prefix), 0.0, []
    for _ in range(scenario.requests):
        size = sizes.randint(scenario.input.least, scenario.input.most)
        output = sizes.randint(scenario.output.least, scenario.output.most)
        prompt = shared + _piece(source, places, size - len(shared))
        if rate is not None:
            now += times.expovariate(rate)
        found.append(Arrival(prompt, output, now))
    return found


def _piece(source: Sequence[int], places: random.Random, size: int) -> list[int]:
    start = places.randrange(len(source))
    return [source[(start + offset) % len(source)] for offset in range(size)]
