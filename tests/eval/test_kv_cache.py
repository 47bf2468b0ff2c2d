"""The script behind the table of KL by cache formats: its rows, on a little text."""

from pathlib import Path

import kv_cache
import pytest

from quantkit.types import KVSpec

MODEL = Path(__file__).parents[2] / "examples" / "tiny-llama"


def test_names() -> None:
    best = KVSpec(4, "int", "token", symmetric=False, group_size=32, packed=True, channels=True)
    assert kv_cache.side_of("int4-asym-g32-packed+channels") == best
    assert kv_cache.side_of("int8") == KVSpec(8, "int", "token")
    assert kv_cache.side_of("none") is None
    for name in (*kv_cache.FORMATS, *kv_cache.GRID):
        kv_cache.side_of(name)


def test_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Constants of channels help, keys need more bits than values, and nothing rounded is no row."""
    text = (MODEL / "eval.txt").read_text(encoding="utf-8")
    for name, part in (("calibration", text[:4000]), ("eval", text[4000:7000])):
        (tmp_path / name).write_text(part, encoding="utf-8")
    measured = kv_cache.Measurement(str(MODEL), str(tmp_path / "calibration"), str(tmp_path / "eval"), 64, 64)
    kv_cache.by_format(measured, ["int8", "int4-asym-g32-packed", "int4-asym-g32-packed+channels"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[1] for row in rows] == ["8.25", "4.5", "4.5"]
    int8, plain, channels = (float(row[2]) for row in rows)
    assert 0 < int8 < 1e-3 < channels < plain
    kv_cache.by_side(measured, ["none", "int8", "int4"])
    table = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    cells = {(row[0].split()[0], name): cell.strip() for row in table for name, cell in
             zip(("none", "int8", "int4"), row[1:], strict=True)}  # fmt: skip
    assert cells["none", "none"] == ""
    assert float(cells["int8", "int8"]) == pytest.approx(int8, abs=2e-6)
    assert float(cells["int8", "int4"]) < float(cells["int4", "int8"])
