"""quantkit imatrix: what llama-quantize weighs errors with, from the original model and calibration text."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.app import (
    Device,
    Json,
    ProgressMode,
    Quiet,
    Trust,
    Verbose,
    no_garbage_collection,
    show_result,
    start_log,
)
from quantkit.cli.quantize import Model, ModelOption, Samples, SeqLen, required_model
from quantkit.errors import UserError

LOG = logging.getLogger("quantkit.cli")


def imatrix(
    model: Model = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="New file: .gguf, or .dat for llama.cpp's older form.  [required]"),
    ] = None,
    model_option: ModelOption = None,
    data: Annotated[
        str | None,
        typer.Option("--data", "--calibration", metavar="FILE|NAME", help="Text, rows or a data set; else `general`."),
    ] = None,
    samples: Samples = None,
    seq_len: SeqLen = None,
    device: Device = "auto",
    trust_remote_code: Trust = False,
    progress: ProgressMode = "auto",
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """An importance matrix for llama-quantize, or for the recipe key `gguf: {imatrix: FILE}`: E[x^2] of each input.

    Example: quantkit imatrix meta-llama/Llama-3.2-1B --output llama.imatrix.gguf --data general
    """
    mode = start_log(progress, quiet, verbose)
    name = required_model(model, model_option)
    if output is None:
        raise UserError("no output file: pass --output FILE\nhint: FILE.gguf, or FILE.dat for llama.cpp's older form")
    from quantkit.paths import user_path
    from quantkit.quantization.early_checks import check_before_torch
    from quantkit.recipe.load import Flag, load

    texts = {"data": data, "samples": samples, "seq_len": seq_len}
    flags = [
        Flag(f"--{key.replace('_', '-')}", f"calibration.{key}", text, literal=key == "data")
        for key, text in texts.items()
        if text is not None
    ]
    recipe, output = load("gptq-w4a16", model=name, flags=flags), user_path(output)  # for its calibration section
    check_before_torch(recipe, output, device=device)
    LOG.info("reading %s for %s", name, output)  # the libraries that follow take seconds to load
    with no_garbage_collection():
        from quantkit.quantization.imatrix import make_imatrix
        from quantkit.report.console import render_imatrix

    made = make_imatrix(recipe, output, device=device, trust_remote_code=trust_remote_code, progress=mode)
    show_result(made, render_imatrix, as_json)
