"""KL over the number of calibration tokens: rounding, plain GPTQ, and the default with re-fit and sweeps.

    python eval/calibration_tokens.py --model M --calibration TEXT --eval TEXT [--set key=value]...

Prints a markdown table. Every figure is the mean over up to 4 disjoint parts of the calibration text, compared with the
original model on the first 8,192 tokens of the other text in windows of 256.
"""

import argparse
import tempfile
from pathlib import Path

from quantkit_eval.evaluation import evaluate
from quantkit_eval.perplexity import cut
from quantkit_eval.texts import read_text
from torch import Tensor

from quantkit.checkpoint.tokenizer import locate_tokenizer
from quantkit.quantization import pipeline
from quantkit.recipe import load as recipe

LENGTH = 256
TOKENS = [LENGTH << i for i in range(8)]
COLUMNS = {
    "rtn": ("rtn-w4a16", []),
    "plain GPTQ": ("gptq-w4a16", ["weights.algorithm={gptq: {refit: false}}"]),
    "re-fit + sweeps": ("gptq-w4a16", []),
}


def divergence(model: str, column: str, settings: list[str], ids_ST: Tensor, text: str) -> float:
    """Mean KL on the text of the model quantized as the column says, calibrated on ids_ST [windows, LENGTH]."""
    name, given = COLUMNS[column]
    loaded = recipe.load(name, ["output.engine=null", *given, *settings], model)
    with tempfile.TemporaryDirectory(prefix="quantkit-tokens-") as scratch:
        folder = Path(scratch) / "out"
        pipeline.quantize(loaded, folder, calibration=ids_ST, progress=False)
        found = evaluate(folder, ref=model, text=text, tokens=8192, progress=False).texts[0].divergence
        assert found is not None
        return found.kl_mean.value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--calibration", "--eval"):
        parser.add_argument(name, required=True)
    parser.add_argument("--set", action="append", default=[], help="a recipe setting, repeatable")
    a = parser.parse_args()
    windows_ST = cut(read_text(a.calibration), locate_tokenizer(Path(a.model), False), LENGTH, None).ids_WT
    print("| tokens |", " | ".join(COLUMNS), "|")
    print("|---" * (1 + len(COLUMNS)), "|", sep="")
    for tokens in (tokens for tokens in TOKENS if tokens <= windows_ST.numel()):
        parts = windows_ST.split(tokens // LENGTH)[: max(1, min(4, 4096 // tokens))]
        means = [sum(divergence(a.model, c, a.set, p, a.eval) for p in parts) / len(parts) for c in COLUMNS]
        print(f"| {tokens} |", " | ".join(f"{mean:.4f}" for mean in means), "|", flush=True)


if __name__ == "__main__":
    main()
