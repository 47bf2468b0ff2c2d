"""Quantize one model by several recipes, evaluate each result, print one table: how the README's figures are made.

    python -m quantkit_eval.search.sweep --model M --calibration TEXT --eval TEXT [--recipe NAME[:key=value,...]]...

Each recipe that calibrates gets the given text, the first 128 x 256 tokens of it; each result is compared with the
original on the first 16,384 tokens of the other text in windows of 256. No engine is asked whether it would load it.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from quantkit.errors import UserError
from quantkit.quantization import pipeline
from quantkit.recipe import load as recipes
from quantkit_eval.evaluation import evaluate

DEFAULT = ("rtn-w4a16", "awq", "gptq-w4a16", "awq-gptq-w4a16")


def measure(
    model: str, name: str, calibration: str, text: str, *, samples: int = 128, seq_len: int = 256, tokens: int = 16384
) -> dict[str, Any]:
    """One row: recipe `name` (with settings as NAME:key=value,key=value), its size and its distance from `model`."""
    recipe, _, settings = name.partition(":")
    given = ["output.engine=null", *filter(None, _split(settings))]
    if recipes.load(recipe, given, model).calibration is not None:
        text_data = json.dumps(calibration)
        given.append(f"calibration={{data: {text_data}, samples: {samples}, seq_len: {seq_len}, seed: null}}")
    loaded = recipes.load(recipe, given, model)
    with tempfile.TemporaryDirectory(prefix="quantkit-sweep-") as scratch:
        report = pipeline.quantize(loaded, Path(scratch) / "out", progress=False)
        result = evaluate(Path(scratch) / "out", ref=model, text=text, context=256, max_tokens=tokens, progress=False)
    return {
        "recipe": name,
        "bits": report.bits_per_weight,
        "kl": result["kl"]["mean"]["value"],
        "kl_interval": [result["kl"]["mean"]["low"], result["kl"]["mean"]["high"]],
        "top1": result["top1_agreement"]["value"],
        "perplexity": result["perplexity"]["value"],
        "seconds": report.seconds_total,
        "peak_mib": report.peak_memory_bytes / 2**20,
    }


def _split(settings: str) -> list[str]:
    """key=value,key={a: 1, b: 2} at the commas outside of brackets."""
    parts, depth = [""], 0
    for letter in settings:
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True, help="calibration text")
    parser.add_argument("--eval", required=True, help="held-out text")
    parser.add_argument("--recipe", action="append", help="NAME or NAME:key=value,...; repeatable")
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    try:
        rows = [measure(a.model, name, a.calibration, a.eval) for name in a.recipe or DEFAULT]
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    if a.json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("recipe", "bits per weight", "KL", "top-1", "perplexity", "seconds")
    for r in rows:
        figures = (
            f"{r['bits']:.3f}",
            f"{r['kl']:.5f}",
            f"{r['top1']:.3f}",
            f"{r['perplexity']:.3f}",
            f"{r['seconds']:.1f}",
        )
        table.add_row(r["recipe"], *figures)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
