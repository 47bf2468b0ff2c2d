"""The verb plan: what a run takes, and with --gpu how the model will be served."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli.app import Json, Sets, Trust, names, no_garbage_collection, print_json, show_result, start_log
from quantkit.cli.quantize import (
    NO_MODEL,
    Bits,
    Calibration,
    GroupSize,
    ModelOption,
    RecipeName,
    Samples,
    Scheme,
    SeqLen,
    check_one_model,
    given_recipe,
)
from quantkit.errors import UserError

if TYPE_CHECKING:
    from quantkit.planner.traffic import Traffic
    from quantkit.recipe.recipe import Recipe


def plan(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Model folder (config.json is enough) or Hub id.")
    ] = None,
    recipe: RecipeName = None,
    scheme: Scheme = None,
    model_option: ModelOption = None,
    calibration: Calibration = None,
    samples: Samples = None,
    seq_len: SeqLen = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    settings: Sets = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How it is served there: h100, h200, b200, mi300x, rtx4090, ... or cpu, this machine's.",
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="With --gpu: whose rules count.  [default: the recipe's, or vllm]", autocompletion=names("engines")
        ),
    ] = None,
    context: Annotated[int | None, typer.Option(metavar="N", help="With --gpu: tokens kept of a sequence.")] = None,
    concurrency: Annotated[
        int | None, typer.Option(metavar="N", help="With --gpu: sequences at once.  [default: 1]")
    ] = None,
    prompt: Annotated[int | None, typer.Option(metavar="N", help="With --gpu: tokens of a request.")] = None,
    output: Annotated[
        int | None, typer.Option(metavar="N", help="With --gpu: tokens of an answer (plan writes no folder).")
    ] = None,
    tp: Annotated[int | None, typer.Option(metavar="N", help="With --gpu: GPUs that each layer is split over.")] = None,
    pp: Annotated[int | None, typer.Option(metavar="N", help="With --gpu: stages that layers are dealt to.")] = None,
    profile: Annotated[
        str | None, typer.Option(metavar="interactive|batch", help="With --gpu: what counts; without it quality does.")
    ] = None,
    price: Annotated[
        float | None, typer.Option(metavar="X", help="With --gpu: what one GPU costs an hour, in your currency.")
    ] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """What quantizing will take and give, from config.json alone: size, memory, time, and whether it fits here.

    With --gpu also how the model is served there, in bf16 and in each scheme, and which one to take; a recipe is then
    optional, and MODEL may be a config.json by itself.
    Exit code 1 where it does not fit. Example: quantkit plan meta-llama/Llama-3.1-8B --scheme W4A16
    """
    start_log("auto", quiet=False, verbose=False)
    flags = {"--calibration": calibration, "--samples": samples, "--seq-len": seq_len, "--bits": bits}
    flags |= {"--group-size": group_size}
    asked = {"--context": context, "--concurrency": concurrency, "--prompt": prompt, "--output": output, "--tp": tp}
    asked |= {"--pp": pp, "--profile": profile, "--price": price, "--engine": engine}
    if gpu is None:
        if given := next((name for name, value in asked.items() if value is not None), None):
            raise UserError(f"{given} is for a plan of serving\nhint: add --gpu h100, or another device")
        _plan_run(given_recipe(recipe, scheme, model, model_option, flags, settings), trust_remote_code, as_json)
        return
    from quantkit.planner.devices import check_device
    from quantkit.planner.traffic import Traffic, check_traffic, config_folder

    gpu = check_device(gpu)
    concurrency, tp, pp = (1 if count is None else count for count in (concurrency, tp, pp))
    traffic = Traffic(
        context=context,
        concurrency=concurrency,
        prompt=prompt,
        output=output,
        tp=tp,
        pp=pp,
        profile=profile,
        price=price,
    )
    check_traffic(traffic)
    by_recipe = bool(recipe or scheme or settings or any(value is not None for value in flags.values()))
    check_one_model(model, model_option)
    name = model_option if model is None else model
    if name is None and recipe is not None:
        name = given_recipe(recipe, scheme, None, None, flags, settings).model
    if name is None:
        raise UserError(NO_MODEL)
    with config_folder(name) as folder:
        loaded = given_recipe(recipe, scheme, folder, None, flags, settings) if by_recipe else None
        _plan_serving(name, folder, loaded, gpu, traffic, engine, trust_remote_code, as_json)


def _plan_run(loaded: "Recipe", trust_remote_code: bool, as_json: bool) -> None:
    from quantkit.quantization.early_checks import check_plan

    folder = check_plan(loaded)  # before torch
    with no_garbage_collection():
        from quantkit.planner.estimate import estimate
        from quantkit.report.console import render_plan

        result = estimate(loaded, folder, trust_remote_code=trust_remote_code)
    show_result(result, render_plan, as_json)
    if not result.fits:
        raise typer.Exit(1)


def _plan_serving(
    name: str,
    model: str,
    loaded: "Recipe | None",
    gpu: str,
    traffic: "Traffic",
    engine: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """name: the model as it was given; model: as a folder or Hub id."""
    from quantkit.checkpoint.hub import locate_config
    from quantkit.cli.app import check_name
    from quantkit.quantization.early_checks import check_plan

    engine = engine or (None if loaded is None else loaded.output.engine) or "vllm"
    check_name("engine", engine)
    folder = locate_config(model) if loaded is None else check_plan(loaded)
    with no_garbage_collection():
        from rich.console import Console

        from quantkit.planner.estimate import estimate
        from quantkit.planner.serving import plan_serving
        from quantkit.report.console import render_plan
        from quantkit.report.serving_console import render_serving

    serving = plan_serving(
        folder, gpu, traffic, recipe=loaded, engine=engine, name=name, trust_remote_code=trust_remote_code
    )
    run = None if loaded is None else replace(estimate(loaded, folder, trust_remote_code=trust_remote_code), model=name)
    if as_json:
        print_json(({} if run is None else run.to_json()) | {"serving": serving.to_json()})
    else:
        if run is not None:
            render_plan(run, Console())
        render_serving(serving, Console())
    if not (serving.fits if run is None else run.fits):
        raise typer.Exit(1)
