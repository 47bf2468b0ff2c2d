"""The `quantkit` command: which function is which verb, in the order of `quantkit --help`."""

from quantkit.cli.app import app, verb
from quantkit.cli.bench import bench
from quantkit.cli.environment import env
from quantkit.cli.evaluate import evaluate
from quantkit.cli.folders import convert, inspect, verify
from quantkit.cli.generate import generate
from quantkit.cli.imatrix import imatrix
from quantkit.cli.lm_eval import lm_eval
from quantkit.cli.quantize import plan, quantize
from quantkit.cli.recipes import recipes_app
from quantkit.cli.usage import Convert

VERBS = {
    "quantize": quantize,
    "eval": evaluate,
    "generate": generate,
    "bench": bench,
    "inspect": inspect,
    "convert": convert,
    "verify": verify,
    "plan": plan,
    "imatrix": imatrix,
}
for name, function in VERBS.items():
    app.command(name, cls=Convert if name == "convert" else None)(verb(function))
app.command(
    "lm-eval",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)(verb(lm_eval))
app.add_typer(recipes_app, name="recipes")
app.command("env")(verb(env))


def main() -> None:
    """The console script."""
    app(prog_name="quantkit")
