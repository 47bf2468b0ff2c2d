"""The data set that ships: what it holds, how it is read, and that its sources are named."""

import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from importlib.resources import files
from typing import Any

import pytest

from quantkit.errors import UserError
from quantkit.texts import PARTS, general, general_sha256

KINDS = {"prose", "code", "maths", "data", "languages", "chat"}
BYTES_PER_TOKEN = 4.5  # more than any usual BPE gets from such a mix (measured: 3.2 to 3.9), so counts are lower bounds


@pytest.fixture(scope="module")
def parts() -> dict[str, list[dict[str, Any]]]:
    return {part: list(general(part)) for part in PARTS}  # type: ignore[arg-type]


def content(row: dict[str, Any]) -> str:
    return row["text"] if "text" in row else "\n".join(message["content"] for message in row["messages"])


def test_it_is_small_compressed_and_large_enough_in_tokens(parts: dict[str, list[dict[str, Any]]]) -> None:
    compressed = sum((files("quantkit.texts") / f"{part}.jsonl.xz").read_bytes().__len__() for part in PARTS)
    assert compressed <= 1_000_000
    tokens = {part: sum(len(content(row).encode()) for row in rows) / BYTES_PER_TOKEN for part, rows in parts.items()}
    assert tokens["calibration"] >= 300_000
    assert 30_000 <= tokens["held-out"] <= 80_000


def test_rows_are_texts_or_chats_with_valid_roles(parts: dict[str, list[dict[str, Any]]]) -> None:
    for row in itertools.chain(*parts.values()):
        assert row["kind"] in KINDS
        assert ("messages" in row) == (row["kind"] == "chat") != ("text" in row)
        assert content(row).strip()
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", content(row))
        if row["kind"] == "chat":
            roles = [message["role"] for message in row["messages"]]
            turns = roles[1:] if roles[0] == "system" else roles
            assert turns == ["user", "assistant"] * (len(turns) // 2)
            assert turns
            assert all(message["content"].strip() for message in row["messages"])


@pytest.mark.parametrize("part", PARTS)
def test_any_prefix_has_every_kind(part: str, parts: dict[str, list[dict[str, Any]]]) -> None:
    rows = parts[part]
    whole = Counter(row["kind"] for row in rows)
    assert set(whole) == KINDS
    for share in (0.1, 0.25, 0.5):
        prefix = Counter(row["kind"] for row in rows[: round(len(rows) * share)])
        for kind in KINDS:
            assert abs(prefix[kind] - whole[kind] * share) <= max(3, 0.35 * whole[kind] * share), (kind, share)


def test_languages_of_people_and_of_programs(parts: dict[str, list[dict[str, Any]]]) -> None:
    rows = parts["calibration"]
    assert len({row["language"] for row in rows if row["kind"] == "languages"}) >= 12
    assert len({row["language"] for row in rows if row["kind"] == "code"}) >= 8


def test_no_text_is_in_both_parts_or_twice(parts: dict[str, list[dict[str, Any]]]) -> None:
    seen: set[str] = set()
    for row in itertools.chain(*parts.values()):
        text = content(row)
        assert text not in seen
        seen.add(text)
    paragraphs = {
        part: {line for row in rows if row["kind"] == "prose" for line in content(row).split("\n") if len(line) > 200}
        for part, rows in parts.items()
    }
    assert not paragraphs["calibration"] & paragraphs["held-out"]


def test_every_source_is_listed_with_its_licence(parts: dict[str, list[dict[str, Any]]]) -> None:
    table = (files("quantkit.texts") / "SOURCES.md").read_text(encoding="utf-8")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")][1:]
    licences = {line[0]: line[3] for line in lines}
    for source in {row["source"] for row in itertools.chain(*parts.values())}:
        assert re.search(r"public domain|MIT|BSD|Apache|ISC|PSF|CC0", licences[source]), source
    notices = (files("quantkit.texts") / "LICENSES.txt").read_text(encoding="utf-8")
    for name, _, version, licence, *_ in lines:
        if not re.match(r"public domain|CC0", licence) and version != "-":
            assert f"{name} {version}" in notices, f"no notice of {name}"


def test_the_hash_is_of_the_file_and_of_this_set() -> None:
    """A changed set changes what runs give: its hash is here so that nobody changes it in passing."""
    assert {part: general_sha256(part)[:16] for part in PARTS} == {  # type: ignore[arg-type]
        "calibration": "cb634393713a1df5",
        "held-out": "9530db9da8485e0d",
    }


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(UserError, match="no part `train`: expected one of calibration, held-out"):
        next(general("train"))  # type: ignore[arg-type]


def test_the_first_row_needs_neither_torch_nor_the_rest_of_the_file() -> None:
    program = """
import json, sys, lzma
read = []
class Counting(lzma.LZMADecompressor):
    def decompress(self, data, max_length=-1):
        read.append(len(data))
        return super().decompress(data, max_length)
import _compression
lzma.LZMADecompressor = Counting
from quantkit.texts import general
row = next(general())
print(json.dumps([sorted(row), sum(read), "torch" in sys.modules, "numpy" in sys.modules]))
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    keys, read, torch, numpy = json.loads(out)
    assert {"kind", "language", "source"} < set(keys)
    assert 0 < read < 100_000
    assert not torch
    assert not numpy
