"""quantkit report: how good a quantized folder is, as a page to read, as JSON and as a model card."""

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.app import Device, Json, ProgressMode, Quiet, Trust, Verbose, print_json, show_result, start_log


def _schema(wanted: bool) -> None:
    if wanted:
        from quantkit.report.document import document_schema

        print_json(document_schema())
        raise typer.Exit


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `quantkit quantize` made.")],
    ref: Annotated[
        str | None, typer.Option(help="The original, folder or Hub id: adds all that is measured beside it.")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text to measure on: a file, `general` or `wikitext2`; repeatable.", metavar="FILE|NAME"),
    ] = None,
    results: Annotated[
        Path | None, typer.Option(help="Results of tasks: JSON of `quantkit eval --tasks`, or of lm-eval.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The page, its JSON beside it; by default into DIR, where README.md is made too."
        ),
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens per window: 256, or what the model takes.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Stop after so many tokens of each text.")] = None,
    device: Device = "auto",
    schema: Annotated[
        bool,
        typer.Option("--schema", callback=_schema, is_eager=True, help="Print the JSON Schema of the report's JSON."),
    ] = False,
    trust_remote_code: Trust = False,
    progress: ProgressMode = "auto",
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """How good a quantized folder is: one HTML page, the same as JSON, and a model card.

    Example: quantkit report llama-w4 --ref meta-llama/Llama-3.2-1B --text wikitext2
    """
    mode = start_log(progress, quiet, verbose)
    from quantkit_eval.report.build import write_report

    written = write_report(
        folder,
        ref=ref,
        texts=text or (),
        results=results,
        output=output,
        context=context,
        tokens=tokens,
        device=device,
        trust_remote_code=trust_remote_code,
        progress=mode,
    )
    show_result(written, lambda done, console: done.render(console), as_json)
