"""llama.cpp's own tools as a peer: importance matrix, quantizer, and divergence from the original's logits."""

import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path


class ToolError(Exception):
    """A tool is missing or failed; the message names it and ends with its last lines."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """What `llama-perplexity --kl-divergence` says: means over tokens with their standard errors; top-1 in percent."""

    kld: float
    kld_error: float
    top1: float
    top1_error: float
    perplexity: float
    base_perplexity: float


ATTEMPTS = 5
LAST_LABEL = "Same top p:"
FIGURES = {
    "kld": r"Mean\s+KLD:",
    "top1": LAST_LABEL,
    "perplexity": r"Mean PPL\(Q\)\s*:",
    "base_perplexity": r"Mean PPL\(base\)\s*:",
}


def parse_divergence(output: str) -> Divergence:
    """The figures in the tool's output; ToolError if one is missing."""
    found: dict[str, float] = {}
    for name, label in FIGURES.items():
        line = re.search(rf"^\s*{label}\s*(\S+)\s*±\s*(\S+)", output, re.MULTILINE)
        if line is None:
            raise ToolError(f"llama-perplexity printed no {name}:\n{_tail(output)}")
        found |= {name: float(line[1]), f"{name}_error": float(line[2])}
    return Divergence(**{name: found[name] for name in Divergence.__slots__})


@dataclass(frozen=True)
class LlamaCpp:
    """The tools in `folder`. The context is that of the importance matrix and of the evaluation, in tokens."""

    folder: Path
    threads: int = 2
    context: int = 256

    def imatrix(self, original: Path, text: Path, output: Path) -> float:
        """Writes the importance matrix of a text; seconds."""
        return self._run(
            "llama-imatrix", ["-m", original, "-f", text, "-o", output, "-c", self.context, "--no-ppl", *self._engine()]
        )[0]

    def quantize(self, original: Path, output: Path, mix: str, imatrix: Path | None, *options: str) -> float:
        """Writes the file that stock llama-quantize makes; seconds."""
        importance = [] if imatrix is None else ["--imatrix", imatrix]
        return self._run("llama-quantize", [*importance, *options, original, output, mix, self.threads])[0]

    def save_logits(self, original: Path, text: Path, output: Path) -> None:
        """Writes the original's log-probabilities: 2 bytes for each word of the vocabulary and every second token."""
        self._run("llama-perplexity", ["-m", original, "-f", text, "--save-all-logits", output, *self._window()])

    def divergence(self, file: Path, logits: Path) -> Divergence:
        """How far the file's predictions are from the original's."""
        arguments = ["-m", file, "--kl-divergence", "--kl-divergence-base", logits, *self._window()]
        output = ""
        for _ in range(ATTEMPTS):  # on a busy machine the tool may end before its logging thread has printed everything
            output = self._run("llama-perplexity", arguments)[1]
            if LAST_LABEL in output:
                break
        return parse_divergence(output)

    def _window(self) -> list[object]:
        return ["-c", self.context, *self._engine()]

    def _engine(self) -> list[object]:
        # Repacked weights take another path on each processor; AMX's crashes where the system refuses its tiles.
        return ["-t", self.threads, "--no-repack"]

    def _run(self, tool: str, arguments: list[object]) -> tuple[float, str]:
        """Seconds and all output of one tool."""
        path = self.folder / tool
        if not path.exists():
            raise ToolError(f"{path}: missing; build it or name the folder it is in with --llamacpp")
        begin = time.perf_counter()
        with tempfile.TemporaryFile() as log:
            done = subprocess.run([str(path), *map(str, arguments)], stdout=log, stderr=subprocess.STDOUT, check=False)
            log.seek(0)
            output = log.read().decode(errors="replace")
        if done.returncode:
            raise ToolError(f"{tool} ended with {done.returncode}:\n{_tail(output)}")
        return time.perf_counter() - begin, output


def _tail(output: str, lines: int = 5) -> str:
    return "\n".join(line[:300] for line in output.strip().splitlines()[-lines:])
