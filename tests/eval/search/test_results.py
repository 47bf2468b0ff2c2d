"""Rows and tables: types that do not depend on the values, files that are whole or absent."""

import csv
from pathlib import Path
from typing import Any

import pytest
from quantkit_eval.search.results import Entry, Row, flattened, read_row, write_results, write_row
from quantkit_eval.search.run_worker import Job

from quantkit.recipe.recipe import Recipe
from tests.eval.search.fake_runs import row_of

GPTQ = {"bits": 3, "group_size": 32, "algorithm": {"gptq": {"damping": 0.02}}}


def row(name: str = "a", **recipe: Any) -> Row:
    job = Job(
        name=name, label="", recipe=Recipe(**recipe).resolved(), hashes=("m", "r", "t"), text="t", context=8,
        tokens=None, tasks=(), limit=None, device="cpu", trust_remote_code=False, folder="", row="", cwd="",
        peak_bytes=0,
    )  # fmt: skip
    return row_of(job, 1000, 0.1)


def test_a_row_survives_its_file(tmp_path: Path) -> None:
    write_row(tmp_path / "a.json", row())
    assert read_row(tmp_path / "a.json") == row()
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"name": "a"}'])
def test_a_torn_file_is_no_row(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    assert read_row(tmp_path / "a.json") is None
    assert read_row(tmp_path / "none.json") is None


def test_a_recipe_is_flattened_to_its_keys() -> None:
    found = flattened(Recipe(weights=GPTQ, transforms=["awq"], kv_cache="fp8").resolved())
    assert found["weights.bits"] == 3
    assert found["weights.algorithm"] == "gptq"
    assert found["weights.algorithm.gptq.damping"] == 0.02
    assert found["transforms"] == '[{"awq": {"candidates": 20}}]'
    assert found["ignore"] == '["lm_head"]'
    assert found["activations"] is None
    assert found["kv_cache.type"] == "fp8"
    assert not any(isinstance(value, dict | list) for value in found.values())


@pytest.mark.parametrize("sizes", [("32", "64"), ("32", "channel"), ("channel", "tensor")])
def test_types_do_not_depend_on_the_values(tmp_path: Path, sizes: tuple[str, str]) -> None:
    pq, pd = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pandas")
    entries = [
        Entry({"weights.group_size": size, "weights.bits": "8", "calibration.seed": seed}, "", row(size))
        for size, seed in zip(sizes, ("1", "null"), strict=True)
    ]
    entries.append(
        Entry({"weights.group_size": "7", "weights.bits": "8", "calibration.seed": "2"}, "", None, "it broke")
    )
    write_results(tmp_path, entries)
    schema = {field.name: str(field.type) for field in pq.read_schema(tmp_path / "results.parquet")}
    expected = {
        "name": "string", "error": "string", "weights.group_size": "string", "weights.bits": "int64",
        "calibration.seed": "int64", "weights.symmetric": "bool", "size_bytes": "int64", "kl": "double",
        "kl_low": "double", "front": "bool", "seconds": "double", "peak_memory_bytes": "int64",
        "versions.python": "string", "hash.model": "string", "tokens_per_second": "double", "activations": "string",
        "output.max_shard_gb": "double",
    }  # fmt: skip
    assert {name: schema[name] for name in expected} == expected
    table = pd.read_parquet(tmp_path / "results.parquet")
    assert list(table["weights.group_size"]) == [*sizes, "7"]
    assert table["error"].isna().tolist() == [True, True, False]
    with (tmp_path / "results.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == list(table.columns)
    assert [line["weights.group_size"] for line in lines] == [*sizes, "7"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.csv", "results.parquet"]


def test_tasks_are_columns(tmp_path: Path) -> None:
    pd = pytest.importorskip("pandas")
    from dataclasses import replace

    done = replace(row(), tasks={"cloze": {"value": 0.5, "stderr": 0.1}})
    write_results(tmp_path, [Entry({}, "", done), Entry({}, "", row("b"))])
    table = pd.read_parquet(tmp_path / "results.parquet")
    assert table["tasks.cloze.value"].tolist()[0] == 0.5
    assert table["tasks.cloze.stderr"].isna().tolist() == [False, True]
