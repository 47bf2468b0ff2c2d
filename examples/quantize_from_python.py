"""Quantize the bundled model from Python, and look at what the report says.

python examples/quantize_from_python.py [OUTPUT]
"""

import sys
from pathlib import Path

import quantkit

HERE = Path(__file__).parent
OUTPUT = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("out/from-python")

RECIPE = {
    "calibration": {"data": str(HERE / "tiny-llama" / "calibration.txt"), "samples": 32, "seq_len": 256},
    "weights": {"bits": 4, "group_size": 64, "algorithm": "gptq"},
    "overrides": [{"match": "re:.*down_proj", "weights": {"bits": 8}}],
    "output": {"format": "compressed-tensors"},
}

if __name__ == "__main__":
    report = quantkit.quantize(HERE / "tiny-llama", RECIPE, OUTPUT)
    print(f"{report.coverage}; {report.bits_per_weight:.2f} bits per weight, {report.seconds_total:.1f} s")
    print(f"the checkpoint and its quantkit-report.json are in {OUTPUT}")
