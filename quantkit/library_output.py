"""Keeps the bars, warnings and log lines of other libraries off the screen: quantkit shows its own progress alone.

Downloads are the exception: the Hub's own bars stay where a terminal is attached, for they may take an hour.
"""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

LIBRARIES = ("transformers", "huggingface_hub", "datasets", "accelerate", "compressed_tensors")


@contextmanager
def quiet_logs() -> Iterator[None]:
    """Within it, libraries log errors alone and warn of nothing; their bars stay. Nothing is imported."""
    levels = [(logger, logger.level) for logger in map(logging.getLogger, LIBRARIES)]
    for logger, _ in levels:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=rf"(?:{'|'.join(LIBRARIES)})(?:\.|$)")
            yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """As `quiet_logs`, and without the bars of transformers and datasets, where these are loaded already."""
    with quiet_logs(), ExitStack() as restored:
        if "transformers" in sys.modules:
            from transformers.utils import logging as bars

            _switch_off(bars.is_progress_bar_enabled(), bars.disable_progress_bar, bars.enable_progress_bar, restored)
        if "datasets" in sys.modules:
            from datasets import utils as data  # pyright: ignore[reportMissingImports]

            shown = not data.are_progress_bars_disabled()
            _switch_off(shown, data.disable_progress_bars, data.enable_progress_bars, restored)
        yield


def _switch_off(shown: bool, off: Callable[[], None], on: Callable[[], None], restored: ExitStack) -> None:
    if shown:
        off()
        restored.callback(on)
