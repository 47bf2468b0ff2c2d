"""Requests of a benchmark: the same for a seed, within their bounds, at the rate that was asked for."""

from quantkit_eval.bench.options import Lengths, Scenario
from quantkit_eval.bench.workload import workload

SOURCE = list(range(1000))
MIXED = Scenario("requests", 400, Lengths(8, 128), Lengths(16, 32))


def test_lengths_are_within_bounds_and_the_seeds() -> None:
    found = workload(MIXED, SOURCE)
    assert {len(each.prompt) for each in found} <= set(range(8, 129))
    assert {each.output for each in found} == set(range(16, 33))
    assert all(each.time == 0 for each in found)
    assert min(len(each.prompt) for each in found) < 12
    assert max(len(each.prompt) for each in found) > 124
    assert found == workload(MIXED, SOURCE)
    assert found != workload(MIXED, SOURCE, seed=1)


def test_prompts_are_pieces_of_the_source() -> None:
    for each in workload(MIXED, SOURCE):
        assert each.prompt == [(each.prompt[0] + offset) % 1000 for offset in range(len(each.prompt))]
    fixed = Scenario("batch", 3, Lengths(2500, 2500), Lengths(1, 1))
    assert [len(each.prompt) for each in workload(fixed, SOURCE)] == [2500] * 3  # around the end


def test_a_shared_prefix() -> None:
    found = workload(MIXED, SOURCE, shared_prefix=7)
    assert len({tuple(each.prompt[:7]) for each in found}) == 1
    assert len({tuple(each.prompt[:8]) for each in found}) > 100
    assert [len(each.prompt) for each in found] == [len(each.prompt) for each in workload(MIXED, SOURCE)]


def test_arrivals_are_a_poisson_process() -> None:
    """400 gaps of mean 0.1 s: their mean within four of its standard errors, their spread that of an exponential."""
    found = workload(MIXED, SOURCE, rate=10)
    times = [each.time for each in found]
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    mean = sum(gaps) / len(gaps)
    assert abs(mean - 0.1) < 4 * 0.1 / 20
    assert 0.07 < (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 < 0.13
    assert [each.prompt for each in found] == [each.prompt for each in workload(MIXED, SOURCE, rate=1000)]
