"""quantkit recipes: list, show, check, schema."""

from typing import TYPE_CHECKING, Annotated

import typer

from quantkit.cli.app import Json, Sets, names, print_json, verb
from quantkit.cli.usage import Group
from quantkit.errors import UserError

if TYPE_CHECKING:
    from quantkit.cli.recipe_table import RecipeRow

recipes_app = typer.Typer(cls=Group, invoke_without_command=True, rich_markup_mode=None)
RecipeName = Annotated[
    str, typer.Argument(help="Name of a shipped recipe, or a file.", autocompletion=names("recipes"))
]


@recipes_app.callback()
@verb
def recipes(
    context: typer.Context,
    machine: Annotated[
        str | None, typer.Option("--for", help="Those that are fast there alone: h100, rtx4090, cuda:8.6, cpu, ...")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="Those that this engine takes alone: vllm, sglang, ...", autocompletion=names("engines")),
    ] = None,
    as_json: Json = False,
) -> None:
    """The shipped recipes, what each gives and needs; see also show, check and schema.

    Example: quantkit recipes --for h100 --engine vllm
    """
    if context.invoked_subcommand is not None:
        return
    from quantkit.cli.recipe_table import recipes as recipe_rows

    found = recipe_rows(engine, machine)
    if as_json:
        print_json([row.to_json() for row in found])
    elif not found:
        where = " ".join(filter(None, (f"on {machine}" if machine else "", f"with {engine or 'vllm'}")))
        raise UserError(f"no shipped recipe has a fast kernel {where}\nhint: `quantkit recipes` lists all of them")
    else:
        _print_table(found, engine)


def _fast(row: "RecipeRow", engine: str) -> str:
    from quantkit.cli.recipe_table import fast_gpus

    return fast_gpus(row, engine) if row.engines.get(engine, True) else "?"


def _print_table(found: "list[RecipeRow]", named: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    engine = named or "vllm"
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("recipe", "bits", "algorithm", "calib", "activations", "fast GPUs", "KL"):
        table.add_column(column, justify="right" if column in ("bits", "KL") else "left", no_wrap=True)
    for row in found:
        table.add_row(
            row.name,
            f"{row.bits_per_weight:.2f}",
            row.algorithm,
            {"needed": "yes", "used": "opt."}.get(row.calibration, "no"),
            row.activations,
            _fast(row, engine) if named or row.format != "gguf" else "llama.cpp",
            f"{row.measured.kl:.4f}",
        )
    console = Console()
    console.print(table, highlight=False)
    model = found[0].measured.model
    lines = [
        f"fast GPUs: where {engine} has a kernel that computes in it (--engine, --for)",
        "bits: of the quantized linears; of gguf-*, of all tensors, embedding and head included",
        f"KL: nats from the original on {model}, lower is closer",
        "`quantkit recipes show NAME` prints one; `--set KEY=VALUE` changes a key of it",
    ]
    console.print("\n" + "\n".join(lines), highlight=False, markup=False)


@recipes_app.command()
@verb
def show(name: RecipeName, as_json: Json = False) -> None:
    """Print a recipe, to start your own from; with --json, every key and default as data.

    Example: quantkit recipes show awq > my-recipe.yaml
    """
    from quantkit.recipe.load import load, recipe_text

    if as_json:
        print_json(load(name).resolved())
    else:
        typer.echo(recipe_text(name), nl=False)


@recipes_app.command()
@verb
def check(file: RecipeName, settings: Sets = None, as_json: Json = False) -> None:
    """Report every mistake in a recipe, with line numbers.

    Exit code 2 where there is one. Example: quantkit recipes check my-recipe.yaml
    """
    from quantkit.recipe.load import RecipeError, load

    try:
        load(file, settings or ())
    except RecipeError as error:
        if not as_json:
            raise
        print_json({"ok": False, "problems": error.problems})
        raise typer.Exit(2) from None
    if as_json:
        print_json({"ok": True, "problems": []})
    else:
        typer.echo(f"{file}: ok")


@recipes_app.command()
@verb
def schema(as_json: Json = False) -> None:
    """Print the JSON Schema of recipes, for completion in an editor.

    Example: quantkit recipes schema > recipe.schema.json
    """
    from quantkit.recipe.load import schema as recipe_schema

    print_json(recipe_schema())
