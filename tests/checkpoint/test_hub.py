"""Hub ids: one message in seconds whatever the network does, and other kinds of models refused before their weights."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from quantkit.checkpoint import hub
from quantkit.errors import UserError


@pytest.fixture(autouse=True)
def nothing_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    hub._download.cache_clear()
    hub._answers.cache_clear()
    yield
    hub._download.cache_clear()
    hub._answers.cache_clear()


def test_a_hub_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that swallows packets: the libraries would try for minutes."""
    server = socket.create_server(("127.0.0.1", 0))
    held: list[socket.socket] = []
    threading.Thread(target=lambda: held.append(server.accept()[0]), daemon=True).start()
    monkeypatch.setattr("quantkit.checkpoint.hub.ANSWER_SECONDS", 0.2)
    endpoint, made = f"http://127.0.0.1:{server.getsockname()[1]}", huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made(endpoint=endpoint))
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"model 'org/nome': no folder here; the Hub cannot be reached .*\nhint: check"):
        hub.locate_model("org/nome")
    assert time.monotonic() - begun < 10
    server.close()


def fake_hub(monkeypatch: pytest.MonkeyPatch, folder: Path, config: dict[str, Any] | None) -> list[list[str]]:
    """A Hub whose one repository holds this config.json; returns what is asked for."""
    folder.mkdir(parents=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    asked: list[list[str]] = []

    def snapshot_download(name: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        assert not local_files_only
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    return asked


def test_weights_are_fetched_only_of_causal_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_hub(monkeypatch, tmp_path / "snapshots/abc", {"model_type": "bert", "architectures": ["BertModel"]})
    with pytest.raises(UserError, match="BertModel is an encoder"):
        hub.locate_model("org/bert")
    assert asked == [list(hub.SETTINGS)]


def test_a_repository_of_gguf_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, tmp_path / "snapshots/abc", None)
    with pytest.raises(
        UserError, match="holds GGUF files, whose weights were rounded already\nhint: give the id of the"
    ):
        hub.locate_model("org/name-GGUF")
