"""The data set `general`: its size, its mix, its order, its sources, and that it is read lazily."""

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from quantkit.errors import UserError
from quantkit.texts import PARTS, general, general_sha256

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ROOT / "quantkit" / "texts"
SOURCES = (TEXTS / "SOURCES.md").read_text(encoding="utf-8")
KINDS = {"prose", "code", "maths", "tables", "languages", "chat"}

Row = dict[str, Any]


@pytest.fixture(scope="module")
def calibration() -> list[Row]:
    return list(general("calibration"))


@pytest.fixture(scope="module")
def held_out() -> list[Row]:
    return list(general("held-out"))


def texts(rows: list[Row]) -> Iterator[str]:
    for row in rows:
        yield from [row["text"]] if "text" in row else (message["content"] for message in row["messages"])


def size(rows: list[Row]) -> int:
    return sum(len(text.encode()) for text in texts(rows))


def test_the_files_take_at_most_a_megabyte() -> None:
    assert sum((TEXTS / f"{part}.jsonl.xz").stat().st_size for part in PARTS) <= 1_000_000


def test_there_is_text_for_300_000_tokens(calibration: list[Row]) -> None:
    assert size(calibration) / 4.5 >= 300_000
    tokenizer = Tokenizer.from_file(str(ROOT / "examples" / "tiny-llama" / "tokenizer.json"))
    encoded = tokenizer.encode_batch(list(texts(calibration)), add_special_tokens=False)
    assert sum(len(one.ids) for one in encoded) >= 300_000


def test_there_is_text_to_evaluate_on(held_out: list[Row]) -> None:
    assert 30_000 <= size(held_out) / 4.5 <= 60_000
    assert {row["kind"] for row in held_out} == KINDS


def test_the_hash_is_that_of_the_file_and_listed() -> None:
    for part in ("calibration", "held-out"):
        assert re.search(rf"^- {part}\.jsonl\.xz: sha256 `{general_sha256(part)}`$", SOURCES, re.MULTILINE)


def test_the_first_row_needs_no_torch_and_not_the_whole_file() -> None:
    """In a fresh interpreter: the first rows are there before most of the compressed file is read."""
    code = (
        "import sys; from quantkit.texts import general; rows = general(); first = next(rows);"
        "file = rows.gi_frame.f_locals['compressed']; assert first['kind'], first;"
        f"assert file.tell() < {(TEXTS / 'calibration.jsonl.xz').stat().st_size // 2}, file.tell();"
        "assert not {'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules), 'heavy imports'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)


def test_an_unknown_part_is_refused_at_the_call() -> None:
    with pytest.raises(UserError, match="no part `test`, expected calibration or held-out"):
        general("test")  # pyright: ignore[reportArgumentType]


def test_a_prefix_has_the_mix_of_the_whole(calibration: list[Row]) -> None:
    """Windows are drawn from the first rows: each kind has its share of every tenth of the text, to 8 points."""
    whole = {kind: size([row for row in calibration if row["kind"] == kind]) / size(calibration) for kind in KINDS}
    assert min(whole.values()) > 0.02
    assert max(whole.values()) < 0.4
    tenth = len(calibration) // 10
    for start in range(0, tenth * 10, tenth):
        rows = calibration[start : start + tenth]
        for kind, share in whole.items():
            part = size([row for row in rows if row["kind"] == kind]) / size(rows)
            assert abs(part - share) < 0.08, (start, kind, part, share)
            assert part > 0, (start, kind)


def test_the_first_rows_are_of_every_kind() -> None:
    assert {row["kind"] for row in islice(general(), 40)} == KINDS


def test_rows_are_text_or_chats(calibration: list[Row], held_out: list[Row]) -> None:
    for row in (*calibration, *held_out):
        assert set(row) == {"kind", "source", "messages" if row["kind"] == "chat" else "text"}
        for text in texts([row]):
            assert text.strip()
            assert all(c in "\n\t\u200c\u200d\u3000" or c.isprintable() for c in text), row["source"]
        if row["kind"] != "chat":
            assert 300 <= len(row["text"].encode()) <= 9_000, (row["source"], row["text"][:80])


def test_chats_have_their_roles_in_turn(calibration: list[Row], held_out: list[Row]) -> None:
    chats = [row["messages"] for row in (*calibration, *held_out) if row["kind"] == "chat"]
    assert len(chats) >= 60
    assert any(chat[0]["role"] == "system" for chat in chats)
    for chat in chats:
        assert all(set(message) == {"role", "content"} for message in chat)
        turns = chat[1:] if chat[0]["role"] == "system" else chat
        assert [m["role"] for m in turns] == ["user", "assistant"] * (len(turns) // 2), chat[0]["content"]
        assert turns
    assert len({chat[-1]["content"] for chat in chats}) == len(chats)


def test_no_text_is_there_twice(calibration: list[Row], held_out: list[Row]) -> None:
    """Neither whole rows nor, between the parts, paragraphs of 120 characters or more (our own: templates)."""
    whole = Counter(str(row.get("text", row.get("messages"))) for row in (*calibration, *held_out))
    assert whole.most_common(1)[0][1] == 1
    kept, apart = (
        {p for row in rows if row["source"] != "own" for p in row["text"].split("\n\n") if len(p) > 120}
        for rows in (calibration, held_out)
    )
    assert len(apart) > 300
    assert not kept & apart


def test_every_source_is_listed_and_used(calibration: list[Row], held_out: list[Row]) -> None:
    listed = set(re.findall(r"^\| `([^`]+)` \|", SOURCES, re.MULTILINE))
    assert {row["source"] for row in (*calibration, *held_out)} == listed
    licences = (TEXTS / "LICENSES.txt").read_text(encoding="utf-8")
    for line in SOURCES.splitlines():
        if line.startswith("| `") and not re.search("public domain|CC0|`own`", line):
            assert f"\n{line.split('`')[1]}\n" in licences, line
    assert not re.search(r"GPL|MPL|SSPL|NonCommercial|NoDeriv", SOURCES)


@pytest.mark.parametrize(
    ("language", "words"),
    [
        ("English", "human rights"), ("German", "Menschenrechte"), ("French", "droits de l"), ("Spanish", "derechos"),
        ("Portuguese", "direitos"), ("Italian", "diritti"), ("Dutch", "rechten"), ("Polish", "prawa"),
        ("Czech", "práva"), ("Russian", "прав"), ("Ukrainian", "людина"), ("Greek", "δικαι"), ("Turkish", "hak"),
        ("Arabic", "حقوق"), ("Hebrew", "אדם"), ("Hindi", "अधिकार"), ("Bengali", "অধিকার"), ("Tamil", "உரிமை"),
        ("Thai", "สิทธิ"), ("Vietnamese", "quyền"), ("Japanese", "権利"), ("Korean", "권리"), ("Chinese", "权利"),
    ],
)  # fmt: skip
def test_languages(language: str, words: str, calibration: list[Row]) -> None:
    assert any(words in row["text"] for row in calibration if row["kind"] == "languages"), language
