"""Tasks of lm-eval by name, loaded. Errors name the task, and what was meant where there is none of that name."""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from quantkit.errors import UserError
from quantkit.paths import user_path
from quantkit_eval.tasks.task_files import check_task_files, is_file_name, own_tasks

NEAREST = 3  # names that an unknown one is answered with


def names_of(tasks: str | Sequence[str]) -> list[str]:
    """Names one by one, from `a,b` or a list. UserError where there is none."""
    parts = [tasks] if isinstance(tasks, str) else list(tasks)
    if found := list(dict.fromkeys(name for part in parts for each in part.split(",") if (name := each.strip()))):
        return found
    raise UserError("no task\nhint: --tasks qk_cloze,qk_choice,qk_code; `quantkit lm-eval ls tasks` lists lm-eval's")


def check_names(tasks: Sequence[str], include_path: str | Path | None) -> Any:
    """lm-eval's TaskManager that knows all these tasks. UserError for one that is unknown, and for faulty files.

    lm-eval's own 14,000 names take it seconds to read: they are read where another name is asked for.
    """
    check_task_files(include_path, tasks)
    from lm_eval.tasks import TaskManager

    folders: list[str | Path] = [each for each in (own_tasks(), include_path and user_path(include_path)) if each]
    names = [name for name in tasks if not is_file_name(name)]
    manager: Any = None
    for defaults in (False, True):
        with quiet_lm_eval():
            manager = TaskManager(include_path=folders, include_defaults=defaults)
        missing = [name for name in names if not any(fnmatchcase(known, name) for known in manager.all_tasks)]
        if not missing:
            return manager
    raise unknown_task(missing[0], manager.all_tasks)


def unknown_task(name: str, known: Sequence[str]) -> UserError:
    """The error for a task of a name that does not exist, with the names most like it."""
    near = difflib.get_close_matches(name, known, n=NEAREST, cutoff=0.6)
    meant = " or ".join(f"`{other}`" for other in near)
    listed = "`quantkit lm-eval ls tasks` lists lm-eval's, and --include-path adds a folder"
    return UserError(f"unknown task {name!r}\nhint: {f'did you mean {meant}?' if near else listed}")


def load_tasks(tasks: str | Sequence[str], include_path: str | Path | None = None) -> list[Any]:
    """lm-eval's task objects, with their rows; of a group or a tag those in it. UserError where one does not load."""
    names = names_of(tasks)
    manager = check_names(names, include_path)
    found: dict[str, Any] = {}
    for name in names:
        with quiet_lm_eval(), task_errors(name):
            spec = [str(user_path(name))] if is_file_name(name) else manager.match_tasks([name])
            found |= manager.load(spec)["tasks"]
    return list(found.values())


@contextmanager
def task_errors(name: str) -> Iterator[None]:
    """Whatever a task raises while it is loaded, as one message: UserError."""
    try:
        with hub_errors(f"task {name!r}"):
            yield
    except UserError:
        raise
    except Exception as error:  # a task is Python code, templates and data of others
        raise UserError(f"task {name!r} cannot be loaded: {first_line(error)}") from error


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """A Hub that is not there, or must not be asked, as one message: UserError."""
    try:
        yield
    except ConnectionError as error:  # of datasets
        raise UserError(f"{what} needs the Hugging Face Hub: {first_line(error)}\nhint: {OFFLINE}") from error


OFFLINE = "go online once, or take tasks whose rows are files: qk_cloze, qk_choice, qk_code, or --include-path FOLDER"


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Within it lm-eval logs errors alone."""
    import logging

    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
