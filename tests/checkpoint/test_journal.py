"""The journal: what is finished survives any kill, and a run of something else is never continued."""

import json
from pathlib import Path

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


def test_names_what_changed(tmp_path: Path) -> None:
    Journal(tmp_path / "run", KEY).append({"block": 0})
    changed = {"recipe": {"weights": {"bits": 3}}, "model": "abc"}
    with pytest.raises(UserError, match=r"recipe\.weights.*4.*3(.|\n)*--restart") as caught:
        Journal(tmp_path / "run", changed)
    assert "model" not in str(caught.value)
    assert Journal(tmp_path / "run", changed, restart=True).entries == []


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
