"""One command for a GPU: run the kernel tests on it, then every benchmark. Results go to kernels/bench/results/.

    python kernels/bench/all.py [--skip-tests]

Test files run beside each other, since compiling is most of their time; benchmarks have the GPU to themselves.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def test() -> int:
    """The number of test files that failed; their output is shown, the others' last line."""
    files = sorted((ROOT / "tests/kernels").glob("test_*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
    running = [
        subprocess.Popen([*command, str(f)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for f in files
    ]
    failed = 0
    for file, process in zip(files, running, strict=True):
        text = process.communicate()[0].strip()
        failed += process.returncode != 0
        print(f"{file.name}: {text if process.returncode else text.splitlines()[-1]}", flush=True)
    return failed


def main() -> int:
    """1 where a test or a benchmark's own check failed."""
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here; `python kernels/bench/aot.py` and the tests are what runs without one")
    began = time.perf_counter()
    if "--skip-tests" not in sys.argv and test():
        return 1
    print(f"tests: {time.perf_counter() - began:.0f} s", flush=True)
    name = re.sub("[^A-Za-z0-9]+", "_", torch.cuda.get_device_name()).strip("_")
    for area in ("linear", "attention"):
        began = time.perf_counter()
        command = [sys.executable, str(HERE / f"{area}.py"), "--json", str(HERE / f"results/{name}-{area}.json")]
        if subprocess.run(command, check=False, cwd=ROOT).returncode:
            return 1
        print(f"{area}: {time.perf_counter() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
