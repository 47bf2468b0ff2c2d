"""Write calibration.txt and eval.txt: modules of the running interpreter's standard library, none in both.

A module goes to one side or the other by a hash of its name, so the split is the same on every machine; the text itself
is that of the interpreter that runs this. Modules are whole and unchanged, joined by an empty line. Their licence is
Python's (LICENSE.python beside the texts).

    python examples/make_texts.py [FOLDER]
"""

import hashlib
import sys
import sysconfig
from pathlib import Path

CALIBRATION_BYTES, EVAL_BYTES = 600_000, 250_000
EVAL_SHARE = 3  # one module of so many is for evaluation
LARGEST = 30_000  # bytes of one module, so that no single one sets the tone
# tables, generated files, other people's packages and the interpreter's own tests read like no code people write
LEFT_OUT = {
    "distutils",  # gone from Python 3.12
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}


def modules(library: Path) -> list[tuple[str, str]]:
    """(name, source) of the library's modules, in the order of their names' hashes."""
    found = []
    for path in library.rglob("*.py"):
        name = path.relative_to(library).as_posix()
        if LEFT_OUT.isdisjoint(path.relative_to(library).parts) and "sysconfigdata" not in name:
            found.append((name, path.read_text(encoding="utf-8")))
    return sorted(found, key=lambda module: rank(module[0]))


def rank(name: str) -> int:
    """A number that depends on nothing but the name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def is_eval(name: str) -> bool:
    """Which side of the split a module belongs to."""
    return rank("split:" + name) % EVAL_SHARE == 0


def fill(sources: list[tuple[str, str]], size: int) -> tuple[str, list[str]]:
    """Whole modules up to `size` bytes, and their names."""
    text, names = "", []
    for name, source in sources:
        if 500 < len(source.encode()) <= LARGEST and len((text + source).encode()) <= size:
            text += source.rstrip("\n") + "\n\n"
            names.append(name)
    return text, names


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "tiny-llama"
    folder.mkdir(parents=True, exist_ok=True)
    sources = modules(Path(sysconfig.get_paths()["stdlib"]))
    for file, size, wanted in (("calibration.txt", CALIBRATION_BYTES, False), ("eval.txt", EVAL_BYTES, True)):
        text, names = fill([module for module in sources if is_eval(module[0]) == wanted], size)
        (folder / file).write_bytes(text.encode())
        print(f"{folder / file}: {len(text.encode())} bytes of {len(names)} modules: {', '.join(names)}")


if __name__ == "__main__":
    main()
