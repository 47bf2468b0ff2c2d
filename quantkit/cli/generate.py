"""quantkit generate: text from a model, streamed."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli.app import Device, Json, Quiet, Trust, no_garbage_collection, print_json
from quantkit.errors import UserError

if TYPE_CHECKING:
    from quantkit.runtime.generation import Writer

DEFAULT_TOKENS = 256

Kv = Annotated[
    str | None,
    typer.Option(
        "--kv-cache",
        "--kv",
        metavar="NAME|keys=NAME,values=NAME",
        help="Keep the cache as int8, int4-asym-g32, fp8, none (as computed), or keys=int8,values=int4; else as the "
        "model says.",
    ),
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: as the model's config says.")]
Draft = Annotated[
    str | None, typer.Option(metavar="MODEL", help="A smaller or quantized model that guesses tokens ahead.")
]
Speculate = Annotated[
    str | None, typer.Option(metavar="ngram", help="Guess tokens by what followed the same words before.")
]
Context = Annotated[int | None, typer.Option(min=1, help="Tokens of prompt and output together; the model's context.")]


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, Hub id or GGUF file, quantized or not.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Text to go on with; else that of --file, or of stdin.")
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="File that holds the prompt; - is stdin.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Talk with the model, a message a line; with a prompt: its answer alone.")
    ] = False,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="Stop after so many.")] = DEFAULT_TOKENS,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Of the likeliest tokens that together have this share.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Of so many likeliest tokens; 0: of all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Of tokens at least this share as likely as the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: tokens seen before become less likely.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="Text to stop at; repeatable.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on where the model would end.")] = False,
    seed: Annotated[int, typer.Option(help="Of the choice of tokens, where the temperature is above 0.")] = 0,
    kv_cache: Kv = None,
    draft: Draft = None,
    speculate: Speculate = None,
    context: Context = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Text that a model generates, as it comes; the text alone is on stdout, one line of figures on stderr.

    Example: quantkit generate llama-w4 --prompt "def " --max-tokens 32
    Example: quantkit generate llama-w4 --chat --kv-cache int8 --temperature 0.7
    """
    from quantkit.runtime.early_checks import check_engine_options
    from quantkit.runtime.engine.request import SamplingParams

    params = SamplingParams(
        temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, repetition_penalty=repetition_penalty,
        max_tokens=max_tokens, stop=stop, ignore_eos=ignore_eos, seed=seed,
    )  # fmt: skip
    _check_input(prompt, file, chat, as_json)
    check_engine_options(
        model, device=device, dtype=dtype, draft=draft, speculate=speculate, kv_cache=kv_cache, chat=chat
    )
    text = None if chat and prompt is None and file is None else _prompt(prompt, file)
    with no_garbage_collection():
        from quantkit.runtime.engine.llm import LLM
        from quantkit.runtime.generation import Writer

    llm = LLM(
        model, dtype, kv_cache, max_num_seqs=1, max_model_len=context, speculate=speculate, draft=draft,
        device=device, seed=seed, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    writer = Writer(llm, params)
    if text is None:
        _talk(writer, quiet)
    else:
        _show(writer, writer.answer(text) if chat else writer.write(text), quiet, as_json)


def _check_input(prompt: str | None, file: Path | None, chat: bool, as_json: bool) -> None:
    if prompt is not None and file is not None:
        raise UserError("--prompt and --file are both given\nhint: give one of them")
    if prompt is None and file is None:
        if chat and as_json:
            raise UserError("--json shows one answer, and --chat goes on\nhint: give the message as --prompt")
        if not chat and sys.stdin.isatty():
            raise UserError("no prompt\nhint: pass --prompt TEXT, pipe a text in, or talk with --chat")


def _prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt as given, or a file's text without its last line break."""
    from quantkit.paths import user_path

    if prompt is None:
        where = "stdin" if file is None or str(file) == "-" else str(file)
        try:
            raw = sys.stdin.buffer.read() if where == "stdin" or file is None else user_path(file).read_bytes()
            prompt = raw.decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 text (byte {error.start}: {error.reason})") from error
        except OSError as error:
            raise UserError(f"{where}: the prompt cannot be read: {error.strerror}") from error
    if not prompt:
        raise UserError("the prompt is empty\nhint: give some text to go on with")
    return prompt


def _talk(writer: "Writer", quiet: bool) -> None:
    terminal = sys.stdin.isatty()
    while True:
        if terminal:
            sys.stderr.write("> ")
            sys.stderr.flush()
        message = sys.stdin.readline()
        if not message:
            return
        if message.strip():
            _show(writer, writer.answer(message.rstrip("\r\n")), quiet, as_json=False)


def _show(writer: "Writer", pieces: Iterator[str], quiet: bool, as_json: bool) -> None:
    """Print pieces as they come. Ctrl-C frees the request, says how far it came, and exits with 130."""
    code = 0
    try:
        for piece in pieces:
            if not as_json:
                sys.stdout.write(piece)
                sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    finally:
        pieces.close()  # type: ignore[attr-defined]
    made = writer.last
    if as_json and made is not None and code == 0:
        print_json(made.to_json())
    elif made is not None and not as_json and not made.text.endswith("\n"):
        typer.echo()
    if code:
        typer.echo("interrupted", err=True)
    if made is not None and not quiet:
        typer.echo(made.summary(), err=True)
    if code:
        raise typer.Exit(code)
