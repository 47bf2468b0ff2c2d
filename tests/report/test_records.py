"""Records become JSON once, and a block's record is read back from the journal as it was."""

import json
from pathlib import Path

import pytest

from quantkit.errors import UserError
from quantkit.report.block_records import (
    BlockRecord,
    FoldRecord,
    GptqErrors,
    LinearRecord,
    Outliers,
    RejectedFold,
    SkippedLinear,
)
from quantkit.report.records import CalibrationRecord, CalibrationSource, Report

ROUNDED = LinearRecord("q", "int4 sym g128", (8, 128), "rtn", 0.1 + 0.2)
WALKED = LinearRecord("k", "int4 sym g128", (8, 128), "gptq", 1 / 3, GptqErrors(0.7, 0.01, 4096))
PEAKED = LinearRecord("o", "int4", (8, 128), "rtn", 0.5, outliers=Outliers(4.5, None))
DEAD = LinearRecord("v", "int4", (8, 128), "gptq", 0.0, GptqErrors(0.7, 0.1, 9, dead_columns=3), "damping raised")
SCALED = FoldRecord("norm", ("q", "k"), exponents=(0.5, 0.25), loss_unscaled=2.0, loss=1.0)
FIXED, SEARCHED = FoldRecord("norm", ("q",), alpha=0.5), FoldRecord("up", ("down",), alpha=0.0, loss_unscaled=1, loss=1)


@pytest.mark.parametrize("linear", [ROUNDED, WALKED, DEAD, PEAKED], ids=lambda linear: linear.name)
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


REPORT = Report(
    quantkit="1.0",
    model="some/model",
    model_revision="abc",
    model_fingerprint="123",
    recipe={"model": "some/model", "calibration": {"data": "general"}},
    calibration=CalibrationRecord("f00", 4, 32, True, (CalibrationSource("general", "f01", bytes=9),)),
    versions={"quantkit": "1.0"},
    device="cpu",
    coverage="3 of 4 linears quantized",
    weights_quantized=0.9,
    bits_per_weight=4.25,
    bytes_before=12,
    bytes_after=4,
    blocks=(BlockRecord(0, (SCALED,), (ROUNDED, DEAD)), BlockRecord(1, (), (WALKED,))),
    skipped=(SkippedLinear("lm_head", "ignored"),),
    rotation={"seed": 0},
    kv_cache=None,
    folds_rejected=(RejectedFold("a -> b", "not equal"),),
    warnings=("one",),
    seconds={"quantize": 3.25},
    peak_memory_bytes=300,
    files={"model.safetensors": "f02"},
)


def test_a_report_is_read_back(tmp_path: Path) -> None:
    assert Report.from_json(json.loads(json.dumps(REPORT.to_json()))) == REPORT
    (tmp_path / "quantkit-report.json").write_text(json.dumps(REPORT.to_json()))
    assert Report.load(tmp_path) == Report.load(str(tmp_path / "quantkit-report.json")) == REPORT


@pytest.mark.parametrize("content", ["{}", "[]", "no JSON", '{"converted": {}, "linears": []}'])
def test_what_is_no_report(content: str, tmp_path: Path) -> None:
    (tmp_path / "quantkit-report.json").write_text(content)
    with pytest.raises(UserError, match=r"quantkit-report\.json"):
        Report.load(tmp_path)
    with pytest.raises(UserError, match="nowhere"):
        Report.load(tmp_path / "nowhere")
