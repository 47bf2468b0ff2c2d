"""Mistakes in verbs and options, answered in the words of all other errors: what, then `hint:` with what was meant."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from quantkit.errors import UserError
from quantkit.suggestions import nearest

UsageError: Any = typer.BadParameter.__mro__[1]  # typer brings its own copy of click, or uses the installed one
# What other tools call a verb.
VERB_WORDS = {
    **dict.fromkeys(("evaluate", "perplexity", "ppl", "score"), "eval"),
    **dict.fromkeys(("benchmark", "speed", "latency", "throughput"), "bench"),
    **dict.fromkeys(("chat", "complete", "infer", "sample"), "generate"),
    **dict.fromkeys(("info", "show", "describe", "ls"), "inspect"),
    **dict.fromkeys(("check", "validate", "test"), "verify"),
    **dict.fromkeys(("list", "recipe", "schemes"), "recipes"),
    **dict.fromkeys(("doctor", "environment", "collect-env", "sysinfo", "version"), "env"),
    **dict.fromkeys(("estimate", "dry-run", "size"), "plan"),
    **dict.fromkeys(("export", "transcode"), "convert"),
    **dict.fromkeys(("compress", "oneshot", "run"), "quantize"),
}


MIX = re.compile(r"(i?q|tq|f|bf|mxfp|nvfp)\d\w*|auto", re.IGNORECASE)  # as GGUF's types and mixes are called


class Group(TyperGroup):
    """A group of verbs that answers wrong usage with one message, exit code 2."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _answered():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _answered():
            return super().invoke(ctx)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0] if args else ""
        if name and not name.startswith("-") and self.get_command(ctx, name) is None:
            verbs = self.list_commands(ctx)
            meant = VERB_WORDS.get(name.lower()) or nearest(name, verbs)
            hint = f"did you mean `{ctx.command_path} {meant}`?" if meant in verbs else f"there are {', '.join(verbs)}"
            raise UserError(f"{ctx.command_path} has no verb `{name}`\nhint: {hint}")
        return super().resolve_command(ctx, args)


class Convert(TyperCommand):
    """`--requantize` with or without a value: what follows it is one where it looks like the name of a GGUF type."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        found = []
        for i, word in enumerate(args):
            alone = word == "--requantize" and not (args[i + 1 : i + 2] and MIX.fullmatch(args[i + 1]))
            found += [word, "auto"] if alone else [word]
        return super().parse_args(ctx, found)


class Sweep(TyperCommand):
    """`--ray` with or without an address: what follows it is one where it is not an option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        found = []
        for i, word in enumerate(args):
            alone = word == "--ray" and (not args[i + 1 :] or args[i + 1].startswith("-"))
            found += [word, "local"] if alone else [word]
        return super().parse_args(ctx, found)


@contextmanager
def _answered() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help
            raise
        typer.echo(f"error: {_explained(error)}", err=True)
        raise typer.Exit(2) from None


def _explained(error: Any) -> str:
    path = error.ctx.command_path if error.ctx is not None else "quantkit"
    see = f"`{path} --help` shows what it takes"
    if (option := getattr(error, "option_name", None)) and option.startswith("-") and "No such" in str(error.message):
        parameters = error.ctx.command.params if error.ctx is not None else ()
        options = [name for parameter in parameters for name in parameter.opts if name.startswith("--")]
        meant = nearest(option, options)
        return f"{path} has no option `{option}`\nhint: " + (f"did you mean `{meant}`? {see}" if meant else see)
    message = error.format_message().rstrip(".")
    return f"{path}: {message[:1].lower()}{message[1:]}\nhint: {see}"
