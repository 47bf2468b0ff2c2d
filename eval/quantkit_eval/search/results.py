"""One row a run: as a JSON file each, written whole or not at all, and all of them as results.parquet and results.csv.

The columns of a table: name, the keys that were swept (as they were given), what was found, versions and hashes, and
the whole recipe, flattened to dotted keys. A key's type is that of the recipe's schema, whichever values were swept:
int64, double, bool or, where a key takes numbers and names as weights.group_size does, string.
"""

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint.output_folder import write_json
from quantkit.recipe.keys import key_type
from quantkit_eval.results import Interval
from quantkit_eval.search.front import Point

PARQUET, CSV = "results.parquet", "results.csv"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one run made and how far it is from the original.

    name                its hash; recipe: with every default filled in
    size_bytes          of all tensors of the result; bits_per_weight: of the quantized weights, scales included
    kl, kl_p99, top1, flips, perplexity, perplexity_ratio   on the text, with 95 % intervals; KL in nats
    text_tokens         how many were predicted
    tasks               task -> figure -> value; empty without tasks
    seconds             of quantizing, of its last process where resumed is true; evaluation_seconds: of the text
    peak_memory_bytes   of the quantizing process; tokens_per_second: greedy decoding of one sequence
    """

    name: str
    recipe: dict[str, Any]
    size_bytes: int
    bits_per_weight: float
    kl: Interval
    kl_p99: Interval
    top1: Interval
    flips: Interval
    perplexity: Interval
    perplexity_ratio: Interval
    text_tokens: int
    tasks: dict[str, dict[str, float]]
    seconds: float
    evaluation_seconds: float
    resumed: bool
    peak_memory_bytes: int
    tokens_per_second: float
    device: str
    versions: dict[str, str]
    model_hash: str
    recipe_hash: str
    text_hash: str

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> "Row":
        """The inverse of `asdict`. KeyError or TypeError for anything else."""
        intervals = {name: Interval(**found[name]) for name in INTERVALS}
        return Row(**{**found, **intervals})

    def point(self, label: str) -> Point:
        """Its place on the plane of size and KL."""
        return Point(self.name, label, self.size_bytes, self.kl)


INTERVALS = ("kl", "kl_p99", "top1", "flips", "perplexity", "perplexity_ratio")


def write_row(path: Path, row: Row) -> None:
    """Write a row's file in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write_json(temporary, asdict(row))
    temporary.replace(path)


def read_row(path: Path) -> Row | None:
    """The row of a file; None where there is none that this version can read."""
    try:
        return Row.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True, slots=True)
class Entry:
    """A run of a sweep: the settings that it was given, and its row, or why it has none.

    front: whether it is on the Pareto front; folder: where its model is kept, relative to the sweep's
    """

    settings: Mapping[str, str]
    label: str
    row: Row | None
    error: str | None = None
    front: bool = False
    folder: str | None = None


def record(entry: Entry) -> dict[str, Any]:
    """Column -> value of an entry. What has no value is None."""
    found: dict[str, Any] = {"name": entry.row.name if entry.row else None, "error": entry.error}
    found |= {key: _typed(key, value) for key, value in entry.settings.items()}
    if (row := entry.row) is None:
        return found
    found |= {"size_bytes": row.size_bytes, "bits_per_weight": row.bits_per_weight}
    for name in INTERVALS:
        interval = getattr(row, name)
        found |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    found |= {"front": entry.front, "folder": entry.folder, "text_tokens": row.text_tokens}
    found |= {f"tasks.{task}.{name}": value for task, values in row.tasks.items() for name, value in values.items()}
    for name in ("seconds", "evaluation_seconds", "resumed", "peak_memory_bytes", "tokens_per_second", "device"):
        found[name] = getattr(row, name)
    found |= {f"versions.{name}": value for name, value in row.versions.items()}
    found |= {"hash.model": row.model_hash, "hash.recipe": row.recipe_hash, "hash.text": row.text_hash}
    return found | {key: value for key, value in flattened(row.recipe).items() if key not in found}


def flattened(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of a recipe's plain data; lists, and mappings that are no sections, as JSON."""
    found: dict[str, Any] = {}
    for name, value in recipe.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and all(key_type(f"{key}.{inner}") for inner in value):
            if key == "weights.algorithm":
                found[key] = next(iter(value), None)
            found |= flattened(value, f"{key}.")
        elif value is None or key_type(key) != "text" or isinstance(value, str):
            found[key] = value
        else:
            found[key] = json.dumps(value)
    return found


def _typed(key: str, value: str) -> Any:
    """A value as it was given, YAML, in the type of its key."""
    if value in ("null", "~"):
        return None
    match key_type(key):
        case "int":
            return int(value)
        case "float":
            return float(value)
        case "bool":
            return value.lower() == "true"
    return value


def _column_type(name: str) -> Any:
    import pyarrow as pa

    given = {"int": pa.int64(), "float": pa.float64(), "bool": pa.bool_(), "text": pa.string()}
    if (kind := key_type(name)) is not None:
        return given[kind]
    if name in ("size_bytes", "text_tokens", "peak_memory_bytes"):
        return pa.int64()
    if name in ("front", "resumed"):
        return pa.bool_()
    texts = ("name", "error", "folder", "device")
    return pa.string() if name in texts or name.startswith(("versions.", "hash.")) else pa.float64()


def write_results(folder: Path, entries: Sequence[Entry]) -> None:
    """Write results.parquet and results.csv of a sweep's folder, each in one step; columns in order of appearance."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = [record(entry) for entry in entries]
    columns = list(dict.fromkeys(name for one in records for name in one))
    schema = pa.schema([(name, _column_type(name)) for name in columns])
    whole = [{name: one.get(name) for name in columns} for one in records]
    temporary = folder / f".{PARQUET}"
    pq.write_table(pa.Table.from_pylist(whole, schema=schema), temporary)
    temporary.replace(folder / PARQUET)
    temporary = folder / f".{CSV}"
    with temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(whole)
    temporary.replace(folder / CSV)
