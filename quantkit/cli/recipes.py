"""quantkit recipes: list, show, check, schema."""

from typing import Annotated

import typer

from quantkit.cli.app import Sets, print_json, verb

recipes_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)


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

    from quantkit.recipe.load import recipe_names, recipe_text

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
    from quantkit.recipe.load import recipe_text

    typer.echo(recipe_text(name), nl=False)


@recipes_app.command()
@verb
def check(file: Annotated[str, typer.Argument(help="A file, or a shipped name.")], settings: Sets = None) -> None:
    """Report every mistake in a recipe, with line numbers.

    Example: quantkit recipes check my-recipe.yaml
    """
    from quantkit.recipe.load import load

    load(file, settings or ())
    typer.echo(f"{file}: ok")


@recipes_app.command()
@verb
def schema() -> None:
    """Print the JSON Schema of recipes, for completion in an editor.

    Example: quantkit recipes schema > recipe.schema.json
    """
    from quantkit.recipe.load import schema as recipe_schema

    print_json(recipe_schema())
