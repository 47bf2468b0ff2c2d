"""lm-eval's own command with our model registered: `quantkit lm-eval ARGS` is `lm_eval ARGS` with `--model quantkit`.

lm-eval 0.4.13 has no plugins; later versions find the model by its entry point, and then this adds nothing.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

from quantkit.errors import UserError
from quantkit_eval.tasks.selection import check_names, first_line, hub_errors, names_of
from quantkit_eval.tasks.task_files import check_lm_eval, check_task_files, own_tasks

NAME = "quantkit"
TARGET = "quantkit_eval.lm_eval_model:QuantkitLM"


def run_lm_eval(arguments: Sequence[str]) -> None:
    """Run lm-eval's command. UserError where lm-eval is absent, a task is unknown, or its file is no YAML.

    Tasks of quantkit's own are found where no other folder is given. SystemExit as lm-eval raises it, for --help and
    for options that it does not know.
    """
    check_lm_eval()
    given = _given(arguments)
    check_task_files(given.include_path, given.tasks, option="--include_path")
    folder = own_tasks()
    if given.include_path is None and folder is not None and {f"{name}.yaml" for name in given.tasks} & _files(folder):
        arguments = [*arguments, "--include_path", str(folder)]
    register()
    from lm_eval.__main__ import cli_evaluate

    try:
        with patch.object(sys, "argv", ["quantkit lm-eval", *arguments]), hub_errors("a task or a model"):
            cli_evaluate()
    except UserError:
        raise
    except ValueError as error:  # lm-eval's word for wrong arguments
        if "Tasks not found" in str(error):
            check_names(given.tasks, given.include_path)
        raise UserError(first_line(error)) from error


def register() -> None:
    """Make lm-eval know the model by its name; it is imported when it is asked for. Does nothing where lm-eval does."""
    import lm_eval.models  # noqa: F401  (lists lm-eval's own, and in later versions those of entry points)
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target=TARGET)


def _given(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of lm-eval that say which tasks are meant; all others are left to it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--tasks", "-t", nargs="+", default=[])
    parser.add_argument("--include_path")
    try:
        given = parser.parse_known_args(list(arguments))[0]
    except argparse.ArgumentError:  # lm-eval says what is wrong with them
        return argparse.Namespace(tasks=[], include_path=None)
    given.tasks = names_of(given.tasks) if given.tasks else []
    return given


def _files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}
