"""A sweep as it is asked for, and what is refused before torch is imported."""

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

from quantkit.checkpoint.hub import ANSWER_SECONDS, locate_model
from quantkit.checkpoint.model_folder import local_folder
from quantkit.checkpoint.quantization_config import refuse_quantized
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import UserError
from quantkit.progress import Mode
from quantkit.suggestions import unknown
from quantkit_eval.early_checks import check_before_torch
from quantkit_eval.search.grid import Checked, Combination, Impossible, check_grid, combine, parse_grid
from quantkit_eval.search.sweep_folder import SweepFolder

Keep = Literal["best", "pareto", "all", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepOptions:
    """A sweep.

    model, recipe  of one model from one base recipe; model None: the recipe's own
    grid           KEY=v1,v2 texts; of a search also KEY=LEAST..MOST
    output         the sweep's folder; one that holds the same sweep goes on
    text, context, tokens   what is evaluated, as by `evaluate`
    tasks, limit   of lm-eval, with at most so many questions each
    jobs           runs at a time; None: one, and with Ray as many as there are cores
    keep           models: of the best run, of those on the front, all or none
    search, seed   runs of a search in place of a grid; None: a grid
    ray            the address of a Ray cluster, "local" for one of this sweep's own; None: processes of this machine
    """

    model: str | None
    recipe: str
    grid: tuple[str, ...]
    output: Path
    text: str = "general"
    context: int = 256
    tokens: int | None = None
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    jobs: int | None = None
    keep: Keep = "none"
    search: int | None = None
    seed: int = 0
    ray: str | None = None
    device: str = "auto"
    trust_remote_code: bool = False
    progress: Mode = "auto"


@dataclass(frozen=True, slots=True)
class Begun:
    """A sweep whose options are sound. folder: the model's; checked: None where a search chooses."""

    options: SweepOptions
    model: str
    folder: Path
    grid: Mapping[str, tuple[str, ...]]
    checked: Checked | None
    place: SweepFolder


def check_options(options: SweepOptions) -> Begun:
    """UserError for whatever is wrong with a sweep that options, names, paths and JSON show. Nothing is made."""
    if options.keep not in (kinds := get_args(Keep)):
        raise unknown("kind of --keep", options.keep, kinds)
    for name, value in (("jobs", options.jobs), ("search", options.search), ("limit", options.limit)):
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; expected 1 or more")
    if options.limit is not None and not options.tasks:
        raise UserError(
            "--limit is the most questions of each task, and there are no --tasks\nhint: --tokens limits texts"
        )
    _check_packages(options)
    if options.ray is not None:
        _check_address(options.ray)
    if options.tasks:
        from quantkit_eval.tasks.task_files import check_lm_eval, check_task_files

        check_lm_eval()
        check_task_files(None, options.tasks)
    grid = parse_grid(options.grid)
    checked = None
    if options.search is not None:
        from quantkit_eval.search.search_space import check_space

        grid = check_space(options.recipe, options.model, grid)
    elif not grid:
        raise UserError("nothing to sweep: the grid is empty\nhint: pass --grid KEY=v1,v2, or --search N")
    else:
        checked = check_grid(options.recipe, options.model, grid)
    if checked is not None and not checked.combinations:
        raise none_possible(checked.impossible)
    known = checked.combinations if checked is not None else [combine(options.recipe, options.model, {})]
    recipes = [one.recipe for one in known if isinstance(one, Combination)]
    model = options.model or next((recipe.model for recipe in recipes), None)
    if model is None:
        raise UserError("no model: pass --model FOLDER_OR_HUB_ID, or set `model:` in the recipe")
    place = SweepFolder(options.output)
    place.check(local_folder(model))
    check_before_torch(
        model, None, [options.text], context=options.context, tokens=options.tokens, device=options.device
    )
    folder = locate_model(model)
    refuse_quantized(Checkpoint.open(folder))
    return Begun(options, model, folder, grid, checked, place)


def none_possible(impossible: Sequence[Impossible]) -> UserError:
    """The error of a grid without a run: each combination with its reason."""
    return UserError(
        "no combination of the grid is possible:" + "".join(f"\n  {x.label}: {x.reason}" for x in impossible)
    )


def _check_address(address: str) -> None:
    """UserError where nothing listens at the address of a Ray cluster: Ray itself would try for many minutes."""
    if address in ("local", "auto"):
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not host or not port.isdecimal():
        raise UserError(f"--ray {address}: found no HOST:PORT\nhint: --ray alone uses this machine, --ray auto its Ray")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--ray {address}: no Ray answers there: {error}\nhint: start one with `ray start --head`, or pass --ray alone"
        ) from error


def _check_packages(options: SweepOptions) -> None:
    """UserError for the first package that is asked for and not installed."""
    wanted = {"pyarrow": ("quantkit sweep", "sweep")}
    if options.search is not None:
        wanted["optuna"] = ("--search", "sweep")
    if options.ray is not None:
        wanted["ray"] = ("--ray", "ray")
    for package, (what, extra) in wanted.items():
        if find_spec(package) is None:
            raise UserError(f"{what} needs {package}, which is not installed\nhint: pip install 'quantkit[{extra}]'")
