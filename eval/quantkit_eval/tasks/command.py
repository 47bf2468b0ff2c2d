"""lm-eval's own command with our model registered: `quantkit lm-eval ARGS` is `lm_eval ARGS` with `--model quantkit`.

lm-eval 0.4.13 has no plugins; later versions find the model by its entry point, and then this adds nothing.
"""

import argparse
import sys
from collections.abc import Sequence
from unittest.mock import patch

from quantkit.errors import UserError
from quantkit_eval.tasks.selection import check_names, names_of, task_errors
from quantkit_eval.tasks.task_files import check_lm_eval, is_file_name

NAME = "quantkit"
TARGET = "quantkit_eval.lm_eval_model:QuantkitLM"


def run_lm_eval(arguments: Sequence[str]) -> None:
    """Run lm-eval's command. UserError where lm-eval is absent, a task is unknown, or its file is no YAML.

    SystemExit as lm-eval raises it, for --help and for options that it does not know.
    """
    check_lm_eval()
    _check_tasks(arguments)
    register()
    from lm_eval.__main__ import cli_evaluate

    with patch.object(sys, "argv", ["quantkit lm-eval", *arguments]), task_errors(_tasks(arguments) or "of this run"):
        cli_evaluate()


def register() -> None:
    """Make lm-eval know the model by its name; it is imported when it is asked for. Does nothing where lm-eval does."""
    import lm_eval.models  # noqa: F401  (lists lm-eval's own, and in later versions those of entry points)
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target=TARGET)


def _given(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of lm-eval that say which tasks are meant; all others are left to it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--tasks", "-t", nargs="+", default=[])
    parser.add_argument("--include_path", default=None)
    parser.add_argument("--help", "-h", action="store_true")
    return parser.parse_known_args(list(arguments))[0]


def _tasks(arguments: Sequence[str]) -> str:
    return ", ".join(_given(arguments).tasks)


def _check_tasks(arguments: Sequence[str]) -> None:
    """Answer a wrong name or file before the model is loaded; lm-eval itself passes over files that it cannot read."""
    given = _given(arguments)
    if given.help or not given.tasks or (arguments and arguments[0] in ("ls", "validate")):
        return
    names = names_of(given.tasks)
    if any("/" in name and not is_file_name(name) for name in names):  # a folder of tasks: lm-eval's own way
        return
    try:
        check_names(names, given.include_path)
    except UserError as error:
        raise UserError(str(error).replace("--include-path", "--include_path")) from error
