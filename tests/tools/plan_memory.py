"""What `quantkit plan` says of memory and time beside what `quantkit quantize` takes, each in a process of its own.

python tests/tools/plan_memory.py --model examples/tiny-llama --text examples/tiny-llama/calibration.txt
python tests/tools/plan_memory.py --model M --text T --samples 64 --seq-len 512 gptq-w4a16 fp8-dynamic

Measured memory is the most the process ever held (ru_maxrss), libraries included.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

RECIPES = (
    *("rtn-w4a16", "rtn-w8a16", "fp8-dynamic", "gptq-w4a16", "gptq-w4a16-g32", "gptq-w3a16", "awq", "awq-gptq-w4a16"),
    *("rotation-gptq-w4a16", "fp8-kv", "w8a8", "nvfp4", "mxfp4a16", "mixed-fp8-w4a16"),
)
COMMAND = [sys.executable, "-m", "quantkit"]


@dataclass(frozen=True)
class Row:
    """One recipe: peak memory in bytes and seconds, as planned and as measured."""

    recipe: str
    planned_bytes: int
    measured_bytes: int
    planned_seconds: float
    measured_seconds: float

    @property
    def ratio(self) -> float:
        """The plan's memory by the measured one."""
        return self.planned_bytes / self.measured_bytes


def compare(recipe: str, model: str, text: str, *, samples: int, seq_len: int) -> Row:
    """Plan and run one recipe on the first samples x seq_len tokens of a text file."""
    given = [*("--recipe", recipe, "--model", model, "--set", "output.engine=null", "--json")]
    if recipe not in ("rtn-w8a16", "fp8-dynamic"):  # these two read no text
        given += ["--calibration", text, "--samples", str(samples), "--seq-len", str(seq_len)]
        given += ["--set", "calibration.seed=null"]
    plan = json.loads(subprocess.run([*COMMAND, "plan", *given], check=True, capture_output=True, text=True).stdout)
    with tempfile.TemporaryDirectory(prefix="quantkit-plan-") as scratch:
        output = Path(scratch) / "out"
        run = subprocess.Popen(
            [*COMMAND, "quantize", *given, "--quiet", "--output", str(output)], stdout=subprocess.DEVNULL
        )
        _, status, used = os.wait4(run.pid, 0)
        if status:
            raise SystemExit(f"quantize --recipe {recipe} failed")
        report = json.loads((output / "quantkit-report.json").read_text())
    return Row(recipe, plan["peak_memory_bytes"], used.ru_maxrss * 1024, plan["seconds_total"], report["seconds_total"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True, help="calibration text")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    a = parser.parse_args()
    print(
        "| recipe | memory, plan | measured | plan / measured | seconds, plan | measured |\n|---|---|---|---|---|---|"
    )
    for recipe in a.recipes:
        row = compare(recipe, a.model, a.text, samples=a.samples, seq_len=a.seq_len)
        memory = f"{row.planned_bytes / 1e6:.0f} MB | {row.measured_bytes / 1e6:.0f} MB | {row.ratio:.2f}"
        print(f"| {recipe} | {memory} | {row.planned_seconds:.1f} | {row.measured_seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
