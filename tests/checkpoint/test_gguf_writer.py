"""The writer of GGUF files: the gguf package's own bytes, resumable, in shards, clear refusals."""

import errno
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from quantkit.checkpoint import rawio
from quantkit.checkpoint.gguf_file import open_gguf, read_gguf
from quantkit.checkpoint.gguf_writer import GgufLayout, GgufWriter, KeyValue
from quantkit.errors import DiskFullError, RunError, UserError
from quantkit.ggml_types import GGML_TYPES

METADATA: dict[str, KeyValue] = {
    "general.architecture": ("string", "llama"),
    "k.u8": ("u8", 200),
    "k.i8": ("i8", -7),
    "k.u16": ("u16", 60000),
    "k.i16": ("i16", -300),
    "k.u32": ("u32", 1 << 31),
    "k.i32": ("i32", -5),
    "k.u64": ("u64", 1 << 63),
    "k.i64": ("i64", -(1 << 62)),
    "k.f32": ("f32", 0.1),
    "k.f64": ("f64", 0.1),
    "k.bool": ("bool", True),
    "k.text": ("string", "a é\n{{ x }}\0"),
    "k.texts": ("string[]", ["a", "", "é"]),
    "k.i32s": ("i32[]", [1, -2, 3]),
    "k.u32s": ("u32[]", (1, 2)),
    "k.f32s": ("f32[]", [0.1, 2.0]),
    "k.bools": ("bool[]", [True, False, True]),
    "k.u8s": ("u8[]", b"\0\1\xff"),
}
TYPES = ["F32", "F16", "BF16", "Q4_0", "Q4_K", "Q6_K", "Q8_0", "IQ4_XS", "MXFP4", "NVFP4"]
KINDS = {"u": "UINT", "i": "INT", "f": "FLOAT"}


def layouts() -> list[GgufLayout]:
    held = [GgufLayout(f"blk.{i}.w.weight", name, (3, 512)) for i, name in enumerate(TYPES)]
    return [
        *held,
        GgufLayout("norm", "F32", (7,)),
        GgufLayout("experts", "Q4_0", (2, 3, 32)),
        GgufLayout("s", "F32", ()),
    ]


def content(layout: GgufLayout) -> Tensor:
    draw = torch.Generator().manual_seed(layout.nbytes)
    return torch.randint(0, 256, (layout.nbytes,), dtype=torch.uint8, generator=draw)


def fill(writer: GgufWriter, names: list[str] | None = None) -> None:
    for name in reversed(names or list(writer.layouts)):
        writer.write_at(name, 0, content(writer.layouts[name]))


def gguf_kind(kind: str) -> gguf.GGUFValueType:
    known = {"string": "STRING", "bool": "BOOL"}
    return gguf.GGUFValueType[known.get(kind) or KINDS[kind[0]] + kind[1:]]


