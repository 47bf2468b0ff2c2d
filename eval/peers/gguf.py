"""Make GGUF files of a model with quantkit and with llama.cpp's quantizer; print divergence, size and time of both.

    python eval/peers/gguf.py --llamacpp build/bin --model MODEL --calibration CAL.txt --evaluation EVAL.txt

Without --model it is the bundled model with its own texts.
Stock llama-quantize gets an importance matrix that llama-imatrix makes of the same calibration text. Both files must
have the same types, tensor by tensor, and sizes within 0.1 %. Divergence from the original's F32 file is what
llama-perplexity measures. --model, --calibration and --evaluation may be repeated: one table after another, the last
text counts for the models that are left. --autoround PYTHON names an environment with auto-round.
--other-calibration and --other-evaluation (a text of another kind) show what the calibration text is worth. --work DIR
keeps the files; a second run makes only those that are missing. --speed times rounding of a random Llama with 1.1 G
weights instead. Exit code 1 if one of our files is missing or differs.
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
# `gguf` is the package, not this file: the folder comes last.
sys.path[:] = [*(place for place in sys.path if place != str(HERE)), str(HERE), str(HERE.parent)]

from gguf import GGUFReader  # noqa: E402
from gguf_files import Bench, Entry  # noqa: E402
from llamacpp import LlamaCpp  # noqa: E402

BUNDLED = HERE.parents[1] / "examples" / "tiny-llama"
MIXES = ("Q4_K_M", "Q3_K_M", "Q2_K", "Q4_0", "IQ4_XS", "Q6_K")
BUDGETS = (4.5, 3.5)
ROUNDING = ("calibration=null", "weights.algorithm=rtn")
STOCK, OURS, AUTOROUND = "llama-quantize", "quantkit", "AutoRound"


@dataclass
class Table:
    """Entries to be compared with the first one."""

    title: str
    entries: list[Entry] = field(default_factory=list)

    def ratio(self, entry: Entry) -> float | None:
        first = self.entries[0].divergence
        return entry.divergence.kld / first.kld if entry.divergence and first and entry is not self.entries[0] else None


def tables(bench: Bench, calibration: Path, evaluation: Path) -> Iterator[Table]:
    """All comparisons of one model, as they are made."""
    options = bench.options

    def entry(file: str, maker: str, make: Callable[[], tuple[Path, float]], **more: object) -> Entry:
        return bench.entry(file, maker, calibration, evaluation, make, **more)  # type: ignore[arg-type]

    named: list[Entry] = []
    stocks: dict[str, Entry] = {}
    for mix in options.mixes:
        stock = lambda mix=mix: bench.stock(mix, calibration)  # noqa: E731
        table = Table(mix, [entry(mix, f"{STOCK} --imatrix", stock)])
        stocks[mix] = table.entries[0]
        if not options.peers_only:
            table.entries.append(entry(mix, OURS, lambda mix=mix: bench.ours(mix, calibration), like=stock))
            named.append(table.entries[1])
        if mix == "Q4_K_M":
            made = entry(f"{mix}, iters 0", AUTOROUND, lambda: bench.autoround(calibration), like=stock)
            table.entries.append(made)
        yield table
    if options.peers_only:
        return
    for bits in options.budgets:
        made = entry(f"{bits} bits a weight", OURS, lambda: bench.ours(f"{{bits_per_weight: {bits}}}", calibration))  # noqa: B023
        near = sorted((e for e in named if e.divergence), key=lambda e: abs(e.nbytes - made.nbytes))
        yield Table("by measured harm, beside the named mix of the nearest size", [*near[:1], made])
    carried = entry("int4 g32 carried over", OURS, lambda: bench.carried(calibration))
    beside = [stocks[mix] for mix in ("Q4_0", "Q4_K_M") if mix in stocks]
    yield Table("exact carry-over of gptq-w4a16-g32", [*beside, carried])
    yield from crossed(bench, calibration, evaluation)


def crossed(bench: Bench, calibration: Path, evaluation: Path) -> Iterator[Table]:
    """The same type list calibrated on each of two texts, evaluated on each of two."""
    options = bench.options
    if options.other_calibration is None or options.other_evaluation is None:
        return
    mix = options.mixes[0]
    for text in (evaluation, options.other_evaluation):
        table = Table(f"{mix} evaluated on {text.stem}")
        for source in (calibration, options.other_calibration):
            for maker, make in ((f"{STOCK} --imatrix", bench.stock), (OURS, bench.ours)):
                table.entries.append(bench.entry(mix, maker, source, text, lambda m=make, s=source: m(mix, s)))
        yield table


def show(table: Table) -> None:
    """One line for each file; the ratio is to the first line's divergence."""
    print(f"\n{table.title}\n{'':24} {'made by':26} {'calibrated on':22} {'bytes':>13} {'KLD':>9} {'top-1':>7} "
          f"{'PPL':>8} {'ratio':>6} {'s':>7}")  # fmt: skip
    for e in table.entries:
        head = f"{e.file:24} {e.maker:26} {e.calibration:22}"
        if e.divergence is None:
            print(f"{head} {e.note}")
            continue
        ratio = table.ratio(e)
        print(f"{head} {e.nbytes:13,} {e.divergence.kld:9.6f} {e.divergence.top1:6.2f}% {e.divergence.perplexity:8.4f} "
              f"{'' if ratio is None else f'{ratio:.3f}':>6} {e.seconds:7.1f}  {e.note}", flush=True)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llamacpp", type=Path, required=True, help="folder of llama-quantize and the other tools")
    parser.add_argument("--model", type=Path, action="append", default=[], help="folder; repeatable")
    parser.add_argument("--calibration", type=Path, action="append", default=[], help="text; repeatable")
    parser.add_argument("--evaluation", type=Path, action="append", default=[], help="text; repeatable")
    parser.add_argument("--other-calibration", type=Path)
    parser.add_argument("--other-evaluation", type=Path)
    parser.add_argument("--calibration-bytes", type=int, default=450_000)
    parser.add_argument("--evaluation-bytes", type=int, default=150_000)
    parser.add_argument("--samples", type=int, help="calibration windows of ours; all that the text has without it")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--mixes", type=lambda text: text.split(","), default=list(MIXES))
    parser.add_argument("--budgets", type=lambda text: [float(x) for x in text.split(",") if x], default=list(BUDGETS))
    parser.add_argument("--recipe", default="gguf-q4_k_m", help="of ours; its mix is replaced")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="changes of the recipe")
    parser.add_argument("--autoround", help="Python of the environment auto-round is installed in")
    parser.add_argument("--peers-only", action="store_true", help="without quantkit's files")
    parser.add_argument("--speed", action="store_true", help="seconds of rounding a large random model")
    parser.add_argument("--work", type=Path, help="folder that keeps the files")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes all figures too")
    a = parser.parse_args()
    tools = LlamaCpp(a.llamacpp, a.threads, a.context)
    found: list[dict[str, object]] = []
    good = True
    with working_folder(a.work) as work:
        if a.speed:
            return speed(tools, work, a)
        if not a.model:
            a.model, a.calibration = [BUNDLED], a.calibration or [BUNDLED / "calibration.txt"]
            a.evaluation = a.evaluation or [BUNDLED / "eval.txt"]
        if not a.calibration or not a.evaluation:
            parser.error("give --calibration and --evaluation with --model")
        for i, model in enumerate(a.model):
            texts = [given[min(i, len(given) - 1)] for given in (a.calibration, a.evaluation)]
            folder = work / model.resolve().name
            folder.mkdir(parents=True, exist_ok=True)
            bench = Bench(model, folder, tools, a)
            print(f"\n== {model.resolve().name}: calibrated on {texts[0].name}, evaluated on {texts[1].name}, "
                  f"context {a.context} ==")  # fmt: skip
            for table in tables(bench, *texts):
                show(table)
                good &= not any(e.note for e in table.entries if e.maker == OURS)
                found += [
                    {"model": folder.name, "table": table.title, "ratio": table.ratio(e)} | asdict(e)
                    for e in table.entries
                ]
                if a.json:
                    a.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if good else 1


