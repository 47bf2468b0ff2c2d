"""Where calibration text comes from: a file, a folder, the Hub, or the set in the wheel. No torch here."""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import UserError
from quantkit.library_output import quiet_libraries
from quantkit.paths import user_path
from quantkit.quantization.calibration import hub
from quantkit.quantization.calibration.files import BY_NAME, PACKED, READ, REFUSED_NAMES, file_kind
from quantkit.quantization.calibration.json_rows import Row
from quantkit.quantization.calibration.records import file_rows
from quantkit.recipe.data_sets import GENERAL, data_set, is_known
from quantkit.recipe.sections import Calibration
from quantkit.texts import general

TITLE = re.compile(r" = [^=].*[^=] = \n?")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]*){0,2}")


@dataclass(frozen=True, slots=True)
class Place:
    """A source that is there as far as can be told without opening it.

    data: as the recipe names it; path: its file or folder, None for a data set; column: the one that is asked for
    """

    data: str
    path: Path | None
    column: str | None

    @property
    def is_text(self) -> bool:
        """Whether it is a file of plain text, not of rows."""
        return self.path is not None and not self.path.is_dir() and file_kind(self.path) == "text"


def check_sources(calibration: Calibration) -> list[Place]:
    """The places of all sources; UserError for files that are missing or not read, and names no data set can have."""
    places = [Place(source.data, local_path(source.data), source.column) for source in calibration.sources()]
    for path in (place.path for place in places if place.path is not None):
        if path.is_dir():
            _check_folder(path)
        else:
            file_kind(path)
    return places


def check_reachable(calibration: Calibration) -> None:
    """UserError where a source is a data set of the Hub that can be read neither there nor from the cache."""
    for source in calibration.sources():
        if source.data != GENERAL and local_path(source.data) is None:
            hub.check_hub(source.data)


def local_path(data: str) -> Path | None:
    """The file or folder `data` names; None for a data set. UserError for a missing file or a misspelt name.

    A known name is the data set even where a file is called so: ./NAME is the file.
    """
    if is_known(data):
        _check_name(data)
        return None
    path = user_path(data)
    if path.exists():
        return path
    suffixes = (".txt", ".md", ".py", *BY_NAME, *PACKED, *REFUSED_NAMES)
    if path.suffix.lower() not in suffixes and not data.startswith((".", "/", "~")) and HUB_NAME.fullmatch(data):
        _check_name(data)
        return None
    folder = path.parent
    if not folder.is_dir():
        raise UserError(f"calibration.data: no file {data!r}: the folder {str(folder)!r} does not exist")
    near = difflib.get_close_matches(path.name, [entry.name for entry in folder.iterdir()], n=3, cutoff=0.4)
    hint = (
        f"; near by: {', '.join(sorted(near))}"
        if near
        else "\nhint: give a file or a data set; `general` is the default"
    )
    raise UserError(f"calibration.data: no file {data!r}{hint}")


def _check_name(data: str) -> None:
    if data.partition(":")[0] != GENERAL:
        data_set(data)
    elif data != GENERAL:
        raise UserError(f"calibration.data {data!r}: {GENERAL} has no subsets and no splits\nhint: write {GENERAL}")


def place_rows(place: Place) -> Iterator[Row]:
    """The rows of a source, in order; one that is plain text has none."""
    if place.data == GENERAL:
        for number, row in enumerate(general("calibration")):
            yield f"{GENERAL} row {number}", row
    elif place.path is None:
        rows = hub.hub_rows(place.data, place.column)
        yield from _articles(rows) if data_set(place.data).lines and place.column is None else rows
    elif place.path.is_dir():
        yield from _folder_rows(place.path)
    else:
        yield from file_rows(place.path, file_kind(place.path), place.column)


def _articles(rows: Iterator[Row]) -> Iterator[Row]:
    """Rows of lines as rows of articles: the first line of one is ` = Title = `."""
    start, lines = "", list[str]()
    for place, row in rows:
        line = str(row["text"])
        if TITLE.fullmatch(line) and lines:
            yield start, {"text": "".join(lines)}
            lines = []
        start = start if lines else place
        lines.append(line)
    if lines:
        yield start, {"text": "".join(lines)}


def _check_folder(path: Path) -> None:
    if not any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json")):
        suffixes = {".txt", *BY_NAME, *PACKED}
        files = ", ".join(sorted(f.name for f in path.iterdir() if f.suffix.lower() in suffixes)[:8])
        hint = f"; it holds {files}: name one of those" if files else f"; {READ}"
        raise UserError(f"{path}: this folder was not saved by datasets' save_to_disk{hint}")


def _folder_rows(path: Path) -> Iterator[Row]:
    datasets = hub.datasets_package()
    with quiet_libraries():
        try:
            table = datasets.load_from_disk(str(path))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path}: the data set cannot be read: {error}") from error
        if isinstance(table, dict):
            table = table["train"] if "train" in table else next(iter(table.values()))
        for number, row in enumerate(table):
            yield f"{path} row {number}", row
