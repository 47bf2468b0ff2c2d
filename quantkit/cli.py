"""The `quantkit` command: one function per verb, no logic. Everything heavy is imported inside the verbs.

Exit codes: 0 done, 1 the run failed, 2 bad input or usage, 130 interrupted. An error is one message on stderr; the
traceback shows with `quantkit --debug VERB ...` or QUANTKIT_DEBUG=1. Progress appears only where stderr is a terminal.
"""

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from quantkit.errors import RunError, UserError

app = typer.Typer(
    help="Quantize Hugging Face causal language models into checkpoints that real engines load.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: rich's takes more than twice as long to load
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
app.add_typer(recipes_app, name="recipes")

_shown = {"tracebacks": False}  # --debug, for the verb that follows it

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table, and nothing else on stdout.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ..., or auto: a GPU where there is one.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the Python files that come with the model.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="weights.group_size=64; repeatable.")
]


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Turn failures into one message and an exit code."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            _fail("interrupted; `quantkit quantize` goes on where it was when the same command is run again", 130)
        except UserError as error:
            _fail(str(error), 2)
        except RunError as error:
            _fail(str(error), 1)
        except OSError as error:
            _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error), 1)
        except Exception as error:
            _fail(f"unexpected {type(error).__name__}: {error} (`quantkit --debug ...` shows where)", 1)

    return run


def _fail(message: str, code: int) -> None:
    if _shown["tracebacks"]:
        import traceback

        traceback.print_exc()
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"quantkit {version('quantkit')}")
        except PackageNotFoundError:
            typer.echo("quantkit, run from its sources without being installed")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", envvar="QUANTKIT_DEBUG", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Quantize Hugging Face causal language models into checkpoints that real engines load."""
    _shown["tracebacks"] = debug


@app.command()
@verb
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
    from quantkit.recipe import load

    loaded = load(recipe, settings or (), model)  # before torch: a typo is answered at once
    from quantkit.pipeline import quantize as run
    from quantkit.show import render

    report = run(
        loaded,
        output,
        device=device,
        restart=restart,
        trust_remote_code=trust_remote_code,
        progress=sys.stderr.isatty(),
    )
    _show(report, render, as_json)


@app.command("eval")
@verb
def evaluate_(
    path: Annotated[Path, typer.Argument(help="Model folder, quantized or not.")],
    text: Annotated[Path, typer.Option("--text", help="Text file to evaluate on.")],
    ref: Annotated[Path | None, typer.Option("--ref", help="The original: adds KL divergence and agreement.")] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 256,
    tokens: Annotated[int | None, typer.Option(min=1, help="Stop after so many tokens of the text.")] = None,
    device: Device = "cpu",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Perplexity of a model, and how far it is from the original.

    Example: quantkit eval llama-w4 --ref meta-llama/Llama-3.2-1B --text held-out.txt
    """
    from quantkit_eval import evaluate, render

    result = evaluate(
        path,
        ref=ref,
        text=text,
        context=context,
        max_tokens=tokens,
        device=device,
        trust_remote_code=trust_remote_code,
        progress=sys.stderr.isatty(),
    )
    _show(result, render, as_json)


@app.command()
@verb
def inspect(path: Annotated[Path, typer.Argument(help="Model folder.")], as_json: Json = False) -> None:
    """What a model folder holds: number formats, bits per weight, size, and what is not quantized.

    Example: quantkit inspect llama-w4
    """
    from quantkit.inspect import inspect_folder, render

    _show(inspect_folder(path), render, as_json)


@app.command()
@verb
def convert(
    source: Annotated[Path, typer.Argument(help="Quantized model folder, ours or another tool's.")],
    output: Annotated[Path, typer.Argument(help="New folder for the result.")],
    format_: Annotated[
        str, typer.Option("--format", help="compressed-tensors, awq, gptq, gptq_v2, fp8, fp8_tensor or modelopt.")
    ],
    requantize: Annotated[
        bool,
        typer.Option("--requantize", help="Let scales be rounded to the format's numbers; the report says how far."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Carry a quantized folder to another format: the same codes and scales exactly, or a refusal with the reason.

    Example: quantkit convert llama-w4-gptq llama-w4 --format compressed-tensors
    """
    from quantkit.convert import convert as run
    from quantkit.show import render_conversion

    _show(run(source, output, format_, requantize=requantize), render_conversion, as_json)


@app.command()
@verb
def verify(
    path: Annotated[Path, typer.Argument(help="Model folder.")],
    engine: Annotated[
        str | None, typer.Option(help="vllm, sglang, transformers, llama.cpp or tensorrt-llm; all where none is named.")
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel size: devices each layer is spread over.")] = 1,
    checksums: Annotated[
        bool, typer.Option("--checksums", help="Also read every file and compare it with the report's sha256.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Will this engine load the folder, on which hardware, with which kernel? From headers and JSON alone.

    Exit code 1 where it would be refused. Example: quantkit verify llama-w4 --engine vllm --tp 2
    """
    from quantkit.verify import render, verify_folder

    result = verify_folder(path, engine, tp, checksums=checksums)
    _show(result, render, as_json)
    if result["verdict"] == "refused":
        raise typer.Exit(1)


@app.command()
@verb
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
    from quantkit.recipe import load

    loaded = load(recipe, settings or (), model)
    from quantkit.estimate import estimate, render
    from quantkit.output import locate_config

    result = estimate(loaded, locate_config(loaded), trust_remote_code=trust_remote_code)
    _show(result, render, as_json)
    if not result["fits"]:
        raise typer.Exit(1)


@recipes_app.callback()
@verb
def recipes(context: typer.Context) -> None:
    """List the shipped recipes; see also show, check and schema.

    Example: quantkit recipes check my-recipe.yaml
    """
    if context.invoked_subcommand is not None:
        return
    from rich.console import Console
    from rich.table import Table

    from quantkit.recipe import recipe_names, recipe_text

    table = Table("recipe", "what it is")
    for name in recipe_names():
        table.add_row(name, recipe_text(name).partition("\n")[0].lstrip("# "))
    Console().print(table)


@recipes_app.command()
@verb
def show(name: Annotated[str, typer.Argument(help="Name of a shipped recipe, or a file.")]) -> None:
    """Print a recipe, to start your own from.

    Example: quantkit recipes show awq > my-recipe.yaml
    """
    from quantkit.recipe import recipe_text

    typer.echo(recipe_text(name), nl=False)


@recipes_app.command()
@verb
def check(file: Annotated[str, typer.Argument(help="A file, or a shipped name.")], settings: Sets = None) -> None:
    """Report every mistake in a recipe, with line numbers.

    Example: quantkit recipes check my-recipe.yaml
    """
    from quantkit.recipe import load

    load(file, settings or ())
    typer.echo(f"{file}: ok")


@recipes_app.command()
@verb
def schema() -> None:
    """Print the JSON Schema of recipes, for completion in an editor.

    Example: quantkit recipes schema > recipe.schema.json
    """
    from quantkit.recipe import schema as recipe_schema

    _print_json(recipe_schema())


def _show(result: dict[str, Any], render: Callable[[dict[str, Any], Any], None], as_json: bool) -> None:
    if as_json:
        _print_json(result)
    else:
        from rich.console import Console

        render(result, Console())


def main() -> None:
    """The console script."""
    app(prog_name="quantkit")


if __name__ == "__main__":
    main()
