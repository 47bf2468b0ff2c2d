"""quantkit eval: perplexity of a model, and how far it is from the original."""

import sys
from typing import Annotated, Any

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
from quantkit.errors import UserError


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, Hub id or GGUF file, quantized or not.")],
    ref: Annotated[
        str | None, typer.Option(help="The original, folder or Hub id: adds KL divergence and agreement.")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text file, `general` (the default) or `wikitext2`; repeatable.", metavar="FILE|NAME"),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    tokens: Annotated[
        int | None, typer.Option(help="Stop after so many tokens of each text; of `general`: 16384.")
    ] = None,
    device: Device = "auto",
    bos: Annotated[str, typer.Option(help="Begin windows with the tokenizer's BOS: auto, always or never.")] = "auto",
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="llama.cpp|paged",
            help="llama.cpp: llama-cpp-python runs a GGUF file, rounding of inputs included. "
            "paged: the pages and kernels of `quantkit generate`.",
        ),
    ] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(
            "--kv-cache",
            "--kv",
            help="Round cached keys and values: int8, int4-asym-g32, fp8, none, or keys=int8,values=int4.",
            metavar="NAME|keys=NAME,values=NAME",
        ),
    ] = None,
    acceptance: Annotated[
        bool, typer.Option("--acceptance", help="Let MODEL draft for the original: the share of right guesses.")
    ] = False,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAME,..", help="Tasks of lm-eval, or YAML files, in place of texts.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Of each task: its first questions alone.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Of tasks: examples before each question.")] = None,
    include_path: Annotated[
        str | None, typer.Option("--include-path", metavar="FOLDER", help="More task files.")
    ] = None,
    trust_remote_code: Trust = False,
    progress: ProgressMode = "auto",
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Perplexity of a model, and how far it is from the original.

    Example: quantkit eval llama-w4 --ref meta-llama/Llama-3.2-1B --text general --text my.txt
    Example: quantkit eval llama-w4 --ref meta-llama/Llama-3.2-1B --tasks arc_easy,piqa --limit 500
    """
    mode, texts = start_log(progress, quiet, verbose), text or ["general"]
    if tasks is not None:
        _only_texts(text=text, context=context, tokens=tokens, bos=bos, acceptance=acceptance)
        _evaluate_tasks(
            as_json, model=model, tasks=tasks, ref=ref, limit=limit, num_fewshot=num_fewshot,
            include_path=include_path, device=device, engine=engine, kv_cache=kv_cache,
            trust_remote_code=trust_remote_code, progress=mode == "auto" and sys.stderr.isatty(),
        )  # fmt: skip
        return
    for name, value in (("--limit", limit), ("--num-fewshot", num_fewshot), ("--include-path", include_path)):
        if value is not None:
            raise UserError(f"{name} is of tasks, and none is given\nhint: --tasks NAME")
    from quantkit_eval.early_checks import check_before_torch

    check_before_torch(
        model, ref, texts, context=context, tokens=tokens, device=device, bos=bos, engine=engine, kv_cache=kv_cache,
        acceptance=acceptance,
    )  # fmt: skip
    with no_garbage_collection():
        from quantkit_eval import evaluate as run
        from quantkit_eval import render

    result = run(
        model,
        ref=ref,
        text=texts,
        context=context,
        tokens=tokens,
        device=device,
        bos=bos,  # type: ignore[arg-type]
        engine=engine,
        kv_cache=kv_cache,
        acceptance=acceptance,
        trust_remote_code=trust_remote_code,
        progress=mode,
    )
    show_result(result, render, as_json)


def _only_texts(text: list[str] | None, context: int, tokens: int | None, bos: str, acceptance: bool) -> None:
    """UserError where an option of texts comes with tasks."""
    given = {"text": text is not None, "context": context != 256, "tokens": tokens is not None, "bos": bos != "auto"}
    given["acceptance"] = acceptance
    if name := next((name for name, there in given.items() if there), None):
        raise UserError(f"--{name} is of texts, and --tasks is given\nhint: evaluate them apart")


def _evaluate_tasks(as_json: bool, **options: Any) -> None:
    with no_garbage_collection():
        from quantkit_eval.tasks.run import evaluate_tasks
        from quantkit_eval.tasks.tables import render_tasks

    show_result(evaluate_tasks(**options), render_tasks, as_json)
