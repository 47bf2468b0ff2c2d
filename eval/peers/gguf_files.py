"""GGUF files of one model by quantkit and by its peers, each made once and measured by llama.cpp's own tools."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gguf import GGUFReader
from llamacpp import Divergence, LlamaCpp, ToolError
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent
SIZE_TOLERANCE = 1e-3


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


@dataclass(frozen=True)
class Bench:
    """One model, what is asked of it, and the folder where its files go."""

    model: Path
    work: Path
    tools: LlamaCpp
    options: argparse.Namespace

    def text(self, path: Path, nbytes: int) -> Path:
        """The beginning of a text, without the characters that the tokenizer has no token for: llama.cpp aborts."""
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
        make = lambda path: self._command(["convert", self.model, path, "--requantize", "f32"])  # noqa: E731
        return self._made("original", make)[0]

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
        make = lambda path: self.quantkit(path, recipe or self.options.recipe, sets)  # noqa: E731
        return self._made(f"quantkit-{name}-{calibration.stem}", make)

    def calibrated(self, calibration: Path) -> list[str]:
        text = self.calibration(calibration)
        tokenizer = Tokenizer.from_file(str(self.model / "tokenizer.json"))
        context = self.tools.context
        windows = len(tokenizer.encode(text.read_text(), add_special_tokens=False).ids) // context
        samples = min(windows, self.options.samples or windows)
        return [f"calibration.data={text}", f"calibration.seq_len={context}", f"calibration.samples={samples}"]

    def carried(self, calibration: Path) -> tuple[Path, float]:
        """The codes of a folder of symmetric int4 in groups of 32, written as Q4_0; the embedding rounded to Q6_K."""

        def make(path: Path) -> float:
            with tempfile.TemporaryDirectory(dir=self.work) as scratch:
                folder = Path(scratch) / "folder"
                sets = [f"--set={item}" for item in self.calibrated(calibration)]
                command = ["quantize", self.model, "--recipe", "gptq-w4a16-g32", "--output", folder, *sets]
                return self._command(command) + self._command(["convert", folder, path, "--token-embedding", "q6_k"])

        return self._made(f"carried-{calibration.stem}", make)

    def autoround(self, calibration: Path) -> tuple[Path, float]:
        """AutoRound's Q4_K_M by rounding, made in its own environment."""
        text = self.calibration(calibration)

        def make(path: Path) -> float:
            script = HERE / "autoround_gguf.py"
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

    def quantkit(self, path: Path, recipe: str, sets: list[str]) -> float:
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
        threads = {"OMP_NUM_THREADS": str(self.tools.threads)}
        done = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True, check=False)
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
