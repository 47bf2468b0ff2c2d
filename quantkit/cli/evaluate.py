"""quantkit eval: perplexity of a model, and how far it is from the original."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from quantkit.cli.app import Device, Json, Trust, show_result


def evaluate(
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
    from quantkit.checkpoint.hub import locate_model
    from quantkit.device_names import check_device_name

    check_device_name(device)
    for name in (path, ref):  # before torch
        if name is not None:
            locate_model(str(name))
    from quantkit_eval import evaluate as run
    from quantkit_eval import render

    result = run(
        path,
        ref=ref,
        text=text,
        context=context,
        max_tokens=tokens,
        device=device,
        trust_remote_code=trust_remote_code,
        progress=sys.stderr.isatty(),
    )
    show_result(result, render, as_json)
