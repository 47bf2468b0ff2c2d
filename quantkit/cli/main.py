"""The `quantkit` command: which function is which verb, in the order of `quantkit --help`."""

from quantkit.cli.app import app, verb
from quantkit.cli.auto import auto
from quantkit.cli.bench import bench
from quantkit.cli.environment import env
from quantkit.cli.evaluate import evaluate
from quantkit.cli.folders import convert, inspect, verify
from quantkit.cli.generate import generate
from quantkit.cli.imatrix import imatrix
from quantkit.cli.lm_eval import lm_eval
from quantkit.cli.plan import plan
from quantkit.cli.push import push
from quantkit.cli.quantize import quantize
from quantkit.cli.recipes import recipes_app
from quantkit.cli.report import report
from quantkit.cli.sweep import sweep
from quantkit.cli.usage import Convert, Sweep

VERBS = {
    "quantize": quantize,
    "auto": auto,
    "eval": evaluate,
    "report": report,
    "generate": generate,
    "sweep": sweep,
    "bench": bench,
    "inspect": inspect,
    "convert": convert,
    "verify": verify,
    "push": push,
    "plan": plan,
    "imatrix": imatrix,
}
CLASSES = {"convert": Convert, "sweep": Sweep}
for name, function in VERBS.items():
    app.command(name, cls=CLASSES.get(name))(verb(function))
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
