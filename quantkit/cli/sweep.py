"""quantkit sweep: one model by many recipes, a grid or a search."""

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.app import Device, Json, ProgressMode, Quiet, Trust, Verbose, names, no_garbage_collection, start_log


def sweep(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model folder or Hub id; else the recipe's.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            help="The base: a shipped recipe, a YAML file or a run's report.  [required]",
            autocompletion=names("recipes"),
        ),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=V1,V2",
            help="A key of the recipe and its values, YAML each: weights.bits=3,4; repeatable. With --search also a "
            "range, weights.algorithm.gptq.damping=0.001..0.1.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the results; a killed sweep goes on.  [required]")
    ] = None,
    text: Annotated[
        str, typer.Option(metavar="FILE|NAME", help="What is evaluated: a text file or a name.")
    ] = "general",
    context: Annotated[int, typer.Option(help="Tokens per window of the text.")] = 256,
    tokens: Annotated[int | None, typer.Option(help="Stop after so many tokens of the text.")] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="a,b", help="Tasks of lm-eval, as `quantkit eval --tasks`.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many questions of each task.")] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Runs at a time, as far as memory allows; 1. They then slow each other down.")
    ] = None,
    keep: Annotated[
        str,
        typer.Option(
            metavar="best|pareto|all|none",
            help="Models to keep. best: the smallest that cannot be told from the lowest KL; pareto: the front.",
        ),
    ] = "none",
    search: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="N runs that Optuna chooses for size and KL, from --grid or from a default space."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    ray: Annotated[
        str | None, typer.Option(metavar="[ADDRESS]", help="Each run a task of Ray, of this machine or of a cluster.")
    ] = None,
    device: Device = "auto",
    trust_remote_code: Trust = False,
    progress: ProgressMode = "auto",
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Quantize a model by many recipes, evaluate each, and show which ones are worth their size.

    Killed or interrupted, the same command goes on; only rows whose recipe, model or text has changed run again.
    Exit code 1 where a run failed.
    Example: quantkit sweep --model M --recipe gptq-w4a16 --grid weights.bits=3,4 --keep pareto --output DIR
    """
    mode = start_log(progress, quiet, verbose)
    from quantkit_eval.search.options import SweepOptions, check_options

    from quantkit.errors import UserError
    from quantkit.paths import user_path

    if recipe is None:
        raise UserError("no base recipe: pass --recipe NAME_OR_FILE\nhint: `quantkit recipes` lists the shipped ones")
    if output is None:
        raise UserError("no output folder: pass --output DIR\nhint: a sweep that was killed goes on in its folder")
    options = SweepOptions(
        model=model, recipe=recipe, grid=tuple(grid or ()), output=user_path(output), text=text, context=context,
        tokens=tokens, tasks=tuple(name.strip() for name in (tasks or "").split(",") if name.strip()), limit=limit,
        jobs=jobs, keep=keep,  # type: ignore[arg-type]
        search=search, seed=seed, ray=ray, device=device, trust_remote_code=trust_remote_code, progress=mode,
    )  # fmt: skip
    begun = check_options(options)  # before torch
    with no_garbage_collection():
        from quantkit_eval.search.sweep_run import sweep as run
        from quantkit_eval.search.tables import render

    from quantkit.cli.app import show_result

    result = run(begun)
    show_result(result, render, as_json)
    if result.failed:
        raise typer.Exit(1)
