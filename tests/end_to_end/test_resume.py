"""kill -9 at random moments, the same command again: the bytes of an uninterrupted run."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = ROOT / "examples" / "tiny-llama" / "calibration.txt"


def command(output: Path) -> list[str]:
    settings = [f"calibration={{data: {TEXT}, samples: 12, seq_len: 64}}", "transforms=[awq]"]
    sets = [part for setting in settings for part in ("--set", setting)]
    model = ROOT / "examples" / "tiny-llama"
    return [
        sys.executable,
        "-m",
        "quantkit",
        "quantize",
        "-r",
        "gptq-w4a16",
        "-m",
        str(model),
        "-o",
        str(output),
        *sets,
    ]


def start(output: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "eval")))}
    return subprocess.Popen(command(output), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def digest(folder: Path) -> dict[str, str]:
    files = (path for path in folder.iterdir() if path.name != "quantkit-report.json")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_killed_at_random_moments(tmp_path: Path) -> None:
    whole, output = tmp_path / "whole", tmp_path / "out"
    journal = tmp_path / "whole.partial" / "journal.jsonl"
    begin = time.monotonic()
    process = start(whole)
    while not journal.exists() and process.poll() is None:
        time.sleep(0.01)
    warm = time.monotonic() - begin  # imports and reading: a kill before this tests nothing
    assert process.wait() == 0, process.stderr and process.stderr.read()
    work = time.monotonic() - begin - warm

    chance = random.Random(os.getpid())  # other moments in every run of this test
    killed_inside = 0
    journal = tmp_path / "out.partial" / "journal.jsonl"
    for attempt in range(4):
        process = start(output)
        while not journal.exists() and process.poll() is None:  # the first has work to lose however slow the machine is
            time.sleep(0.01)
        time.sleep(warm + work * chance.uniform(0.0, 0.7) if attempt else work * chance.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if output.exists():  # it was done before
            break
        killed_inside += (tmp_path / "out.partial").exists()
    if not output.exists():
        process = start(output)
        assert process.wait() == 0, process.stderr and process.stderr.read()
    assert killed_inside, "every kill came too early or too late to mean anything"
    assert digest(output) == digest(whole)
    assert not (tmp_path / "out.partial").exists()
