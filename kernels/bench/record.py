"""What every benchmark shares: which device it runs on, and what stands beside its numbers."""

import json
import os
import shlex
import sys
from pathlib import Path

import torch
import triton


def device_here(small: bool) -> torch.device:
    """The GPU; with `small` the CPU will do (TRITON_INTERPRET=1), since nothing is timed."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if not small:
        raise SystemExit("no GPU here: only --small runs (with TRITON_INTERPRET=1), which times nothing")
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("no GPU here: set TRITON_INTERPRET=1")
    return torch.device("cpu")


def write(path: Path | None, result: dict, device: torch.device) -> None:
    """JSON with the GPU, the versions and the command; nothing without a path."""
    if path is None:
        return
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none: interpreter"
    head = {
        "gpu": gpu, "torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0],
        "command": shlex.join(["python", *sys.argv]),
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head | result, indent=1) + "\n")
    print(f"wrote {path}")
