"""Make GGUF files of a model with quantkit and with llama.cpp's quantizer; print divergence, size and time of both.

    python eval/peers/gguf.py --llamacpp build/bin --model examples/tiny-llama \
        --calibration examples/tiny-llama/calibration.txt --evaluation examples/tiny-llama/eval.txt

Stock llama-quantize gets an importance matrix that llama-imatrix makes of the same calibration text. Both files must have
the same types, tensor by tensor, and sizes within 0.1 %. Divergence from the original's F32 file is llama-perplexity's.
Models are evaluated one by one: --model, --calibration and --evaluation may be repeated, the last text counts for further models.
--autoround PYTHON names an environment with auto-round. --other-calibration and --other-evaluation (a text of another
kind) show what the calibration text is worth. --work DIR keeps the files; a second run makes only those that are missing.
--speed times rounding of a random Llama with 1.2 G weights instead. Exit code 1 if one of our files is missing or differs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

HERE = str(Path(__file__).resolve().parent)
sys.path[:] = [*(place for place in sys.path if place != HERE), HERE]  # `gguf` is the package, not this file

from gguf import GGUFReader  # noqa: E402
from llamacpp import Divergence, LlamaCpp, ToolError  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

MIXES = ("Q4_K_M", "Q3_K_M", "Q2_K", "Q4_0", "IQ4_XS", "Q6_K")
BUDGETS = (4.5, 3.5)
SIZE_TOLERANCE = 1e-3
STOCK, OURS, AUTOROUND = "llama-quantize", "quantkit", "AutoRound"


@dataclass(frozen=True)
class Entry:
    """One file: what it is, who made it, its bytes, seconds of its making, and how far it is from the original."""

    file: str
    maker: str
    calibration: str
    evaluation: str
    nbytes: int = 0
    seconds: float = 0.0
    divergence: Divergence | None = None
    note: str = ""


@dataclass
class Table:
    """Entries to be compared with the first one."""

    title: str
    entries: list[Entry] = field(default_factory=list)

    def ratio(self, entry: Entry) -> float | None:
        first = self.entries[0].divergence
        return entry.divergence.kld / first.kld if entry.divergence and first and entry is not self.entries[0] else None


@dataclass(frozen=True)
class Bench:
    """One model, what is asked of it, and the folder where its files go."""

    model: Path
    work: Path
    tools: LlamaCpp
    options: argparse.Namespace

    def text(self, path: Path, nbytes: int) -> Path:
        """The beginning of a text, without characters that the model's tokenizer has no token for (llama.cpp aborts)."""
        output = self.work / f"{path.stem}-{nbytes}.txt"
        if not output.exists():
            text = path.read_bytes()[:nbytes].decode(errors="ignore")
            tokenizer = Tokenizer.from_file(str(self.model / "tokenizer.json"))
            unknown = getattr(tokenizer.model, "unk_token", None)
            strange = {c for c in set(text) if unknown in tokenizer.encode(c, add_special_tokens=False).tokens}
            output.write_text("".join(c for c in text if c not in strange))
        return output

    def calibration(self, path: Path) -> Path:
        return self.text(path, self.options.calibration_bytes)

    def evaluation(self, path: Path) -> Path:
        return self.text(path, self.options.evaluation_bytes)

    def original(self) -> Path:
        """The model's weights as F32 in a GGUF file."""
        sets = ["calibration=null", "weights.algorithm=rtn", "gguf={mix: q8_0, tensor_types: {'.': f32}, "
                "token_embedding: f32, output: f32}"]  # fmt: skip
        return self._made("original", lambda path: self._quantkit(path, "gguf-q8_0", sets))[0]

    def imatrix(self, calibration: Path) -> Path:
        text = self.calibration(calibration)
        make = lambda path: self.tools.imatrix(self.original(), text, path)  # noqa: E731
        return self._made(f"imatrix-{text.stem}", make)[0]

    def logits(self, evaluation: Path) -> Path:
        path = self.work / f"{evaluation.stem}.logits"
        if not path.exists():
            self.tools.save_logits(self.original(), self.evaluation(evaluation), path)
        return path

    def stock(self, mix: str, calibration: Path) -> tuple[Path, float]:
        """llama-quantize's file with the importance of a text, and seconds without those of the importance."""
        imatrix = self.imatrix(calibration)
        make = lambda path: self.tools.quantize(self.original(), path, mix, imatrix)  # noqa: E731
        return self._made(f"stock-{mix}-{calibration.stem}", make)

    def ours(self, mix: str, calibration: Path, *, recipe: str | None = None) -> tuple[Path, float]:
        """quantkit's file, calibrated on a text: all windows of the tools' context that it has."""
        name = "".join(c if c.isalnum() or c in "_." else "" for c in mix)
        sets = [f"gguf={{mix: {mix}}}", *self.calibrated(calibration), *self.options.set]
        make = lambda path: self._quantkit(path, recipe or self.options.recipe, sets)  # noqa: E731
        return self._made(f"quantkit-{name}-{calibration.stem}", make)

    def calibrated(self, calibration: Path) -> list[str]:
        text = self.calibration(calibration)
        tokenizer = Tokenizer.from_file(str(self.model / "tokenizer.json"))
        context = self.tools.context
        windows = len(tokenizer.encode(text.read_text(), add_special_tokens=False).ids) // context
        samples = min(windows, self.options.samples or windows)
        return [f"calibration.data={text}", f"calibration.seq_len={context}", f"calibration.samples={samples}"]

    def carried(self, calibration: Path) -> tuple[Path, float]:
        """The codes of a folder of symmetric int4 in groups of 32, written as Q4_0."""

        def make(path: Path) -> float:
            with tempfile.TemporaryDirectory(dir=self.work) as scratch:
                folder = Path(scratch) / "folder"
                sets = [f"--set={item}" for item in self.calibrated(calibration)]
                command = ["quantize", self.model, "--recipe", "gptq-w4a16-g32", "--output", folder, *sets]
                return self._command(command) + self._command(["convert", folder, path])

        return self._made(f"carried-{calibration.stem}", make)

    def autoround(self, calibration: Path) -> tuple[Path, float]:
        """AutoRound's Q4_K_M by rounding, made in its own environment."""
        text = self.calibration(calibration)

        def make(path: Path) -> float:
            script = Path(HERE) / "autoround_gguf.py"
            command = [self.options.autoround, script, self.model, text, path, "--seq-len", self.tools.context]
            done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
            if done.returncode:
                raise ToolError(f"AutoRound failed: {done.stderr.strip()[-400:]}")
            return float(json.loads(done.stdout.strip().splitlines()[-1])["seconds"])

        if self.options.autoround is None:
            raise ToolError("missing: name an environment's Python with --autoround")
        return self._made(f"autoround-{calibration.stem}", make)

    def entry(self, file: str, maker: str, calibration: Path, evaluation: Path, make: Callable[[], tuple[Path, float]],
              like: Callable[[], tuple[Path, float]] | None = None) -> Entry:  # fmt: skip
        """Makes and measures a file; what is missing or unlike the file `like` makes is its note."""
        names = (file, maker, calibration.stem, evaluation.stem)
        try:
            path, seconds = make()
            found = self.tools.divergence(path, self.logits(evaluation))
            note = "" if like is None else differences(like()[0], path)
        except ToolError as error:
            return Entry(*names, note=str(error))
        return Entry(*names, path.stat().st_size, seconds, found, note)

    def _made(self, name: str, make: Callable[[Path], float]) -> tuple[Path, float]:
        """The file of that name, made unless it is there, and the seconds of its making."""
        path, clock = self.work / f"{name}.gguf", self.work / f"{name}.seconds"
        if not path.exists() or not clock.exists():
            path.unlink(missing_ok=True)
            clock.write_text(str(make(path)))
        return path, float(clock.read_text())

    def _quantkit(self, path: Path, recipe: str, sets: list[str]) -> float:
        """Writes the file that `quantkit quantize` makes; seconds, those of starting Python included."""
        with tempfile.TemporaryDirectory(dir=self.work) as scratch:
            folder = Path(scratch) / "folder"
            changes = [f"--set={item}" for item in sets]
            command = ["quantize", self.model, "--recipe", recipe, "--output", folder, *changes]
            seconds = self._command([*command, "--device", "cpu"])
            (folder / "model.gguf").rename(path)
        return seconds

    def _command(self, arguments: list[object]) -> float:
        begin = time.perf_counter()
        command = [sys.executable, "-m", "quantkit", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ToolError(f"{' '.join(command[2:])} failed:\n{done.stderr.strip()[-1000:]}")
        return time.perf_counter() - begin


def differences(stock: Path, ours: Path) -> str:
    """What differs between two files in tensors, their types and the size of the file; empty if nothing does."""
    types = [{t.name: (t.tensor_type.name, tuple(map(int, t.shape))) for t in GGUFReader(path).tensors}
             for path in (stock, ours)]  # fmt: skip
    names = sorted(types[0].keys() | types[1].keys())
    other = [f"{name} {types[1].get(name)}, stock {types[0].get(name)}" for name in names
             if types[0].get(name) != types[1].get(name)]  # fmt: skip
    sizes = stock.stat().st_size, ours.stat().st_size
    if abs(sizes[1] / sizes[0] - 1) > SIZE_TOLERANCE:
        other.append(f"{sizes[1]:,} bytes, stock {sizes[0]:,}")
    more = f" and {len(other) - 3} more" if len(other) > 3 else ""
    return "; ".join(other[:3]) + more


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
    yield Table("exact carry-over of gptq-w4a16-g32", [*(stocks[m] for m in ("Q4_0", "Q4_K_M") if m in stocks), carried])
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
            raise SystemExit(speed(tools, work, a))
        if not a.model or not a.calibration or not a.evaluation:
            parser.error("give --model, --calibration and --evaluation, or --speed")
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
