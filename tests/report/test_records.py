"""Records become JSON once, and a block's record is read back from the journal as it was."""

import json

import pytest

from quantkit.report.records import BlockRecord, FoldRecord, GptqErrors, LinearRecord

ROUNDED = LinearRecord("q", "int4 sym g128", (8, 128), "rtn", 0.1 + 0.2)
WALKED = LinearRecord("k", "int4 sym g128", (8, 128), "gptq", 1 / 3, GptqErrors(0.7, 0.01, 4096))
DEAD = LinearRecord("v", "int4", (8, 128), "gptq", 0.0, GptqErrors(0.7, 0.1, 9, dead_columns=3), "damping raised")
SCALED = FoldRecord("norm", ("q", "k"), exponents=(0.5, 0.25), loss_unscaled=2.0, loss=1.0)
FIXED, SEARCHED = FoldRecord("norm", ("q",), alpha=0.5), FoldRecord("up", ("down",), alpha=0.0, loss_unscaled=1, loss=1)


@pytest.mark.parametrize("linear", [ROUNDED, WALKED, DEAD], ids=lambda linear: linear.name)
@pytest.mark.parametrize("fold", [SCALED, FIXED, SEARCHED], ids=["awq", "alpha given", "alpha searched"])
def test_a_journal_gives_back_what_it_got(linear: LinearRecord, fold: FoldRecord) -> None:
    record = BlockRecord(3, (fold,), (linear,))
    assert BlockRecord.from_json(json.loads(json.dumps(record.to_json()))) == record


def test_lines_of_a_report() -> None:
    """The names and their order are what readers of quantkit-report.json have."""
    assert list(ROUNDED.to_json()) == ["name", "scheme", "shape", "algorithm", "error"]
    names = ["name", "scheme", "shape", "algorithm", "error_rounding", "error", "damping", "tokens"]
    assert list(WALKED.to_json()) == names
    assert list(DEAD.to_json()) == [*names, "note", "dead_columns"]
    assert list(SCALED.to_json()) == ["producer", "consumers", "exponents", "loss_unscaled", "loss"]
    assert list(FIXED.to_json()) == ["producer", "consumers", "alpha"]
