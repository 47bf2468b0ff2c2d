"""`quantkit auto` as a user runs it: what it prints, and mistakes in one message with exit code 2."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from quantkit.cli import main as cli
from quantkit.report.allocation_record import AllocationRecord, CandidateShare

ROOT = Path(__file__).resolve().parents[2]
MODEL, TEXT = ROOT / "examples" / "tiny-llama", ROOT / "examples" / "tiny-llama" / "calibration.txt"
MADE = AllocationRecord("out", "4.5bpw", 4.4951, 5_250_000, 0.02, 0.025, 2048, (CandidateShare("W4A16:g64", 12, 0.75),))


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["auto", *map(str, arguments)])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """The calls of `quantkit.auto`, which quantizes nothing here."""
    found: list[tuple[Any, Any]] = []

    def auto(*arguments: Any, **options: Any) -> AllocationRecord:
        found.append((arguments, options))
        return MADE

    monkeypatch.setattr("quantkit.api.auto", auto)
    return found


def test_options_arrive(calls: list[tuple[Any, Any]]) -> None:
    given = ["--max-size", "5GB", "--engine", "vllm", "--tp", 2, "--candidates", "W4A16,FP8_DYNAMIC", "--text", "t.txt"]
    done = invoke("--model", MODEL, *given, "--samples", 64, "--seq-len", "auto", "-o", "out")
    assert done.exit_code == 0, done.output
    ((arguments, options),) = calls
    assert arguments == (str(MODEL), "5GB", Path("out"))
    assert (options["engine"], options["tp"], options["candidates"]) == ("vllm", 2, "W4A16,FP8_DYNAMIC")
    assert options["calibration"] == {"data": "t.txt", "samples": 64, "seq_len": "auto"}


def test_what_is_printed(calls: list[tuple[Any, Any]]) -> None:
    shown = invoke(MODEL, "--max-size", "4.5bpw", "-o", "out").output
    for part in (
        "W4A16:g64",
        "75.0%",
        "4.495 bits",
        "5,250,000 bytes",
        "predicted 0.02000",
        "measured 0.02500",
        "1.25",
    ):
        assert part in shown
    data = json.loads(invoke(MODEL, "--max-size", "4.5bpw", "-o", "out", "--json", "--quiet").stdout)
    assert (data["predicted_kl"], data["measured_kl"], data["ratio"]) == (0.02, 0.025, 1.25)
    assert data["shares"] == [{"candidate": "W4A16:g64", "linears": 12, "share": 0.75}]


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "no model"),
    (["A", "--model", "B", "--max-size", "4bpw", "-o", "out"], "two models"),
    ([MODEL, "-o", "out"], "no size"),
    ([MODEL, "--max-size", "4bpw"], "no output folder"),
    ([MODEL, "--max-size", "four", "-o", "out"], "`four` is no size"),
    ([MODEL, "--max-size", "4bpw", "-o", "out", "--engine", "vlm"], "did you mean `vllm`"),
    ([MODEL, "--max-size", "4bpw", "-o", "out", "--engine", "llama.cpp"], "GGUF"),
    ([MODEL, "--max-size", "4bpw", "-o", "out", "--candidates", "W4A61"], "did you mean `W4A16`"),
    ([MODEL, "--max-size", "4bpw", "-o", "out", "--text", "absent.txt"], "absent.txt"),
    ([MODEL, "--max-size", "4bpw", "-o", "out", "--samples", "many"], "no whole number"),
    ([MODEL, "--max-size", "4bpw", "-o", "out", "--tp", "0"], "tp"),
    (["absent", "--max-size", "4bpw", "-o", "out"], "absent"),
    ([MODEL, "--max-size", "4bpw", "-o", MODEL], "exists"),
])  # fmt: skip
def test_mistakes(arguments: list[Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke(*arguments)
    assert done.exit_code == 2, done.output
    assert message in done.output
    assert "Traceback" not in done.output
    assert not list(tmp_path.iterdir())


def test_impossible_sizes_are_answered_before_anything_is_measured(tmp_path: Path) -> None:
    given = [MODEL, "--text", TEXT, "--samples", 8, "--seq-len", 64, "-o", tmp_path / "out", "--candidates", "W3A16"]
    small, large = invoke(*given, "--max-size", "3.05bpw"), invoke(*given, "--max-size", "16bpw")
    assert (small.exit_code, large.exit_code) == (2, 2)
    assert "smallest is 3." in small.output
    assert "16bpw as it is stored" in large.output
    assert not list(tmp_path.iterdir())
