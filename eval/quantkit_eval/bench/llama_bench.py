"""llama.cpp's own benchmark on the same model: as its folder converts, and as Q8_0 and Q4_0 where it is dense."""

import json
import logging
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint.gguf_path import find_gguf
from quantkit.checkpoint.hub import locate_model
from quantkit.checkpoint.quantization_config import quantization_config
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import RunError
from quantkit_eval.bench.options import Scenario
from quantkit_eval.bench.results import LlamaBench

LOG = logging.getLogger("quantkit.bench")
TYPES = ("Q8_0", "Q4_0")  # that a dense model is rounded to as well


def llama_bench(folder: Path, model: str, scenarios: Sequence[Scenario]) -> tuple[LlamaBench, ...]:
    """A row for each file: prompts and outputs of the scenarios' mean lengths, on as many threads as torch uses.

    folder: llama.cpp's tools. UserError where the model cannot become a GGUF file; RunError where a tool fails.
    """
    prompt, output = (
        round(sum(each.least + each.most for each in lengths) / (2 * len(lengths)))
        for lengths in ([s.input for s in scenarios], [s.output for s in scenarios])
    )
    with tempfile.TemporaryDirectory() as place:
        return tuple(measure(folder, file, prompt, output) for file in gguf_files(folder, model, Path(place)))


def gguf_files(folder: Path, model: str, place: Path) -> list[Path]:
    """The model itself where it is a GGUF file; else files in `place`: as it converts, and those of TYPES."""
    if (file := find_gguf(model)) is not None:
        return [file]
    from quantkit.gguf_conversion.choices import Choices
    from quantkit.gguf_conversion.convert import convert_to_gguf

    source = locate_model(model)
    files = [place / "converted.gguf"]
    LOG.info("converting %s for llama.cpp", model)
    convert_to_gguf(source, files[0], Choices())
    if quantization_config(Checkpoint.open(source)) is None and (folder / "llama-quantize").is_file():
        for kind in TYPES:
            files.append(place / f"{kind}.gguf")
            _tool(folder / "llama-quantize", [str(files[0]), str(files[-1]), kind, "1"])
    return files


def measure(folder: Path, file: Path, prompt: int, output: int, repetitions: int = 3) -> LlamaBench:
    """Tokens per second of one file, the mean of `repetitions`. RunError where llama-bench fails."""
    LOG.info("llama-bench: %s", file.stem)
    threads = str(torch.get_num_threads())
    arguments = ["-m", str(file), "-p", str(prompt), "-n", str(output), "-t", threads, "-r", str(repetitions)]
    arguments += ["-o", "json"]
    try:
        return parse(_tool(folder / "llama-bench", arguments))
    except _CrashError:  # its kernels for rearranged weights need instructions that some virtual machines lack
        found = parse(_tool(folder / "llama-bench", [*arguments, "--repack", "0"]))
        return replace(found, name=f"{found.name}, --repack 0: it crashes without")


class _CrashError(RunError):
    """A program was ended by a signal."""


def parse(output: str) -> LlamaBench:
    """What `llama-bench -o json` printed for one file; RunError where it is something else."""
    try:
        rows: list[dict[str, Any]] = json.loads(output)
        speeds = {(row["n_prompt"] > 0, row["n_gen"] > 0): float(row["avg_ts"]) for row in rows}
        name, size = str(rows[0]["model_type"]), int(rows[0]["model_size"])
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise RunError(f"llama-bench printed no figures:\n{output[-300:]}") from error
    return LlamaBench(name, size, speeds.get((True, False)), speeds.get((False, True)))


def _tool(program: Path, arguments: list[str]) -> str:
    done = subprocess.run([str(program), *arguments], capture_output=True, text=True, check=False)
    if done.returncode < 0:
        raise _CrashError(f"{program.name} crashed (signal {-done.returncode})")
    if done.returncode != 0:
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise RunError(f"{program.name} ended with code {done.returncode}:\n{last}")
    return done.stdout
