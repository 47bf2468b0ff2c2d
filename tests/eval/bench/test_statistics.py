"""Latencies with known numbers."""

import numpy as np
import pytest
from quantkit_eval.bench.statistics import Latencies, Timeline, percentile, spread, tokens_per_second


def test_percentiles_are_numpys() -> None:
    values = sorted([3.0, 1.0, 4.0, 1.5, 9.0, 2.6, 5.3])
    for percent in (0, 1, 50, 90, 95, 99, 100):
        assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))
    assert percentile([7.0], 99) == 7.0


def test_a_spread() -> None:
    found = spread([float(n) for n in range(100, -1, -1)])
    assert found is not None
    assert (found.count, found.mean, found.p50, found.p90, found.p95, found.p99, found.most) == (
        101, 50, 50, 90, 95, 99, 100,
    )  # fmt: skip
    assert spread([]) is None


def test_latencies_of_two_requests() -> None:
    """The second has one token, so that it has no time per token behind the first."""
    found = Latencies.of([Timeline(1.0, (1.5, 1.7, 2.1)), Timeline(2.0, (2.25,))])
    assert found.ttft is not None
    assert found.tpot is not None
    assert found.itl is not None
    assert found.e2e is not None
    assert (found.ttft.count, found.ttft.mean) == (2, pytest.approx(0.375))
    assert (found.tpot.count, found.tpot.mean) == (1, pytest.approx(0.3))
    assert (found.itl.count, found.itl.p50, found.itl.most) == (2, pytest.approx(0.3), pytest.approx(0.4))
    assert (found.e2e.count, found.e2e.p50) == (2, pytest.approx(0.675))
    assert Latencies.of([Timeline(2.0, (2.25,))]).tpot is None
    assert Latencies.of([Timeline(2.0, ())]).ttft is None


def test_tokens_of_one_step_are_one_gap() -> None:
    """Three tokens in two steps: TPOT counts tokens, ITL steps."""
    found = Latencies.of([Timeline(0.0, (1.0, 2.0, 2.0))])
    assert found.tpot is not None
    assert found.itl is not None
    assert found.tpot.mean == pytest.approx(0.5)
    assert (found.itl.count, found.itl.mean) == (1, 1.0)


def test_throughput_is_from_the_first_arrival_to_the_last_token() -> None:
    assert tokens_per_second([Timeline(1.0, (1.5, 3.0)), Timeline(2.0, (5.0,))]) == pytest.approx(3 / 4)
    assert tokens_per_second([Timeline(1.0, ())]) == 0