def by_gguf(path: Path, metadata: dict[str, KeyValue], tensors: list[GgufLayout], **options: Any) -> None:
    """The same file or shards by the gguf package's own writer."""
    writer = gguf.GGUFWriter(path, metadata["general.architecture"][1], **options)
    writer.data_alignment = metadata.get("general.alignment", ("u32", 32))[1]
    for key, (kind, value) in list(metadata.items())[1:]:
        if kind.endswith("[]"):
            writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, gguf_kind(kind[:-2]))
        else:
            writer.add_key_value(key, value, gguf_kind(kind))
    for layout in tensors:
        raw = content(layout).numpy()
        number = gguf.GGMLQuantizationType(GGML_TYPES[layout.type].number)
        shape = layout.shape if not layout.shape else (*layout.shape[:-1], len(raw) // int(np.prod(layout.shape[:-1])))
        data = raw.reshape(shape) if layout.shape else raw.view(np.float32).reshape(())
        writer.add_tensor(layout.name, data, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("alignment", [None, 8, 256])
def test_same_bytes_as_gguf(tmp_path: Path, alignment: int | None) -> None:
    metadata = METADATA | ({} if alignment is None else {"general.alignment": ("u32", alignment)})
    writer = GgufWriter(tmp_path / "ours", metadata, layouts(), 1 << 30)
    fill(writer)
    writer.finish()
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["model.gguf"]
    by_gguf(tmp_path / "theirs.gguf", metadata, layouts())
    assert (tmp_path / "ours" / "model.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_same_shards_as_gguf(tmp_path: Path) -> None:
    whole = [GgufLayout(f"{i}", name, (8, 512)) for i, name in enumerate(TYPES)]  # of sizes that need no padding
    writer = GgufWriter(tmp_path / "ours", METADATA, whole, 10000)
    fill(writer)
    writer.finish()
    by_gguf(tmp_path / "model.gguf", METADATA, whole, split_max_size=10000)
    theirs = sorted(tmp_path.glob("*.gguf"))
    assert len(theirs) > 4
    assert [path.name for path in writer.paths] == [path.name for path in theirs]
    for our_file, their_file in zip(writer.paths, theirs, strict=True):
        assert our_file.read_bytes() == their_file.read_bytes()


@pytest.mark.parametrize("most", [1 << 30, 3000])
def test_read_by_gguf_and_by_us(tmp_path: Path, most: int) -> None:
    writer = GgufWriter(tmp_path, METADATA, layouts(), most, stem="m")
    fill(writer)
    writer.finish()
    for path in writer.paths:
        theirs = gguf.GGUFReader(path)
        for tensor in theirs.tensors:
            layout = writer.layouts[tensor.name]
            assert tensor.tensor_type.name == layout.type
            assert tuple(reversed(tensor.shape.tolist())) == layout.shape
            assert tensor.data.tobytes() == content(layout).numpy().tobytes()
        if path == writer.paths[0]:
            for key, (kind, value) in METADATA.items():
                found = theirs.fields[key].contents()
                assert (
                    np.allclose(found, value) if kind[0] == "f" else found == (list(value) if "[]" in kind else value)
                )
    for path in writer.paths:
        ours = open_gguf(path)
        assert list(ours.tensors) == [layout.name for layout in layouts()]
        assert {key: ours.metadata_types[key] for key in METADATA} == {key: kind for key, (kind, _) in METADATA.items()}
        for layout in layouts():
            tensor = ours.tensors[layout.name]
            assert (tensor.type, tensor.shape, tensor.nbytes) == (layout.type, layout.shape, layout.nbytes)
            raw = tensor.path.read_bytes()[tensor.start : tensor.start + tensor.nbytes]
            assert raw == content(layout).numpy().tobytes()


def test_shards_hold_at_most_so_much_and_cut_no_tensor(tmp_path: Path) -> None:
    tensors = [GgufLayout(f"t{i}", "F32", (n,)) for i, n in enumerate((4, 4, 100, 4, 4, 4))]
    writer = GgufWriter(tmp_path, {"general.alignment": ("u32", 64)}, tensors, 128)
    assert [path.name for path in writer.paths] == [f"model-0000{i}-of-00004.gguf" for i in (1, 2, 3, 4)]
    writer.finish()
    files = [read_gguf(path) for path in writer.paths]
    assert [list(file.tensors) for file in files] == [["t0", "t1"], ["t2"], ["t3", "t4"], ["t5"]]
    split = {"split.count": 4, "split.tensors.count": 6, "general.alignment": 64}
    assert [file.metadata for file in files] == [split | {"split.no": i} for i in range(4)]
    assert files[1].metadata_types["split.no"] == files[1].metadata_types["split.count"] == "u16"
    assert files[1].metadata_types["split.tensors.count"] == "i32"


def test_in_parts(tmp_path: Path) -> None:
    layout = GgufLayout("x", "Q8_0", (3, 64))
    writer = GgufWriter(tmp_path, METADATA, [GgufLayout("before", "F32", (5,)), layout], 1 << 20)
    raw = content(layout)
    for start in (68, 136, 0):
        writer.write_at("x", start, raw[start : start + 68].reshape(2, 34))
    assert torch.equal(writer.read_at("x", 0, 204), raw)
    assert torch.equal(writer.read_at("x", 40, 90), raw[40:90])
    assert not writer.read_at("before", 0, 20).any()
    for start in (-1, 137):
        with pytest.raises(RunError, match=f"x: bytes {start} to {start + 68} of a tensor of 204 bytes"):
            writer.write_at("x", start, raw[:68])
    with pytest.raises(RunError, match="x: bytes 200 to 205"):
        writer.read_at("x", 200, 205)
    assert writer.data_bytes == 204 + 20
    writer.finish()


@pytest.mark.parametrize("most", [1 << 30, 3000])
def test_resume_goes_on_in_the_same_files(tmp_path: Path, most: int) -> None:
    whole = GgufWriter(tmp_path / "whole", METADATA, layouts(), most)
    fill(whole)
    whole.finish()
    expected = [path.read_bytes() for path in whole.paths]

    first = GgufWriter(tmp_path / "x", METADATA, layouts(), most)
    names = list(first.layouts)
    assert first.created == set(names)
    fill(first, names[:5])
    first.close()  # as a kill leaves it
    for path in first.paths:
        with pytest.raises(UserError, match="the file is unfinished"):
            read_gguf(path)
        with pytest.raises(ValueError, match="magic"):
            gguf.GGUFReader(path)
    second = GgufWriter(tmp_path / "x", METADATA, layouts(), most)
    assert not second.created
    fill(second, names[5:])
    second.finish()
    assert [path.read_bytes() for path in second.paths] == expected
    again = GgufWriter(tmp_path / "x", METADATA, layouts(), most)  # killed between finish and what follows it
    assert not again.created
    again.finish()
    assert [path.read_bytes() for path in again.paths] == expected


class Killed(BaseException):
    """Nothing is caught, nothing closed: the files stay as a kill leaves them."""


def test_killed_at_every_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever write is the last one of a run, its files are no GGUF files yet, and the next run completes them."""
    monkeypatch.setattr(rawio, "CHUNK", 100)  # a header takes several writes, as a real one does
    write, left = os.pwrite, 0

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        nonlocal left
        if not left:
            raise Killed
        left -= 1
        return write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    tensors = [GgufLayout(f"t{i}", "F32", (8,)) for i in range(4)]

    def run(folder: Path, writes: int) -> dict[str, bytes]:
        nonlocal left
        left = writes
        writer = GgufWriter(folder, {"general.architecture": ("string", "llama")}, tensors, 64)
        fill(writer)
        writer.finish()
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    expected, all_writes = run(tmp_path / "whole", 1000), 1000 - left
    assert len(expected) == 2
    assert all_writes == 4 + 2 + 2 + 5  # tensors, beginnings, magics, and two headers in parts
    for writes in range(all_writes):
        folder = tmp_path / str(writes)
        with pytest.raises(Killed):
            run(folder, writes)
        finished = sum(path.read_bytes()[:4] == b"GGUF" for path in folder.iterdir())
        assert finished == (1 if writes == all_writes - 1 else 0)
        assert run(folder, 1000) == expected


def test_data_is_on_the_disk_before_the_magic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    write, sync = os.pwrite, os.fsync

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        calls.append("magic" if offset == 0 else "data")
        return write(fd, data, offset)

    def fsync(fd: int) -> None:
        calls.append("sync")
        sync(fd)

    writer = GgufWriter(tmp_path, METADATA, [GgufLayout("x", "F32", (8,))], 1 << 20)
    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(os, "fsync", fsync)
    writer.write_at("x", 0, torch.zeros(32, dtype=torch.uint8))
    writer.finish()
    assert calls == ["data", "sync", "magic", "sync"]


def test_resume_refuses_another_file(tmp_path: Path) -> None:
    for damage in ("header", "size", "magic"):
        folder = tmp_path / damage
        GgufWriter(folder, METADATA, layouts(), 1 << 30).close()
        path = folder / "model.gguf"
        with path.open("r+b") as file:
            if damage == "size":
                file.truncate(path.stat().st_size - 1)
            else:
                file.seek(0 if damage == "magic" else 60)
                file.write(b"tjgg")
        before = path.read_bytes()
        with pytest.raises(RunError, match="not what this run would write"):
            GgufWriter(folder, METADATA, layouts(), 1 << 30)
        assert path.read_bytes() == before
    with pytest.raises(RunError, match="not what this run would write"):
        GgufWriter(folder, METADATA | {"k.u8": ("u8", 1)}, layouts(), 1 << 30)


def fail(code: int):
    def call(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return call


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DiskFullError, match=r"needs 1073741824\.00 GiB"):
        GgufWriter(tmp_path, METADATA, [GgufLayout("x", "I8", (1 << 60,))], 1 << 62)
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", fail(errno.ENOSPC))
        with pytest.raises(DiskFullError, match=r"needs 0\.00 GiB, .* GiB free at"):
            GgufWriter(tmp_path, METADATA, layouts(), 3000)
    assert not list(tmp_path.iterdir())
    writer = GgufWriter(tmp_path, METADATA, layouts(), 1 << 20)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail(errno.EDQUOT))
        with pytest.raises(DiskFullError, match="not enough disk space"):
            writer.write_at("norm", 0, torch.zeros(28, dtype=torch.uint8))
        with pytest.raises(DiskFullError):
            writer.finish()
        patch.setattr(os, "pwrite", fail(errno.EIO))
        with pytest.raises(RunError, match=r"model\.gguf: Input/output error"):
            writer.write_at("norm", 0, torch.zeros(28, dtype=torch.uint8))
    writer.close()


def test_headers_are_checked_at_the_end(tmp_path: Path) -> None:
    writer = GgufWriter(tmp_path, METADATA, [GgufLayout("x", "F32", (8,))], 1 << 20)
    other = GgufWriter(tmp_path / "other", METADATA, [GgufLayout("y", "F32", (8,))], 1 << 20)
    other.finish()
    (tmp_path / "other" / "model.gguf").rename(tmp_path / "model.gguf")
    with pytest.raises(RunError, match="changed under the run"):
        writer.finish()


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (GgufLayout("n" * 64, "F32", (8,)), "'n+': a name of 64 bytes, GGUF files hold names of 1 to 63"),
        (GgufLayout("é" * 32, "F32", (8,)), "a name of 64 bytes"),
        (GgufLayout("", "F32", (8,)), "a name of 0 bytes"),
        (GgufLayout("x", "Q4_K", (2, 128)), r"'x': shape \[2, 128\] as Q4_K, expected .* rows of a multiple of 256"),
        (GgufLayout("x", "F32", (0, 8)), r"'x': shape \[0, 8\]"),
        (GgufLayout("x", "F32", (1, 1, 1, 1, 8)), "at most 4 dimensions"),
    ],
)
def test_refuses_a_tensor(tmp_path: Path, layout: GgufLayout, message: str) -> None:
    with pytest.raises(UserError, match=message):
        GgufWriter(tmp_path, METADATA, [layout], 1 << 20)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "value",
    [
        *[("u32", -1), ("u32", 1 << 32), ("u8", 256), ("u32", 1.5), ("f32", "x"), ("f32", 1e39), ("string", 3)],
        *[("string[]", ["a", 3]), ("string", "\ud800"), ("i32[]", [1, "x"])],
    ],
)
def test_refuses_a_value(tmp_path: Path, value: KeyValue) -> None:
    with pytest.raises(
        UserError, match=rf"k\.v: .* is no {value[0].replace('[', '.').replace(']', '.')} of a GGUF file"
    ):
        GgufWriter(tmp_path, METADATA | {"k.v": value}, layouts(), 1 << 20)
    assert not list(tmp_path.iterdir())


def test_more_shards_than_can_be_counted(tmp_path: Path) -> None:
    tensors = [GgufLayout(str(i), "F32", (8,)) for i in range(1 << 16)]
    with pytest.raises(UserError, match="65536 shards, GGUF counts up to 65535"):
        GgufWriter(tmp_path, METADATA, tensors, 32)
