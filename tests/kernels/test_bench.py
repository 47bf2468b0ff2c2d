"""The benchmark scripts run: on tiny shapes, checked and not timed, so that the first GPU does not find a typo."""

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
