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


def test_w4a16_on_hopper() -> None:
    """wgmma, no spills, at most 1.3 integer instructions a weight (the row's own limit)."""
    result = run("--arch", "90", "--match", "int4 g128 bf16 M16")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "HGMMA" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "89", "90", "100"])
def test_every_kernel(arch: str) -> None:
    result = run("--arch", arch)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_amd_compiles_the_plain_twins() -> None:
    result = run("--amd")
    assert result.returncode == 0, result.stdout + result.stderr
