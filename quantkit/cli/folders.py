"""The verbs on a model folder: inspect, convert, verify."""

from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.app import Json, check_name, names, show_result
from quantkit.paths import user_path


def inspect(path: Annotated[Path, typer.Argument(help="Model folder or GGUF file.")], as_json: Json = False) -> None:
    """What a model folder or a GGUF file holds: number formats, bits per weight, size, and what is not quantized.

    Example: quantkit inspect llama-w4
    """
    from quantkit.inspection import inspect_folder
    from quantkit.report.console import render_inspection

    show_result(inspect_folder(path), render_inspection, as_json)


def convert(
    source: Annotated[Path, typer.Argument(help="Quantized model folder, ours or another tool's.")],
    output: Annotated[Path, typer.Argument(help="New folder for the result.")],
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="compressed-tensors, awq, gptq, gptq_v2, fp8, fp8_tensor or modelopt.",
            autocompletion=names("formats"),
        ),
    ],
    requantize: Annotated[
        bool,
        typer.Option("--requantize", help="Let scales be rounded to the format's numbers; the report says how far."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Convert a quantized folder to another format: the same codes and scales exactly, or a refusal with the reason.

    Example: quantkit convert llama-w4-gptq llama-w4 --format compressed-tensors
    """
    check_name("format", format_)
    from quantkit.checkpoint.early_checks import check_conversion

    check_conversion(user_path(source), user_path(output))  # before torch
    from quantkit.conversion import convert as run
    from quantkit.report.console import render_conversion

    show_result(run(source, output, format_, requantize=requantize), render_conversion, as_json)


def verify(
    path: Annotated[Path, typer.Argument(help="Model folder or GGUF file.")],
    engine: Annotated[
        str | None,
        typer.Option(
            help="vllm, sglang, transformers, llama.cpp or tensorrt-llm; all where none is named.",
            autocompletion=names("engines"),
        ),
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel size: devices each layer is spread over.")] = 1,
    checksums: Annotated[
        bool, typer.Option("--checksums", help="Also read every file and compare it with the report's sha256.")
    ] = False,
    hardware: Annotated[
        str | None, typer.Option(help="Ask whether it runs there: cpu, a100, h100, mi300, cuda:8.6, ...")
    ] = None,
    as_json: Json = False,
) -> None:
    """Will this engine load the folder or GGUF file, on which hardware, with which kernel? From headers and JSON alone.

    Exit code 1 where it would be refused, or has no kernel on --hardware.
    Example: quantkit verify llama-w4 --engine vllm --tp 2 --hardware h100
    """
    from quantkit.checkpoint.early_checks import check_verifiable
    from quantkit.report.console import (
        render_verdict,
    )
    from quantkit.verification import verify_folder

    check_verifiable(path)

    result = verify_folder(path, engine, tp, checksums=checksums, hardware=hardware)
    show_result(result.to_json(), render_verdict, as_json)
    if result.verdict == "refused":
        raise typer.Exit(1)
