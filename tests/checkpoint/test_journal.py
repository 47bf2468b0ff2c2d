"""The journal: what is finished survives any kill, and a run of something else is never continued."""

import json
from pathlib import Path
from typing import Any

import pytest

from quantkit.checkpoint.journal import NAME, Journal
from quantkit.errors import RunError, UserError

KEY = {"recipe": {"weights": {"bits": 4}}, "model": "abc"}


def test_goes_on_after_the_last_whole_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run", KEY)
    journal.append({"block": 0})
    journal.append({"block": 1})
    file = tmp_path / "run" / NAME
    file.write_bytes(file.read_bytes()[:-4])  # killed in the middle of a write
    again = Journal(tmp_path / "run", KEY)
    assert again.entries == [{"block": 0}]
    again.append({"block": 1})
    assert [json.loads(line) for line in file.read_text().splitlines()] == [KEY, {"block": 0}, {"block": 1}]


@pytest.mark.parametrize("torn", [b"", b'{"recipe": {"wei'], ids=["empty", "half a key"])
def test_a_key_torn_by_a_kill_begins_anew(tmp_path: Path, torn: bytes) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / NAME).write_bytes(torn)
    assert Journal(tmp_path / "run", KEY).entries == []


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "a nested key": (
        {"recipe": {"weights": {"group_size": 128, "bits": 4}}},
        {"recipe": {"weights": {"group_size": 64, "bits": 4}}},
        ["weights.group_size: 128 -> 64"],
    ),
    "an algorithm": (
        {"recipe": {"weights": {"algorithm": {"rtn": {"range": "mse"}}}}},
        {"recipe": {"weights": {"algorithm": {"gptq": {"damping": 0.1}}}}},
        ["weights.algorithm: rtn -> gptq"],
    ),
    "an option, a null and a list": (
        {"recipe": {"a": {"gptq": {"act_order": True}}, "activations": None, "ignore": ["x"]}},
        {"recipe": {"a": {"gptq": {"act_order": False}}, "activations": {"bits": 8, "dynamic": True}, "ignore": []}},
        ["a.gptq.act_order: true -> false", "activations: null -> {bits: 8, dynamic: true}", "ignore[0]: x -> not set"],
    ),
    "versions and device": (
        {"versions": {"torch": "2.13.0", "quantkit": "1"}, "device": "cpu"},
        {"versions": {"torch": "2.14.0", "quantkit": "1"}, "device": "cuda"},
        ["device: cpu -> cuda", "versions.torch: 2.13.0 -> 2.14.0"],
    ),
    "hashes": (
        {"model": "ab12", "calibration": "12ab"},
        {"model": "cd34", "calibration": "34cd"},
        [
            "the calibration tokens differ (other text, samples, seq_len, seed or tokenizer)",
            "the model's files have changed (config.json or tensors)",
        ],
    ),
    "calibration or none": ({"calibration": None}, {"calibration": "34cd"}, ["calibration: none -> some"]),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_changes_are_told_in_the_recipes_terms(tmp_path: Path, kind: str) -> None:
    old, new, lines = CHANGES[kind]
    Journal(tmp_path / "run", old).append({"block": 0})
    with pytest.raises(UserError) as caught:
        Journal(tmp_path / "run", new)
    first, *told, hint = str(caught.value).splitlines()
    assert first == f"{tmp_path / 'run'} holds an unfinished run of something else; changed since then:"
    assert [line.strip() for line in told] == lines
    assert hint == "hint: run the old command to finish it, or pass --restart to discard it and start again"
    assert Journal(tmp_path / "run", new, restart=True).entries == []


def test_a_folder_of_others_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    for restart in (False, True):
        with pytest.raises(UserError, match="not a quantkit run"):
            Journal(tmp_path / "run", KEY, restart=restart)
    assert (tmp_path / "run" / "thesis.txt").read_text() == "precious"


def test_publishing_never_replaces(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run", KEY)
    (tmp_path / "out").mkdir()
    with pytest.raises(RunError, match="appeared while"):
        journal.publish(tmp_path / "out")
    (tmp_path / "out").rmdir()
    journal.publish(tmp_path / "out")
    assert (tmp_path / "out").is_dir()
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "out" / NAME).exists()
