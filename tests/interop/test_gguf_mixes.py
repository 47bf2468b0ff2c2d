"""llama.cpp's own `llama-quantize --dry-run` gives every tensor the type that our mixes give it.

Needs the tools of llama.cpp: QUANTKIT_LLAMACPP names their folder. `python -m tests.interop.test_gguf_mixes` writes the
table of types that the ordinary tests hold, from the tool.
"""

import os
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from quantkit.formats.gguf.mixes import MIXES, type_choices
from tests.formats.test_gguf_mixes import RECORDED, recorded_cases
from tests.gguf_outlines import Outline, summary

gguf = pytest.importorskip("gguf")
np = pytest.importorskip("numpy")
TOOL = shutil.which("llama-quantize", path=os.environ.get("QUANTKIT_LLAMACPP", ""))
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(TOOL is None, reason="QUANTKIT_LLAMACPP names no folder with llama-quantize"),
]

ROWS = [(192, 512), (256, 320), (320, 192), (896, 4864), (2048, 896), (48, 256), (256, 40), (40, 48)]
OUTLINES = [
    *(Outline(layers=layers, heads=8, keys=8 // gqa) for layers in (6, 7, 15, 16, 33, 80) for gqa in (1, 4, 8)),
    *(Outline(layers=layers, tied=True, keys=1) for layers in (8, 32)),
    *(Outline("qwen2", layers=layers, heads=8, keys=keys) for layers in (24, 80) for keys in (2, 8)),
    *(Outline("qwen3", layers=28, heads=8, keys=2, tied=tied) for tied in (True, False)),
    *(Outline("gemma3", layers=layers, heads=4, keys=1, tied=True) for layers in (18, 26)),
    *(Outline("phi3", layers=layers, heads=8, keys=keys) for layers in (12, 32, 40) for keys in (2, 8)),
    *(Outline("qwen3moe", layers=layers, experts=128, heads=8, keys=keys) for layers in (6, 48) for keys in (1, 8)),
    *(Outline(layers=layers, experts=8, heads=8, keys=2, tied=t) for layers in (17, 32, 80) for t in (False, True)),
    Outline("qwen3moe", layers=9, experts=8, heads=8, keys=2),
    *(
        Outline(layers=9, columns=columns, down=down, tied=tied)
        for columns, down in ROWS
        for tied in (True, False)
    ),
    Outline("phi3", layers=9, columns=192, down=256),
    Outline("qwen3moe", layers=9, columns=192, down=320, experts=128),
]  # fmt: skip
CHOSEN: list[dict[str, str]] = [  # --tensor-type, in order
    {"attn_v": "q6_k"},
    {r"\.(\d*[13579])\.ffn_down": "q5_K", "ffn_down": "IQ4_NL"},
    {"ATTN_K": "Q8_0", "attn_": "q3_k", "blk": "bf16"},
    {r"^blk\.[[:digit:]]\.ffn_(up|gate)": "iq4_xs", "output": "q4_0", "token_embd": "q5_1"},
    {r"blk\.[0-2]\.attn_v\.weight$": "q4_k"},
]


def write_outline(path: Path, outline: Outline) -> None:
    """An F32 file of zeros."""
    writer = gguf.GGUFWriter(path, outline.architecture)
    add = {"u32": writer.add_uint32, "f32": writer.add_float32}
    for key, (kind, value) in outline.metadata.items():
        if kind in add:
            add[kind](key, value)
    writer.add_string("tokenizer.ggml.model", "none")
    for name, shape in outline.shapes.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_any_imatrix(path: Path) -> None:
    """An imatrix of one entry: that there is one decides, not what it says."""
    name, data = b"blk.0.attn_q.weight", [1.0] * 256
    row = struct.pack("<i", len(name)) + name + struct.pack("<ii256f", 1, 256, *data)
    path.write_bytes(struct.pack("<i", 1) + row + struct.pack("<ii", 1, 4) + b"text")


def dry_run(path: Path, mix: str, *options: str) -> tuple[dict[str, str], set[str]]:
    """The tool's list, and the names of the tensors whose rows did not fit."""
    command = [str(TOOL), "--dry-run", *options, str(path), mix]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-2000:]
    rows = re.findall(r"\] +(\S+) +- \[.*?type = +(\w+), size = .*? MiB(?: -> .*? MiB \((\w+)\))?\n", said)
    return {name: (new or old).upper() for name, old, new in rows}, set(re.findall(r"warning: (\S+) +- ncols", said))


def check(path: Path, outline: Outline, mix: str, imatrix: Path | None, **options: Any) -> None:
    """Our choices are the tool's, tensors that fall back included."""
    choices = type_choices(
        mix, outline.shapes, architecture=outline.architecture, metadata=outline.metadata, imatrix=imatrix is not None,
        **options,
    )  # fmt: skip
    theirs, fallen = dry_run(path, mix, *arguments(imatrix, **options))
    assert {name: choice.type for name, choice in choices.items()} == theirs, (outline, mix, imatrix, options)
    assert fallen <= {name for name, choice in choices.items() if choice.type != choice.wanted}


def arguments(
    imatrix: Path | None,
    pure: bool = False,
    overrides: dict[str, str] | None = None,
    token_embedding: str | None = None,
    output: str | None = None,
) -> Iterator[str]:
    yield from ("--imatrix", str(imatrix)) if imatrix else ()
    yield from ("--pure",) if pure else ()
    for pattern, type_ in (overrides or {}).items():
        yield from ("--tensor-type", f"{pattern}={type_}")
    yield from ("--token-embedding-type", token_embedding) if token_embedding else ()
    yield from ("--output-tensor-type", output) if output else ()


@pytest.fixture(scope="module")
def imatrix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("imatrix") / "any.dat"
    write_any_imatrix(path)
    return path


@pytest.mark.parametrize("number", range(len(OUTLINES)))
def test_every_mix_is_the_tools(number: int, tmp_path: Path, imatrix: Path) -> None:
    outline = OUTLINES[number]
    write_outline(path := tmp_path / "f32.gguf", outline)
    for mix in MIXES:
        check(path, outline, mix, None)
        check(path, outline, mix, imatrix)


@pytest.mark.parametrize("outline", [OUTLINES[3], OUTLINES[18], *OUTLINES[-6:]], ids=str)
def test_pure_and_types_by_name_are_the_tools(outline: Outline, tmp_path: Path, imatrix: Path) -> None:
    write_outline(path := tmp_path / "f32.gguf", outline)
    columns = outline.columns  # what these two options say goes unchecked in the tool: its file would not load
    small, smaller = (
        ("q5_k", "q3_k") if columns % 256 == 0 else ("q5_0", "q4_1") if columns % 32 == 0 else ("f16", "f32")
    )
    for mix in ("Q2_K", "Q3_K_M", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q4_0", "Q8_0", "F16"):
        check(path, outline, mix, imatrix, pure=True)
        check(path, outline, mix, None, output=small)
        check(path, outline, mix, None, token_embedding=smaller, pure=True)
        check(path, outline, mix, imatrix, token_embedding="bf16", output=small)
        for overrides in CHOSEN:
            if outline.architecture == "phi3" and any("attn_" in pattern.lower() for pattern in overrides):
                continue  # there is no attn_v: an error of ours, silence of the tool's
            check(path, outline, mix, imatrix, overrides=overrides, pure=mix == "Q4_K_S")
            check(path, outline, mix, None, overrides=overrides, output="f16", token_embedding=smaller)


def test_the_recorded_table_is_the_tools(tmp_path: Path, imatrix: Path) -> None:
    assert list(recorded_rows(tmp_path, imatrix)) == RECORDED.read_text().splitlines()


def recorded_rows(folder: Path, imatrix: Path) -> Iterator[str]:
    for name, outline, mix, with_imatrix in recorded_cases():
        if not (path := folder / f"{name}.gguf").exists():
            write_outline(path, outline)
        types, _ = dry_run(path, mix, *arguments(imatrix if with_imatrix else None))
        yield f"{name} {mix}{' imatrix' if with_imatrix else ''}: {summary(in_order(types, list(outline.shapes)))}"


def in_order(types: dict[str, str], names: Sequence[str]) -> dict[str, str]:
    return {name: types[name] for name in names}


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_any_imatrix(any_imatrix := Path(folder) / "any.dat")
        RECORDED.write_text("".join(row + "\n" for row in recorded_rows(Path(folder), any_imatrix)))
