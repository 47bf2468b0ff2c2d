"""A product depends neither on how many tokens come together nor on the processor.

Every scheme, 1 to 300 tokens, in processes that believe they have another processor: torch's own operators, oneDNN, the
compiled kernels and their dispatcher are each held to it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from quantkit_kernels.cpu import build

from tests.runtime.one_definition import SCHEMES

SCRIPT = Path(__file__).parent / "one_definition.py"
LIMIT = {"float32": 1e-5, "bfloat16": 5e-4, "float16": 5e-4}  # some of the rounded outputs may be one step away


class Processor(NamedTuple):
    """needs: flags of /proc/cpuinfo; environment: torch's and oneDNN's switches; options: of the script."""

    needs: tuple[str, ...] = ()
    environment: dict[str, str] = {}  # noqa: RUF012
    options: tuple[str, ...] = ()


AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
AVX512 = {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}
WIDE = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd")
PROCESSORS = {
    "this one": Processor(),
    "this one, no compiler": Processor(environment={"QUANTKIT_COMPILE": "0"}),
    "AVX2": Processor(("avx2", "fma", "f16c"), AVX2, ("-march=haswell", "-O1")),
    "AVX2, no compiler": Processor(("avx2", "fma", "f16c"), AVX2, ("-",)),
    "AVX512": Processor(WIDE, AVX512, ("-march=skylake-avx512", "-O1")),
    "AVX512 with VNNI and bfloat16": Processor(
        (*WIDE, "avx512_vnni", "avx512_bf16"), {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
        ("-march=cooperlake", "-O1", "--bf16", "--vnni"),
    ),
    "AVX512 with VNNI and bfloat16, no compiler": Processor(
        (*WIDE, "avx512_vnni", "avx512_bf16"), {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, ("-", "--bf16", "--vnni")
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROCESSORS)
def test_one_definition(name: str) -> None:
    processor = PROCESSORS[name]
    if missing := [flag for flag in processor.needs if flag not in build.processor().split()]:
        pytest.skip(f"this processor has no {', '.join(missing)}")
    if any(option.startswith("-march") for option in processor.options) and build.library() is None:
        pytest.skip("no C++ compiler here")
    command = [sys.executable, str(SCRIPT), *processor.options]
    environment = os.environ | processor.environment
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert {case.split(",")[0] for case in found} == set(SCHEMES)
    wrong = {case: errors for case, errors in found.items() if max(errors) > LIMIT[case.rpartition(" ")[2]]}
    assert not wrong
