"""Rows of data sets on the Hub, streamed through `datasets`; a Hub that cannot be reached is one message in seconds."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quantkit.errors import UserError
from quantkit.quantization.calibration.json_rows import Row
from quantkit.recipe.data_sets import GENERAL, DataSet, data_set

PATIENCE = 5.0  # seconds that the Hub may take to answer the first question
NO_PACKAGE = "reading data sets needs the datasets package, which is not installed\nhint: pip install datasets"
INSTEAD = f"name a file, or use `{GENERAL}`, which needs no network"
FORMS = "a data set is NAME, NAME:SUBSET, NAME:SUBSET:SPLIT or NAME::SPLIT"


def datasets_package() -> Any:
    """The `datasets` package; UserError where it is not installed."""
    try:
        import datasets
    except ImportError:
        raise UserError(NO_PACKAGE) from None
    return datasets


@contextmanager
def quiet() -> Iterator[None]:
    """No bars and no log lines of `datasets` and the Hub's library inside; afterwards as before."""
    datasets = datasets_package()
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub", "fsspec", "httpx", "httpx2")]
    levels = [logger.level for logger in loggers]
    shown, hub_shown = datasets.is_progress_bar_enabled(), not are_progress_bars_disabled()
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        datasets.disable_progress_bars()
        disable_progress_bars()
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if shown:
            datasets.enable_progress_bars()
        if hub_shown:
            enable_progress_bars()


def hub_rows(data: str, column: str | None = None) -> Iterator[Row]:
    """Rows of a Hub data set in order, read as they are asked for.

    data: NAME, NAME:SUBSET, NAME:SUBSET:SPLIT or NAME::SPLIT, of the table of known names or any Hub id; column:
    another one than the table's. A row of a set with a known column holds that one alone, under its usual name.
    Where the Hub cannot be reached only what is in the cache is read. Raises UserError, after at most a few seconds,
    where there is no such set, or neither the Hub nor a copy of it.
    """
    wanted = data_set(data)
    datasets = datasets_package()
    with quiet():
        unreachable = _unreachable(data, wanted)
        with _switched_off(datasets, unreachable is not None):
            try:
                table = _load(datasets, wanted, cached=unreachable is not None)
                for number, row in enumerate(table):
                    yield f"{data} row {number}", _known(row, wanted.column) if column is None else row
            except Exception as error:  # network, names, configs, splits: each layer below has its own classes
                why = unreachable or f"the Hub data set {wanted.hub_id!r} cannot be read: {_first_line(error)}"
                hint = INSTEAD if unreachable else FORMS
                raise UserError(f"calibration.data {data!r}: no file of that name, and {why}\nhint: {hint}") from error


def check_hub(data: str) -> None:
    """UserError where `hub_rows` would raise one because `datasets` is missing, or neither the Hub nor a copy is there.

    Imports neither torch nor `datasets`.
    """
    from huggingface_hub import constants

    if find_spec("datasets") is None:
        raise UserError(NO_PACKAGE)
    wanted = data_set(data)
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME, "datasets")).expanduser()
    if (unreachable := _unreachable(data, wanted)) and not (cache / wanted.hub_id.replace("/", "___")).is_dir():
        raise UserError(f"calibration.data {data!r}: no file of that name, and {unreachable}\nhint: {INSTEAD}")


def _load(datasets: Any, wanted: DataSet, *, cached: bool) -> Any:
    """The table, streamed; where that fails and a copy may be in the cache, that copy."""
    try:
        return datasets.load_dataset(wanted.hub_id, wanted.subset, split=wanted.split, streaming=True)
    except Exception:
        if not cached:
            raise
        return datasets.load_dataset(wanted.hub_id, wanted.subset, split=wanted.split)


def _known(row: Any, column: str | None) -> Any:
    """The row under the name that its content has elsewhere (`article` is a text)."""
    if column is None or not isinstance(row, dict) or column not in row:
        return row
    return {"messages" if isinstance(row[column], list) else "text": row[column]}


def _unreachable(data: str, wanted: DataSet) -> str | None:
    """Why the Hub cannot be asked, None where it answers. UserError where it says that it has no such set.

    The libraries try five times and wait in between: one short question comes first.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE or os.environ.get("HF_DATASETS_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return f"the Hub is switched off (HF_HUB_OFFLINE), and {wanted.hub_id!r} is not in the cache"
    try:
        HfApi().dataset_info(wanted.hub_id, timeout=PATIENCE)
    except GatedRepoError:
        return None  # what it takes is said by the download
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"calibration.data {data!r}: no file of that name, and the Hub has no data set {wanted.hub_id!r} "
            f"(or it is private)\nhint: check the name, or log in with `hf auth login`; {FORMS}"
        ) from error
    except Exception as error:
        return f"the Hub cannot be reached at {constants.ENDPOINT}: {_first_line(error)}"
    return None


@contextmanager
def _switched_off(datasets: Any, off: bool) -> Iterator[None]:
    """The libraries in their offline mode inside, where `off`: then they neither try again nor wait."""
    from huggingface_hub import constants

    before = (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)
    try:
        if off:
            constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
