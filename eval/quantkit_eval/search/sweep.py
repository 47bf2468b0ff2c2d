"""Quantize one model by several recipes, evaluate each result, print one table: how the README's figures are made.

Recipes are named, not swept, and nothing is kept: `quantkit sweep` is for the rest.

    python -m quantkit_eval.search.sweep --model M --calibration TEXT --eval TEXT [--recipe NAME[:key=value,...]]...

Each recipe that calibrates gets the given text, the first 128 x 256 tokens of it; each result is compared with the
original on the first 16,384 tokens of the other text in windows of 256. No engine is asked whether it would load it.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from quantkit.errors import UserError
from quantkit.quantization import pipeline
from quantkit.recipe import load as recipes
from quantkit_eval.evaluation import evaluate
from quantkit_eval.search.grid import split_values

DEFAULT = ("rtn-w4a16", "awq", "gptq-w4a16", "awq-gptq-w4a16")


@dataclass(frozen=True, slots=True)
class Row:
    """One recipe's size and distance from the model, and what making it took."""

    recipe: str
    bits: float
    kl: float
    kl_interval: tuple[float, float]
    top1: float
    perplexity: float
    seconds: float
    peak_mib: float


def measure(
    model: str, name: str, calibration: str, text: str, *, samples: int = 128, seq_len: int = 256, tokens: int = 16384
) -> Row:
    """The row of recipe `name` (with settings as NAME:key=value,key=value)."""
    recipe, _, settings = name.partition(":")
    given = ["output.engine=null", *filter(None, split_values(settings))]
    if recipes.load(recipe, given, model).calibration is not None:
        text_data = json.dumps(calibration)
        given.append(f"calibration={{data: {text_data}, samples: {samples}, seq_len: {seq_len}, seed: null}}")
    loaded = recipes.load(recipe, given, model)
    with tempfile.TemporaryDirectory(prefix="quantkit-sweep-") as scratch:
        report = pipeline.quantize(loaded, Path(scratch) / "out", progress=False)
        result = evaluate(Path(scratch) / "out", ref=model, text=text, tokens=tokens, progress=False).texts[0]
    divergence = result.divergence
    assert divergence is not None
    return Row(
        recipe=name,
        bits=report.bits_per_weight,
        kl=divergence.kl_mean.value,
        kl_interval=(divergence.kl_mean.low, divergence.kl_mean.high),
        top1=divergence.top1_agreement.value,
        perplexity=result.model.perplexity.value,
        seconds=report.seconds_total,
        peak_mib=report.peak_memory_bytes / 2**20,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True, help="calibration text")
    parser.add_argument("--eval", required=True, help="held-out text, a file or a name")
    parser.add_argument("--recipe", action="append", help="NAME or NAME:key=value,...; repeatable")
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    try:
        rows = [measure(a.model, name, a.calibration, a.eval) for name in a.recipe or DEFAULT]
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    if a.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    table = Table("recipe", "bits per weight", "KL", "top-1", "perplexity", "seconds")
    for row in rows:
        figures = (f"{row.bits:.3f}", f"{row.kl:.5f}", f"{row.top1:.3f}", f"{row.perplexity:.3f}", f"{row.seconds:.1f}")
        table.add_row(row.recipe, *figures)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
