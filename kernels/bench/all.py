"""One command for a GPU: run the kernel tests on it, then every benchmark. Results go to kernels/bench/results/.

python kernels/bench/all.py [--skip-tests]
"""

import re
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent


def main() -> int:
    """The first failure's exit code, else 0."""
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here; `python kernels/bench/aot.py` and the tests are what runs without one")
    name = re.sub("[^A-Za-z0-9]+", "_", torch.cuda.get_device_name()).strip("_")
    results = HERE / "results"
    commands = [
        [sys.executable, "-m", "pytest", "-q", "tests/kernels", "-m", "not slow", "-p", "no:cacheprovider"],
        [sys.executable, str(HERE / "linear.py"), "--json", str(results / f"{name}-linear.json")],
        [sys.executable, str(HERE / "attention.py"), "--json", str(results / f"{name}-attention.json")],
    ]
    for command in commands["--skip-tests" in sys.argv :]:
        began = time.perf_counter()
        code = subprocess.run(command, check=False, cwd=HERE.parents[1]).returncode
        print(f"{time.perf_counter() - began:.0f} s, exit code {code}: {' '.join(command)}", flush=True)
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
