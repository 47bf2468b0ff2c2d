"""A search by Optuna: seeded, over the space that is asked for, and taken up again after Ctrl-C. Runs are made up."""

from pathlib import Path

import pytest
from quantkit_eval.search.results import read_row

from quantkit.errors import UserError
from tests.eval.search.fake_runs import FakePool
from tests.eval.search.test_sweep_run import Run, home, labels, run, tiny

pytest.importorskip("pyarrow")
pytest.importorskip("optuna")
__all__ = ["home", "run", "tiny"]  # fixtures
SPACE = ("weights.bits=2..8", "weights.group_size=16,32,64,48", "weights.symmetric=true,false")


def test_a_search_runs_as_many_as_are_asked_for_and_goes_on(run: Run, home: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(FakePool(die_after=4), *SPACE, search=7)
    assert len(list((home / "out" / "rows").iterdir())) == 4
    pool = FakePool()
    result = run(pool, *SPACE, search=7)
    assert len(pool.started) == 3
    assert len(result.entries) == 7
    assert len({entry.row.name for entry in result.entries if entry.row}) == 7
    assert all(set(entry.settings) == {key.partition("=")[0] for key in SPACE} for entry in result.entries)
    assert all("does not divide" in one.reason for one in result.impossible)
    again = FakePool()
    run(again, *SPACE, search=7)
    assert not again.started
    more = FakePool()
    assert len(run(more, *SPACE, search=9).entries) == 9
    assert len(more.started) == 2
    with pytest.raises(UserError, match="another sweep, a search; this is a grid"):
        run(FakePool(), "weights.bits=3,4")


def test_it_is_seeded(run: Run, home: Path) -> None:
    found = []
    for at, seed in enumerate((1, 1, 2)):
        pool = FakePool()
        run(pool, *SPACE, search=3, seed=seed, output=home / f"out{at}")
        found.append(labels(pool))
    assert found[0] == found[1] != found[2]


def test_a_small_space_is_exhausted(run: Run, home: Path) -> None:
    pool = FakePool()
    result = run(pool, "weights.bits=3,4", "weights.group_size=32,48", search=10)
    assert sorted(labels(pool)) == ["bits=3 group_size=32", "bits=4 group_size=32"]
    assert len(result.impossible) == 2
    assert any("found 2 different runs; 10 were asked for" in remark for remark in result.remarks)


def test_another_text_is_another_study(run: Run, home: Path) -> None:
    run(FakePool(), *SPACE, search=3)
    (home / "text.txt").write_text((home / "text.txt").read_text() + "changed")
    pool = FakePool()
    result = run(pool, *SPACE, search=3)
    assert len(pool.started) == 3
    assert len(result.entries) == 3


def test_failed_runs_end_the_search_too(run: Run, home: Path) -> None:
    pool = FakePool(fail=tuple(f"weights.bits={bits}" for bits in (3, 4)))
    result = run(pool, "weights.bits=3,4,8", search=3)
    assert len(result.failed) == 2
    assert len(pool.started) == 3
    assert all(read_row(path) is not None for path in (home / "out" / "rows").iterdir())
