"""Runs in quantkit's environment: the same job as llmcompressor_gptq.py; prints its seconds and peak memory as JSON."""

import argparse
import json
import os
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from quantkit.quantization import pipeline
from quantkit.recipe import load as recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("ids")
    parser.add_argument("output", type=Path)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--recipe", default="gptq-w4a16")
    parser.add_argument("--set", action="append", default=[])
    a = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    ids = load_file(a.ids)["ids"]
    loaded = recipe.load(a.recipe, [f"weights.group_size={a.group_size}", *a.set], a.model)
    begin = time.perf_counter()
    report = pipeline.quantize(loaded, a.output, calibration=ids, device="cpu", progress=False)
    result = {
        "seconds": time.perf_counter() - begin,
        "peak_bytes": report.peak_memory_bytes,
        "stages": report.seconds,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
