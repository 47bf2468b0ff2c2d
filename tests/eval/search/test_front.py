"""The front: against its definition, with intervals that overlap, and as a picture."""

import itertools
import random
from pathlib import Path

import pytest
from quantkit_eval.results import Interval
from quantkit_eval.search import front as front_module
from quantkit_eval.search.front import NO_PLOT, Point, best, dominates, like_the_one_before, pareto, write_plot


def point(name: str, size: int, kl: float, half: float = 0.0) -> Point:
    return Point(name, f"x={name}", size, Interval(kl, kl - half, kl + half))


def names(points: list[Point]) -> str:
    return "".join(one.name for one in points)


def test_smaller_or_clearly_lower() -> None:
    points = [point("a", 10, 0.5), point("b", 20, 0.1), point("c", 20, 0.2), point("d", 30, 0.15), point("e", 5, 0.9)]
    assert names(pareto(points)) == "eab"


def test_overlapping_intervals_of_one_size_are_not_called_different() -> None:
    points = [point("a", 10, 0.5, 0.1), point("b", 10, 0.55, 0.1), point("c", 10, 0.8, 0.1)]
    assert names(pareto(points)) == "ab"


def test_a_larger_one_that_is_not_clearly_better_is_marked() -> None:
    points = [point("a", 10, 0.5, 0.01), point("b", 20, 0.3, 0.05), point("c", 30, 0.28, 0.05)]
    assert names(pareto(points)) == "abc"
    assert like_the_one_before(pareto(points)) == [False, False, True]
    assert like_the_one_before([]) == []


def test_best_is_the_smallest_that_cannot_be_told_from_the_lowest() -> None:
    points = [point("a", 10, 0.5, 0.01), point("b", 20, 0.3, 0.05), point("c", 30, 0.28, 0.05), point("d", 40, 0.9)]
    found = best(points)
    assert found is not None
    assert found.name == "b"
    assert best([]) is None


def test_what_is_dominated_stays_so() -> None:
    """A partial order, so that models can be dropped while a sweep goes on."""
    draw = random.Random(0)
    points = [point(str(n), draw.randint(1, 4), draw.randint(1, 9) / 10, draw.randint(0, 2) / 10) for n in range(14)]
    for a, b, c in itertools.permutations(points, 3):
        assert not (dominates(a, b) and dominates(b, c)) or dominates(a, c)
        assert not (dominates(a, b) and dominates(b, a))
    kept: list[Point] = []
    for one in points:
        kept = pareto([*kept, one])
    assert kept == pareto(points)


def test_the_plot_has_a_bar_for_each_point(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    points = [point("a", 10, 0.5, 0.1), point("$b_$", 20, 0.3, 0.05), point("c", 30, 0.4, 0.5)]
    assert write_plot(points, tmp_path / "front.svg", "a $model_") is None
    assert [path.name for path in tmp_path.iterdir()] == ["front.svg"]
    text = (tmp_path / "front.svg").read_text()
    assert text.count('id="LineCollection') == 4  # of the front and of the others, each also in the legend
    assert write_plot([], tmp_path / "empty.svg", "nothing ran") is None


def test_no_matplotlib_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_module, "find_spec", lambda name: None)
    assert write_plot([point("a", 1, 1)], tmp_path / "front.svg", "") == NO_PLOT
    assert "quantkit[report]" in NO_PLOT
    assert not any(tmp_path.iterdir())
