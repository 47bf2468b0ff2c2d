"""Rows of data sets on the Hub, streamed through `datasets`; a Hub that cannot be reached is one message in seconds."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from quantkit.errors import UserError
from quantkit.quantization.calibration.json_rows import Row
from quantkit.recipe.data_sets import GENERAL, DataSet, data_set

PATIENCE = 5.0  # seconds that the Hub may take to answer the first question
FORMS = "a data set is NAME, NAME:SUBSET, NAME:SUBSET:SPLIT or NAME::SPLIT"


def datasets_package() -> Any:
    """The `datasets` package; UserError where it is not installed."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            "reading data sets needs the datasets package, which is not installed\nhint: pip install datasets"
        ) from None
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
    Raises UserError, after at most a few seconds, where the Hub cannot be reached or has no such set.
    """
    wanted = data_set(data)
    datasets = datasets_package()
    with quiet():
        offline = _check_reachable(data, wanted)
        try:
            table = datasets.load_dataset(
                wanted.hub_id, wanted.subset, split=wanted.split, **({} if offline else {"streaming": True})
            )
            for number, row in enumerate(table):
                yield f"{data} row {number}", _known(row, wanted.column) if column is None else row
        except Exception as error:  # network, names, configs, splits: each layer below has its own classes
            raise UserError(f"calibration.data {data!r}: {_why(error, wanted, offline)}") from error


def _known(row: Any, column: str | None) -> Any:
    """The row under the name that its content has elsewhere (`article` is a text)."""
    if column is None or not isinstance(row, dict) or column not in row:
        return row
    return {"messages" if isinstance(row[column], list) else "text": row[column]}


def _check_reachable(data: str, wanted: DataSet) -> bool:
    """Whether the Hub is switched off by the user's environment; UserError where it does not answer or has no such set.

    The libraries try five times and wait in between: one short question comes first.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE or os.environ.get("HF_DATASETS_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return True
    try:
        with suppress(GatedRepoError):  # said by the download, which may have a token
            HfApi().dataset_info(wanted.hub_id, timeout=PATIENCE)
    except RepositoryNotFoundError as error:
        raise UserError(
            f"calibration.data {data!r}: no file of that name, and the Hub has no data set {wanted.hub_id!r} "
            f"(or it is private)\nhint: check the name, or log in with `hf auth login`; {FORMS}"
        ) from error
    except Exception as error:
        raise UserError(
            f"calibration.data {data!r}: no file of that name, and the Hub cannot be reached at {constants.ENDPOINT}: "
            f"{_first_line(error)}\nhint: name a file, or calibration.data: {GENERAL}, which needs no network"
        ) from error
    return False


def _why(error: Exception, wanted: DataSet, offline: bool) -> str:
    if offline:
        return (
            f"the Hub is switched off (HF_HUB_OFFLINE or HF_DATASETS_OFFLINE), and {wanted.hub_id!r} is not in the "
            "cache\n"
            f"hint: name a file, or calibration.data: {GENERAL}, which needs no network"
        )
    return f"the Hub data set {wanted.hub_id!r} cannot be read: {_first_line(error)}\nhint: {FORMS}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
