"""Paired differences, recovery and verdicts, by worked examples."""

import numpy as np
import pytest
from quantkit_eval.tasks.comparison import compare, paired_difference, verdict

from quantkit.errors import RunError


def answers(right: int, lost: int, gained: int, wrong: int) -> tuple[np.ndarray, np.ndarray]:
    """The scores of a model and its original: both right, lost, gained, both wrong."""
    model = [1] * right + [0] * lost + [1] * gained + [0] * wrong
    original = [1] * right + [1] * lost + [0] * gained + [0] * wrong
    return np.array(model, dtype=float), np.array(original, dtype=float)


def judged(right: int, lost: int, gained: int, wrong: int, chance: float = 0.0) -> str | None:
    model, original = answers(right, lost, gained, wrong)
    value, stderr = original.mean(), original.std(ddof=1) / np.sqrt(len(original))
    found = compare(model.mean(), value, stderr, chance, higher_is_better=True, answers=(model, original))
    return found.verdict


def test_the_difference_is_of_the_same_questions() -> None:
    paired = paired_difference(*answers(50, 8, 2, 40))
    assert (paired.lost, paired.gained) == (8, 2)
    assert paired.difference == pytest.approx(-0.06)
    # ten flips: variance (10/100 - 0.06^2) * 100/99, not the two values' own of 0.25 each
    assert paired.stderr == pytest.approx(np.sqrt((0.1 - 0.0036) / 99))
    # half a flip more in each of the four cells: (2.5 - 8.5) / 102, and 11 flips
    assert (paired.low + paired.high) / 2 == pytest.approx(-6 / 102)
    assert (paired.high - paired.low) / 2 == pytest.approx(1.959964 * np.sqrt(11 - 36 / 102) / 102)


def test_no_flips_prove_something_only_where_there_are_many_questions() -> None:
    assert judged(6, 0, 0, 4) == "cannot tell"
    assert judged(600, 0, 0, 400) == "recovered"


def test_a_loss_below_one_per_cent_of_the_value_is_none() -> None:
    assert judged(6000, 20, 10, 4000) == "recovered"  # -0.1 % of 60 %, surely above -0.6 %
    assert judged(6000, 300, 100, 3600) == "lost"
    assert judged(60, 5, 3, 32) == "cannot tell"
    assert judged(600, 2, 60, 340) == "recovered"  # better than the original


def test_an_original_at_chance_proves_nothing() -> None:
    assert judged(260, 0, 0, 740, chance=0.25) == "cannot tell"
    assert judged(600, 0, 0, 400, chance=0.25) == "recovered"
    paired = paired_difference(*answers(600, 0, 0, 400))
    assert verdict(paired, 0.6, None, 0.0) == "cannot tell"


def test_recovery_as_model_cards_give_it_and_above_chance() -> None:
    found = compare(0.4968, 0.5, 0.01, 0.25, higher_is_better=True, answers=None)
    assert found.recovery == pytest.approx(0.9936)
    assert found.above_chance == pytest.approx((0.2468, 0.25))
    assert found.paired is None
    assert found.verdict is None
    assert compare(12.0, 10.0, 0.1, 0.0, higher_is_better=False, answers=None).recovery is None
    assert compare(0.0, 0.0, 0.0, 0.0, higher_is_better=True, answers=None).recovery is None


def test_other_questions_are_refused() -> None:
    with pytest.raises(RunError, match="2 and 3 answers"):
        paired_difference(np.ones(2), np.ones(3))
