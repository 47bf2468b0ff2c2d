"""Data sets of the Hub by name: what is asked of `datasets`, and one short message where the Hub cannot be reached."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import UserError
from quantkit.quantization.calibration.hub import check_hub, hub_rows

datasets = pytest.importorskip("datasets", reason="the datasets package is optional")
ROOT = Path(__file__).resolve().parents[2]
CHAT = [{"role": "user", "content": "x"}]
ROWS: dict[str, dict[str, Any]] = {
    "ultrachat": {"prompt": "p", "messages": CHAT},
    "cnn_dailymail": {"article": "x", "highlights": "y"},
    "c4": {"text": "x", "url": "u"},
    "me/mine": {"text": "x", "n": 3},
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments of each call of load_dataset; the Hub answers with ROWS."""
    calls: list[Any] = []

    def load_dataset(name: str, subset: str | None, *, split: str, streaming: bool) -> Any:
        calls.append((name, subset, split, streaming))
        kinds = {
            "HuggingFaceH4/ultrachat_200k": "ultrachat",
            "abisee/cnn_dailymail": "cnn_dailymail",
            "allenai/c4": "c4",
        }
        return iter([ROWS[kinds.get(name, name)]] * 2)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *a, **k: None)
    return calls


@pytest.mark.parametrize(
    ("name", "column", "call", "row"),
    [
        ("ultrachat", None, ("HuggingFaceH4/ultrachat_200k", None, "train_sft"), {"messages": CHAT}),
        ("cnn_dailymail", None, ("abisee/cnn_dailymail", "3.0.0", "train"), {"text": "x"}),
        ("cnn_dailymail::test", "highlights", ("abisee/cnn_dailymail", "3.0.0", "test"), ROWS["cnn_dailymail"]),
        ("c4:de", None, ("allenai/c4", "de", "train"), {"text": "x"}),
        ("me/mine:small:dev", None, ("me/mine", "small", "dev"), ROWS["me/mine"]),
    ],
)  # fmt: skip
def test_names_mean_sets(asked: list[Any], name: str, column: str | None, call: tuple[Any, ...], row: Any) -> None:
    assert list(hub_rows(name, column)) == [(f"{name} row {n}", row) for n in range(2)]
    assert asked == [(*call, True)]


def test_a_set_that_the_hub_does_not_have(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    def missing(*_: Any, **__: Any) -> None:
        raise RepositoryNotFoundError("404", response=type("R", (), {"headers": {}, "request": None})())  # type: ignore

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", missing)
    with pytest.raises(UserError, match=r"the Hub has no data set 'me/nein' .*\nhint: check the name"):
        list(hub_rows("me/nein"))
    assert not asked


def test_unreachable_the_libraries_neither_try_again_nor_speak(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("it waits to try again"))
    before = (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)
    for ask in (lambda: list(hub_rows("c4")), lambda: check_hub("c4")):
        with pytest.raises(
            UserError, match=r"the Hub cannot be reached at http.*: no route\nhint: name a file, or use"
        ) as e:
            ask()
        assert str(e.value).count("\n") == 1
    assert before == (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)
    assert capfd.readouterr() == ("", "")


def test_a_copy_in_the_cache_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def cached(name: str, subset: str | None, *, split: str, streaming: bool = False) -> Any:
        assert datasets.config.HF_HUB_OFFLINE
        if streaming:
            raise ConnectionError("offline")
        return [{"text": "copy"}]

    monkeypatch.setattr(datasets, "load_dataset", cached)
    assert list(hub_rows("c4")) == [("c4 row 0", {"text": "copy"})]


@pytest.mark.parametrize("how", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}], ids=str)
def test_the_command_says_it_in_one_line(tmp_path: Path, how: dict[str, str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "quantkit", "quantize", str(ROOT / "examples" / "tiny-llama")]
    command += ["--recipe", "gptq-w4a16", "--calibration", "c4", "--output", str(tmp_path / "out")]
    environment = os.environ | {"HF_HOME": str(tmp_path)} | how
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert (done.returncode, done.stdout, len(lines)) == (2, "", 2)
    assert lines[0].startswith("error: calibration.data 'c4': no file of that name, and the Hub ")
    assert not any(line.endswith(("| torch", "| datasets")) for line in done.stderr.splitlines())
