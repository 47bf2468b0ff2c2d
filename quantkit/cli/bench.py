"""quantkit bench: how fast a model runs in the paged engine, and beside others."""

import json
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.app import Device, ProgressMode, Quiet, Trust, Verbose, no_garbage_collection, start_log
from quantkit.cli.generate import Draft, Dtype, Kv, Speculate
from quantkit.errors import UserError


def bench(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, Hub id or GGUF file, quantized or not.")],
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,..",
            help="Run beside: generate (one by one), batched (padded batches of 8), generate_batch (transformers' "
            "continuous batching), or another model; repeatable.",
        ),
    ] = None,
    requests: Annotated[int | None, typer.Option(help="Requests of mixed lengths; 256.")] = None,
    input_: Annotated[
        str | None, typer.Option("--input", metavar="N|LEAST:MOST", help="Tokens of a prompt; 100:1024.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", metavar="N|LEAST:MOST", help="Tokens generated; 100:1024.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Requests that arrive in a second, as a Poisson process; else all at once.")
    ] = None,
    prefill: Annotated[int | None, typer.Option(help="Instead: prompts of just so many tokens; 512.")] = None,
    decode: Annotated[int | None, typer.Option(help="and just so many tokens generated; 128.")] = None,
    sweep_batch: Annotated[
        str | None, typer.Option(metavar="1,8,32", help="and so many sequences at a time, in turn; 1.")
    ] = None,
    shared_prefix: Annotated[int, typer.Option(help="Tokens that all prompts begin with.")] = 0,
    seed: Annotated[int, typer.Option(help="Of lengths, prompts and arrivals.")] = 0,
    kv_cache: Kv = None,
    draft: Draft = None,
    speculate: Speculate = None,
    max_num_seqs: Annotated[int, typer.Option(help="Requests that run at a time.")] = 32,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens of a step.")] = 512,
    num_blocks: Annotated[int | None, typer.Option(help="Blocks of the cache; as many as requests need.")] = None,
    no_prefix_cache: Annotated[
        bool, typer.Option("--no-prefix-cache", help="Compute what prompts share for each of them.")
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    llamacpp: Annotated[
        Path | None, typer.Option(metavar="DIR", help="llama.cpp's built tools: run its llama-bench as well.")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(metavar="FILE", help="New file for a torch.profiler trace of a short run.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="New SVG file for a picture.")] = None,
    json_: Annotated[
        str | None, typer.Option("--json", metavar="-|FILE", help="All figures: - alone on stdout, or a new file.")
    ] = None,
    trust_remote_code: Trust = False,
    progress: ProgressMode = "auto",
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """How fast a model runs in the paged engine: latencies, tokens a second, and what limits them.

    The engine runs before and after each baseline, in one process, greedily and to the last token.
    Example: quantkit bench llama-w4 --requests 32 --input 8:128 --output 64 --baseline generate,batched
    Example: quantkit bench llama-w4 --prefill 512 --decode 128 --sweep-batch 1,8,32 --plot speed.svg
    """
    start_log(progress, quiet, verbose)
    from quantkit_eval.bench.options import BenchOptions, check_options, context_of, scenarios

    from quantkit.paths import user_path
    from quantkit.runtime.early_checks import check_engine_options

    check_engine_options(model, device=device, dtype=dtype, draft=draft, speculate=speculate, kv_cache=kv_cache)
    what = scenarios(
        context_of(model), requests=requests, input=input_, output=output, prefill=prefill, decode=decode,
        sweep=sweep_batch,
    )  # fmt: skip
    names = tuple(name.strip() for text in baseline or [] for name in text.split(",") if name.strip())
    options = BenchOptions(
        model, what, names, rate, shared_prefix, seed, kv_cache, dtype, device, draft, speculate, max_num_seqs,
        max_num_batched_tokens, num_blocks, not no_prefix_cache, trust_remote_code,
        None if llamacpp is None else user_path(llamacpp),
    )  # fmt: skip
    check_options(options)
    files = {"--json": None if json_ in (None, "-") else Path(json_), "--plot": plot, "--profile": profile}
    found = {name: _new_file(name, path) for name, path in files.items() if path is not None}
    with no_garbage_collection():
        from quantkit_eval.bench.benchmark import benchmark
        from quantkit_eval.bench.plot import write_plot
        from quantkit_eval.bench.tables import render

    result = benchmark(options, trace=found.get("--profile"))
    text = json.dumps(result.to_json(), indent=2, ensure_ascii=False)
    if "--plot" in found:
        write_plot(result, found["--plot"])
    if "--json" in found:
        found["--json"].write_text(text + "\n", encoding="utf-8")
    if json_ == "-":
        typer.echo(text)
    else:
        from rich.console import Console

        render(result, Console())


def _new_file(option: str, path: Path) -> Path:
    """The path of a file that can be made; UserError where it exists, or its folder does not."""
    from quantkit.paths import user_path

    place = user_path(path)
    if place.exists():
        raise UserError(f"{option} {place}: exists, and is never overwritten\nhint: choose another name")
    if not place.absolute().parent.is_dir():
        raise UserError(f"{option} {place}: its folder does not exist\nhint: make it first")
    return place
