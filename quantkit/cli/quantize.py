"""The verb quantize, and the options that stand for a recipe."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli.app import (
    Device,
    Json,
    ProgressMode,
    Quiet,
    Sets,
    Trust,
    Verbose,
    names,
    no_garbage_collection,
    show_result,
    start_log,
)
from quantkit.errors import UserError

if TYPE_CHECKING:
    from quantkit.recipe.recipe import Recipe
    from quantkit.report.records import Report

LOG = logging.getLogger("quantkit.cli")

Model = Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Model folder or Hub id.")]
ModelOption = Annotated[str | None, typer.Option("--model", "-m", help="The same, as an option.")]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "-r",
        help="Name of a shipped recipe, a YAML file, or the quantkit-report.json of a run to repeat.",
        autocompletion=names("recipes"),
    ),
]
Scheme = Annotated[
    str | None,
    typer.Option(
        "--scheme",
        help="W4A16, FP8_DYNAMIC, NVFP4, ...: without --recipe, the best shipped recipe for it.",
        autocompletion=names("schemes"),
    ),
]
Calibration = Annotated[
    str | None, typer.Option("--calibration", metavar="FILE|NAME", help="Text, rows or a data set to calibrate on.")
]
Samples = Annotated[str | None, typer.Option("--samples", metavar="N|auto", help="Calibration windows.")]
SeqLen = Annotated[str | None, typer.Option("--seq-len", metavar="N|auto", help="Tokens in each window.")]
Bits = Annotated[str | None, typer.Option("--bits", metavar="N", help="Bits per integer weight.")]
GroupSize = Annotated[
    str | None, typer.Option("--group-size", metavar="N|channel", help="Weights of a row that share a scale.")
]
NewFolder = Annotated[Path | None, typer.Option("--output", "-o", help="New folder for the result.  [required]")]
Restart = Annotated[bool, typer.Option("--restart", help="Drop what an earlier, interrupted run has done.")]


def quantize(
    model: Model = None,
    recipe: RecipeName = None,
    scheme: Scheme = None,
    output: NewFolder = None,
    model_option: ModelOption = None,
    calibration: Calibration = None,
    samples: Samples = None,
    seq_len: SeqLen = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    settings: Sets = None,
    device: Device = "auto",
    restart: Restart = False,
    with_report: Annotated[
        bool, typer.Option("--report", help="Then measure it beside the original: quantkit-report.html in OUT.")
    ] = False,
    trust_remote_code: Trust = False,
    progress: ProgressMode = "auto",
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Quantize a model by a recipe or to a scheme.

    Example: quantkit quantize meta-llama/Llama-3.2-1B --scheme W4A16 --output llama-w4
    """
    mode = start_log(progress, quiet, verbose)
    flags = {"--calibration": calibration, "--samples": samples, "--seq-len": seq_len, "--bits": bits}
    loaded = given_recipe(recipe, scheme, model, model_option, flags | {"--group-size": group_size}, settings)
    if output is None:
        raise UserError("no output folder: pass --output OUT\nhint: OUT is made by the run and must not exist yet")
    from quantkit.paths import user_path
    from quantkit.quantization.early_checks import check_before_torch

    if with_report:
        from quantkit.report.drawing import check_installed

        check_installed()
    output = user_path(output)
    folder = check_before_torch(loaded, output, device=device, restart=restart)
    LOG.info("quantizing %s into %s", loaded.model, output)  # the libraries that follow take seconds to load
    with no_garbage_collection():
        from quantkit.api import expected_seconds
        from quantkit.quantization.pipeline import quantize as run
        from quantkit.quantization.resources import one_heap
        from quantkit.report.console import render_quantization

    one_heap()
    expected = expected_seconds(loaded, folder, device, trust_remote_code=trust_remote_code)
    estimate = {} if expected is None else {"expected_seconds": expected}
    report = run(
        loaded,
        output,
        device=device,
        restart=restart,
        trust_remote_code=trust_remote_code,
        progress=mode,
        **estimate,  # type: ignore[arg-type]
    )
    from quantkit.verification import verify_folder

    verdict = verify_folder(output, tp=loaded.output.tp)
    engines = [name for name, one in (verdict.engines or {}).items() if one.verdict == "loads"]
    written = None
    if with_report:
        from quantkit_eval.report.build import report_of_run

        written = report_of_run(report, output, device=device, trust_remote_code=trust_remote_code, progress=mode)

    def render(done: "Report", console: Any) -> None:
        render_quantization(done, output, engines, console)
        if written is not None:
            written.render(console)

    show_result(report, render, as_json)


KEYS = {
    "--calibration": "calibration.data",
    "--samples": "calibration.samples",
    "--seq-len": "calibration.seq_len",
    "--bits": "weights.bits",
    "--group-size": "weights.group_size",
}


NO_MODEL = "no model: pass --model FOLDER_OR_HUB_ID, or give it as the first argument"


def required_model(model: str | None, model_option: str | None) -> str:
    """The model of a verb that no recipe can name; UserError where there is none, or two."""
    name = model if model_option is None else model_option
    if name is None or model not in (None, name):
        given = "no model" if name is None else f"two models: {model} and --model {model_option}"
        raise UserError(f"{given}\nhint: pass --model FOLDER_OR_HUB_ID, or give it as the first argument")
    return name


def check_one_model(model: str | None, model_option: str | None) -> None:
    """UserError for two models, one as an argument and another as an option."""
    if model is not None and model_option is not None and model != model_option:
        raise UserError(f"two models: {model} and --model {model_option}\nhint: give one of them")


def given_recipe(
    recipe: str | None,
    scheme: str | None,
    model: str | None,
    model_option: str | None,
    flags: dict[str, str | None],
    settings: list[str] | None,
) -> "Recipe":
    """The recipe that the options stand for, its model included; before torch, so that a typo is answered at once."""
    from quantkit.recipe.load import Flag, load
    from quantkit.recipe.names import taken

    check_one_model(model, model_option)
    texts = {name: text for name, text in flags.items() if text is not None}
    given = [Flag(name, KEYS[name], text, literal=name == "--calibration") for name, text in texts.items()]
    loaded = load(recipe, settings or (), model_option if model is None else model, flags=given, scheme=scheme)
    if loaded.model is None:
        raise UserError(NO_MODEL)
    if note := taken(recipe, scheme):
        LOG.info(note)
    return loaded
