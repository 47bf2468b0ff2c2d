"""quantkit auto: a model to a size, each linear in the number format that its output can bear."""

import logging
from typing import Annotated

import typer

from quantkit.cli.app import (
    Device,
    Json,
    ProgressMode,
    Quiet,
    Trust,
    Verbose,
    check_name,
    names,
    no_garbage_collection,
    show_result,
    start_log,
)
from quantkit.cli.quantize import Model, ModelOption, NewFolder, Restart, Samples, SeqLen, required_model
from quantkit.errors import UserError

LOG = logging.getLogger("quantkit.cli")


def auto(
    model: Model = None,
    max_size: Annotated[
        str | None,
        typer.Option(
            "--max-size",
            metavar="4.5bpw|3.6MB|5GB",
            help="bpw: bits per weight of the decoder blocks' linears, scales included. Bytes: of all .safetensors "
            "files, embedding, head and headers included.  [required]",
        ),
    ] = None,
    output: NewFolder = None,
    model_option: ModelOption = None,
    candidates: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Formats to choose from: W4A16 (groups of 32, 64, 128 and a row), W4A16:g64, FP8_DYNAMIC, ...; any "
            "linear may stay as it is too. Default: W2A16 to W6A16 and W8A16.",
        ),
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="The engine that is to load it.", autocompletion=names("engines"))
    ] = None,
    tp: Annotated[int, typer.Option(help="Devices that the engine spreads each layer over.")] = 1,
    text: Annotated[
        str | None,
        typer.Option("--text", "--calibration", metavar="FILE|NAME", help="Text to calibrate and measure on."),
    ] = None,
    samples: Samples = None,
    seq_len: SeqLen = None,
    device: Device = "auto",
    restart: Restart = False,
    trust_remote_code: Trust = False,
    progress: ProgressMode = "auto",
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Quantize a model to a size: harm of each linear in each format, the exact best choice, the recipe, one run of it.

    Example: quantkit auto meta-llama/Llama-3.2-1B --max-size 4.5bpw --engine vllm --output llama-4.5
    """
    mode = start_log(progress, quiet, verbose)
    name = required_model(model, model_option)
    if max_size is None:
        raise UserError("no size: pass --max-size\nhint: --max-size 4.5bpw, or 3.6MB or 5GB")
    if output is None:
        raise UserError("no output folder: pass --output OUT\nhint: OUT is made by the run and must not exist yet")
    if engine is not None:
        check_name("engine", engine)
    LOG.info("quantizing %s to %s into %s", name, max_size, output)
    with no_garbage_collection():
        from quantkit.api import auto as run
        from quantkit.report.allocation_table import render_allocation
    section = {"data": text, "samples": _count(samples, "--samples"), "seq_len": _count(seq_len, "--seq-len")}
    made = run(
        name,
        max_size,
        output,
        candidates=candidates,
        calibration={key: value for key, value in section.items() if value is not None},
        engine=engine,
        tp=tp,
        device=device,
        restart=restart,
        trust_remote_code=trust_remote_code,
        progress=mode,
    )
    show_result(made, render_allocation, as_json)


def _count(text: str | None, option: str) -> int | str | None:
    if text is None or text == "auto":
        return text
    if not text.isdigit():
        raise UserError(f"{option}: `{text}` is no whole number\nhint: {option} 128, or auto")
    return int(text)
