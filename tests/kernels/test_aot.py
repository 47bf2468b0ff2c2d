"""The gate on machine code: kernels are compiled for GPUs that are not here, and their instructions are counted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[2] / "kernels/bench/aot.py"


def run(*options: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: kernels made for the interpreter cannot be compiled."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_every_kernel_and_config() -> None:
    """sm_80, 89, 90, 100 compile; on sm_90 the tensor-core class, spills, registers, shared memory, integer work."""
    result = run()
    assert result.returncode == 0, result.stdout + result.stderr
    rows = result.stdout.splitlines()[2:]
    assert {row.split()[0] for row in rows} == {"sm_80", "sm_89", "sm_90", "sm_100"}
    assert any(row.startswith("sm_90") and "int4 g128" in row and "HGMMA" in row for row in rows)


@pytest.mark.slow
def test_amd_compiles_the_plain_twins() -> None:
    result = run("--amd")
    assert result.returncode == 0, result.stdout + result.stderr
