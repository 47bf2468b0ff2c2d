"""`quantkit auto` beside uniform recipes of the same size: a markdown table of KL on text that neither has seen.

    python eval/auto.py --model M --calibration TEXT --eval TEXT --sizes 3.5bpw,4.5bpw,5.5bpw

Uniform recipes are all of bits x group size (groups of 32, 64, 128 or a row), by the algorithm that auto uses; the
best of those that are no larger is what auto is held to. Harms are measured once for all sizes. KL is on the first
16,384 tokens of the other text in windows of 256; calibration is 128 x 256 tokens.
"""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit_eval.evaluation import evaluate

from quantkit.progress import Progress
from quantkit.quantization import pipeline
from quantkit.quantization.allocation.recipe_text import recipe_of
from quantkit.quantization.allocation.run import choice_for, measured_harms, open_journal, prepare, recipe_for
from quantkit.recipe.candidates import DEFAULT, base_recipe, candidates
from quantkit.recipe.load import from_data
from quantkit.recipe.recipe import Recipe
from quantkit.sizes import limit_of


@dataclass(frozen=True, slots=True)
class Result:
    """bits: per weight; held_out: KL on the calibration text's own unseen windows; kl: on the other text."""

    name: str
    bits: float
    held_out: float
    kl: float


def run(name: str, recipe: Recipe, a: argparse.Namespace) -> Result:
    """Quantize by a recipe and evaluate what comes out."""
    with tempfile.TemporaryDirectory(prefix="quantkit-auto-") as scratch:
        report = pipeline.quantize(recipe, Path(scratch) / "out", progress=False)
        found = evaluate(Path(scratch) / "out", ref=a.model, text=a.eval, tokens=16384, progress=False).texts[0]
    assert found.divergence is not None
    assert report.held_out is not None
    return Result(name, report.bits_per_weight, report.held_out.kl, found.divergence.kl_mean.value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--calibration", "--eval"):
        parser.add_argument(name, required=True)
    parser.add_argument("--sizes", default="3.5bpw,4.5bpw,5.5bpw")
    parser.add_argument("--candidates", default=",".join(DEFAULT))
    parser.add_argument("--engine", help="what the result is to be loaded by")
    parser.add_argument("--uniform", default="W3A16,W4A16,W5A16")
    a = parser.parse_args()
    section = {"data": a.calibration, "samples": 128, "seq_len": 256}
    base, found = base_recipe(a.model, section, a.engine, 1), candidates(a.candidates.split(","))
    settings: dict[str, Any] = {"model": a.model, "calibration": section}
    uniform = [run(one.name, from_data({**settings, **one.keys}), a) for one in candidates(a.uniform.split(","))]
    for one in uniform:
        print(f"{one.name}: {one.bits:.4g} bits, KL {one.kl:.5f}", flush=True)
    print(
        "| size | best uniform | its KL | auto, bits | its KL | ratio | predicted | measured | measured / predicted |"
    )
    print("|---" * 9, "|", sep="")
    with tempfile.TemporaryDirectory(prefix="quantkit-harms-") as scratch:
        output = Path(scratch) / "out"
        with Progress(False) as bar:
            model = prepare(base, found, output, bar)
            journal = open_journal(model, output)
            harms = measured_harms(model, journal, bar)
        for size in a.sizes.split(","):
            budget = model.budget(limit_of(size))
            choice = choice_for(model, harms, budget, journal, bar, {})
            ours = run("auto", recipe_of(recipe_for(model, choice, budget)), a)
            best = min((one for one in uniform if one.bits <= ours.bits + 5e-4), key=lambda one: one.kl)
            cells = [size, f"{best.name} ({best.bits:.4g})", f"{best.kl:.5f}", f"{ours.bits:.4g}", f"{ours.kl:.5f}"]
            cells += [f"**{ours.kl / best.kl:.2f}**", f"{choice.predicted:.5f}", f"{ours.held_out:.5f}"]
            print("|", " | ".join([*cells, f"{ours.held_out / choice.predicted:.2f}"]), "|", flush=True)


if __name__ == "__main__":
    main()
