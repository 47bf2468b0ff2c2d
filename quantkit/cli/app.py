"""The `quantkit` command: one function per verb, no logic. Everything heavy is imported inside the verbs.

Exit codes: 0 done, 1 the run failed, 2 bad input or usage, 130 interrupted. An error is one message on stderr; the
traceback shows with `quantkit --debug VERB ...` or QUANTKIT_DEBUG=1. Progress appears only where stderr is a terminal.
"""

import functools
import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Protocol, TypeVar

import typer

from quantkit.cli.usage import Group
from quantkit.errors import RunError, UserError

app = typer.Typer(
    cls=Group,
    help="Quantize Hugging Face causal language models into checkpoints that real engines load.",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: rich's takes more than twice as long to load
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RESUMABLE = ("quantize", "sweep", "auto")
_shown = {"tracebacks": False}  # --debug, for the verb that follows it

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table, and nothing else on stdout.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ..., or auto: a GPU where there is one.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the Python files that come with the model.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="weights.group_size=64; repeatable.")
]

ProgressMode = Annotated[
    str, typer.Option("--progress", metavar="auto|plain|off", help="auto: a bar on a terminal; plain: lines of text.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Warnings and errors alone.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="More lines of what is done.")]


def start_log(progress: str, quiet: bool, verbose: bool) -> Any:
    """Set up what is written to stderr, before anything heavy loads; returns the mode of the run's progress."""
    from quantkit.progress import check_mode, configure
    from quantkit.suggestions import unknown

    if quiet and verbose:
        raise UserError("--quiet and --verbose are both given\nhint: give one of them")
    if progress not in (modes := ("auto", "plain", "off")):
        raise unknown("mode of --progress", progress, modes)
    configure(mode := "off" if quiet else check_mode(progress), verbose - quiet)
    return mode


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """For imports: they make a million objects, none of which dies; looking for dead ones takes a sixth of the time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Turn failures into one message and an exit code."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            resumed = "; it goes on where it was when the same command is run again"
            _fail(f"interrupted{resumed if function.__name__ in RESUMABLE else ''}", 130)
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


def print_json(data: Any) -> None:
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
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Quantize Hugging Face causal language models into checkpoints that real engines load."""
    _shown["tracebacks"] = debug


class Record(Protocol):
    """A result that becomes JSON."""

    def to_json(self) -> dict[str, Any]: ...


R = TypeVar("R", bound=dict[str, Any] | Record)


def names(kind: str) -> Callable[[str], list[str]]:
    """What completes an option: the names of that kind ("recipes", "schemes", "engines", "formats") that begin so."""

    def complete(incomplete: str) -> list[str]:
        from quantkit.cli.completion import NAMES

        return [name for name in NAMES[kind]() if name.startswith(incomplete)]

    return complete


def check_name(kind: str, given: str) -> None:
    """UserError for a name that none of its kind ("engine", "format") has; before anything heavy is loaded."""
    from quantkit.cli.completion import NAMES

    if given not in (known := list(NAMES[f"{kind}s"]())):
        from quantkit.suggestions import unknown

        raise unknown(kind, given, known)


def show_result(result: R, render: Callable[[R, Any], None], as_json: bool) -> None:
    """Print a result as a table, or as JSON."""
    if as_json:
        print_json(result if isinstance(result, dict) else result.to_json())
    else:
        from rich.console import Console

        render(result, Console())
