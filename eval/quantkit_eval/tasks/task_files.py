"""Where task files lie, and whether they are YAML. lm-eval passes over those it cannot read: here they are errors."""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode

from quantkit.errors import UserError
from quantkit.paths import user_path

INSTALL = "tasks need lm-eval, which is not installed\nhint: pip install 'quantkit[lm-eval]'"


def check_lm_eval() -> None:
    """UserError where lm-eval cannot be found; nothing is imported."""
    if find_spec("lm_eval") is None:
        raise UserError(INSTALL)


def own_tasks() -> Path | None:
    """The folder of quantkit's own tasks: in the package, or in the checkout; None where neither has it."""
    package = Path(__file__).parents[1]
    return next((folder for folder in (package / "local_tasks", package.parent / "tasks") if folder.is_dir()), None)


def check_task_files(include_path: str | Path | None, tasks: Iterable[str], option: str = "--include-path") -> None:
    """UserError for a folder that is none, and for a task file in it, or among `tasks`, that is not a YAML mapping."""
    if include_path is not None:
        folder = user_path(include_path)
        if not folder.is_dir():
            raise UserError(f"{option} {include_path}: not a folder\nhint: give the folder of the task files")
        for file in sorted(folder.glob("**/*.yaml")):
            check_yaml(file)
    for name in tasks:
        if is_file_name(name):
            check_yaml(user_path(name))


def is_file_name(task: str) -> bool:
    """Whether a task is named by its file; not by a pattern."""
    return "*" not in task and (task.endswith((".yaml", ".yml")) or user_path(task).is_file())


def check_yaml(file: Path) -> None:
    """UserError with the line where a file is no YAML mapping. Tags such as !function are not followed."""
    try:
        with file.open("rb") as stream:
            node = YAML(typ="safe", pure=True).compose(stream)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}\nhint: a task file ends in .yaml") from error
    except (YAMLError, UnicodeError) as error:
        mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
        found = (error.problem if isinstance(error, MarkedYAMLError) else None) or str(error).splitlines()[0]
        line = 1 if mark is None else mark.line + 1
        raise UserError(f"{file}:{line}: a task file must be YAML: {found}") from error
    if not isinstance(node, MappingNode):
        line = 1 if node is None else node.start_mark.line + 1
        raise UserError(f"{file}:{line}: a task file must be a YAML mapping with a key `task`")
