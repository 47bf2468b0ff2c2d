"""The verbs that read a recipe: quantize and plan."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.app import Device, Json, Sets, Trust, show_result


def quantize(
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Name of a shipped recipe, or a YAML file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the result.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model folder or Hub id, over the recipe's.")
    ] = None,
    device: Device = "auto",
    settings: Sets = None,
    restart: Annotated[bool, typer.Option("--restart", help="Drop what an earlier, interrupted run has done.")] = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Quantize a model by a recipe.

    Example: quantkit quantize --recipe awq --model meta-llama/Llama-3.2-1B --output llama-w4
    """
    from quantkit.recipe.load import load

    loaded = load(recipe, settings or (), model)  # before torch: a typo is answered at once
    from quantkit.quantization.early_checks import check_before_torch

    check_before_torch(loaded, output, device=device, restart=restart)
    from quantkit.quantization.pipeline import quantize as run
    from quantkit.report.console import (
        render_quantization,
    )

    report = run(
        loaded,
        output,
        device=device,
        restart=restart,
        trust_remote_code=trust_remote_code,
        progress=sys.stderr.isatty(),
    )
    show_result(report, render_quantization, as_json)


def plan(
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Name of a shipped recipe, or a YAML file.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model folder (config.json is enough) or Hub id.")
    ] = None,
    settings: Sets = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """What quantizing will take and give, from config.json alone: size, memory, time, and whether it fits here.

    Exit code 1 where it does not fit. Example: quantkit plan --recipe gptq-w4a16 --model meta-llama/Llama-3.1-8B
    """
    from quantkit.recipe.load import load

    loaded = load(recipe, settings or (), model)
    from quantkit.quantization.early_checks import check_plan

    folder = check_plan(loaded)  # before torch
    from quantkit.planner.estimate import (
        estimate,
    )
    from quantkit.report.console import (
        render_plan,
    )

    result = estimate(loaded, folder, trust_remote_code=trust_remote_code)
    show_result(result, render_plan, as_json)
    if not result["fits"]:
        raise typer.Exit(1)
