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
    source: Annotated[Path, typer.Argument(help="Model folder, quantized by us or by another tool.")],
    output: Annotated[Path, typer.Argument(help="New folder for the result, or a new file NAME.gguf.")],
    format_: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="compressed-tensors, awq, gptq, gptq_v2, fp8, fp8_tensor or modelopt; gguf follows from NAME.gguf.",
            autocompletion=names("formats"),
        ),
    ] = None,
    requantize: Annotated[
        str | None,
        typer.Option(
            "--requantize",
            metavar="[MIX]",
            help="Let scales be rounded to the format's numbers; GGUF: round all weights again, onto q4_k_m, f16 ...",
        ),
    ] = None,
    token_embedding: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="GGUF: type of the embedding, as stored by default: q6_k, f16 ..."),
    ] = None,
    output_type: Annotated[str | None, typer.Option(metavar="TYPE", help="GGUF: type of the head, likewise.")] = None,
    pre: Annotated[
        str | None, typer.Option(metavar="NAME", help="GGUF: llama.cpp's pre-tokenizer; found by default.")
    ] = None,
    max_shard: Annotated[str | None, typer.Option(metavar="SIZE", help="GGUF: largest file, 4G, 500M ...")] = None,
    as_json: Json = False,
) -> None:
    """Convert a folder to another format, or to a GGUF file: the same codes and scales exactly, or a refusal.

    GGUF holds int4 and int8 in symmetric groups of 32, MXFP4 and NVFP4; a dense folder becomes F32, F16 or BF16.
    Example: quantkit convert llama-w4-gptq llama-w4 --format compressed-tensors
    Example: quantkit convert llama-w4-g32 llama-q4_0.gguf --token-embedding q6_k
    """
    from quantkit.gguf_conversion.choices import Choices, check_gguf_conversion, is_gguf
    from quantkit.report.console import render_conversion

    if is_gguf(output, format_):
        choices = Choices(requantize, token_embedding, output_type, pre, max_shard).checked()
        check_gguf_conversion(user_path(source), user_path(output))  # before torch
        from quantkit.gguf_conversion.convert import convert_to_gguf

        show_result(convert_to_gguf(source, output, choices), render_conversion, as_json)
        return
    Choices(requantize, token_embedding, output_type, pre, max_shard).refuse()
    check_name("format", format_ or "")
    from quantkit.checkpoint.early_checks import check_conversion

    check_conversion(user_path(source), user_path(output))  # before torch
    from quantkit.conversion import convert as run

    report = run(source, output, format_ or "", requantize=requantize is not None)
    show_result(report, render_conversion, as_json)


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
