"""The benchmark scripts run: on tiny shapes, checked and not timed, so that the first GPU does not find a typo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

BENCH = Path(__file__).parents[2] / "kernels/bench"


@pytest.mark.slow
@pytest.mark.parametrize("script", ["linear.py", "attention.py"])
def test_small(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / script), "--small", "--json", str(tmp_path / "rows.json")]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert '"error"' in (tmp_path / "rows.json").read_text()


def test_cpu_small(tmp_path: Path) -> None:
    """Needs no interpreter, so it is quick."""
    command = [sys.executable, str(BENCH / "cpu.py"), "--small", "--json", str(tmp_path / "rows.json")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["linear"]
    assert {row["format"] for row in rows} >= {"int4 g128", "fp8 channel", "nvfp4", "W8A8", "W4A8 g128"}