def speed(tools: LlamaCpp, work: Path, options: argparse.Namespace) -> int:
    """Prints seconds of rounding a random model to each mix, without importance, on the same number of threads."""
    from speed import random_model

    model = work / "random-1B"
    if not (model / "config.json").exists():
        random_model("1B", model)
        for file in ("tokenizer.json", "tokenizer_config.json"):  # any will do
            shutil.copy(BUNDLED / file, model)
    bench = Bench(model, work, tools, options)
    weights = sum(math.prod(map(int, t.shape)) for t in GGUFReader(bench.original()).tensors)
    print(f"{weights / 1e6:,.0f} M weights, {tools.threads} threads, seconds with reading and writing")
    print(f"{'':10} {STOCK:>15} {OURS:>10} {'ratio':>6}")
    for mix in options.mixes[:1]:
        output = work / "speed.gguf"
        stock = tools.quantize(bench.original(), output, mix, None)
        output.unlink()
        ours = bench.quantkit(output, options.recipe, [*ROUNDING, f"gguf={{mix: {mix}}}", *options.set])
        output.unlink()
        print(f"{mix:10} {stock:15.1f} {ours:10.1f} {ours / stock:6.2f}", flush=True)
    return 0


@contextmanager
def working_folder(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept.resolve()
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)


if __name__ == "__main__":
    sys.exit(main())
