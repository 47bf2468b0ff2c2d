"""The exact knapsack against all combinations, and at the size of a real model."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import UserError
from quantkit.quantization.knapsack import Costs, allocate

HARM = st.one_of(st.integers(0, 4).map(float), st.floats(0, 1e3))
ITEMS = st.lists(st.lists(st.tuples(st.integers(0, 12), HARM), min_size=1, max_size=4), max_size=6)


def total(costs: Costs, chosen: tuple[int, ...] | list[int]) -> tuple[int, float]:
    picked = [row[i] for row, i in zip(costs, chosen, strict=True)]
    return sum(nbytes for nbytes, _ in picked), sum(harm for _, harm in picked)


@settings(max_examples=200, deadline=None)
@given(ITEMS, st.integers(0, 60))
def test_no_combination_is_better(costs: Costs, budget: int) -> None:
    fitting = [
        total(costs, chosen) for chosen in product(*map(range, map(len, costs))) if total(costs, chosen)[0] <= budget
    ]
    if not fitting:
        with pytest.raises(UserError, match="bytes are needed"):
            allocate(costs, budget)
        return
    nbytes, harm = total(costs, allocate(costs, budget))
    assert nbytes <= budget
    assert harm <= min(harm for _, harm in fitting) * (1 + 1e-12)


def test_nothing_to_choose() -> None:
    assert allocate([], 0) == []
    assert allocate([[(5, 1.0)]], 5) == [0]


def test_a_choice_that_costs_nothing_more_is_taken() -> None:
    assert allocate([[(4, 2.0), (4, 1.0), (3, 1.0)], [(1, 0.0)]], 100) == [2, 0]


def test_a_greedy_choice_by_harm_per_byte_is_not_the_best() -> None:
    costs = [[(0, 6.0), (5, 0.0)], [(0, 5.0), (4, 1.0)], [(0, 5.0), (4, 1.0)]]  # 1.2 a byte first, then nothing fits
    assert allocate(costs, 8) == [0, 1, 1]


def test_a_large_model_takes_no_time() -> None:
    rng = np.random.default_rng(0)
    bits = np.array([2.625, 3.4375, 4.25, 4.5, 5.0, 5.5, 6.0, 6.5625, 8.5, 16])
    costs = []
    for i in range(80 * 7):
        weights = [8192 * 8192, 1024 * 8192, 1024 * 8192, 8192 * 8192, *[28672 * 8192] * 3][i % 7]
        scale = float(rng.lognormal(0, 2))
        costs.append([(int(weights * b / 8), scale * float(4.0**-b * rng.lognormal(0, 0.1))) for b in bits])
    budget = int(sum(row[3][0] for row in costs) * 0.97)
    nbytes, _ = total(costs, allocate(costs, budget))
    assert 0.9999 * budget < nbytes <= budget
