"""The reader against safetensors' and torch's own files, and against every way a folder can be broken."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from quantkit.checkpoint.header import DTYPES, torch_dtype
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import UserError

UNSAVED = {"F8_E8M0"}  # safetensors knows the dtype, its torch binding does not


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    found = {f"t.{tag}": torch.randint(0, 100, (5, 7)).to(torch_dtype(tag)) for tag in DTYPES if tag not in UNSAVED}
    return found | {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "long": torch.randn(1000, 130)}


def same(a: Tensor, b: Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One shard with every dtype."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file(tensors(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards with an index: a and b in the first, c in the second."""
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.ones(4, 4), "b": torch.arange(3)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"c": torch.zeros(2)}, tmp_path / "model-00002-of-00002.safetensors")
    write_index(tmp_path, {"a": 1, "b": 1, "c": 2})
    return tmp_path


def write_index(folder: Path, where: dict[str, int | str]) -> None:
    files = {k: v if isinstance(v, str) else f"model-0000{v}-of-00002.safetensors" for k, v in where.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def test_reads_every_dtype(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.tensors.keys() == tensors().keys()
    for name, expected in tensors().items():
        assert same(checkpoint.read(name), expected), name
        assert checkpoint.tensors[name].nbytes == expected.nbytes
    assert checkpoint.dtype == torch.float32


def test_large_tensors_outlive_the_reader(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    x = torch.arange(3 << 20, dtype=torch.int32).reshape(1 << 10, -1)
    save_file({"x": x}, tmp_path / "model.safetensors")
    read = Checkpoint.open(tmp_path).read("x")
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(read, x)
    read += 1  # memory of its own
    part = read[5:]
    del read
    assert torch.equal(part, x[5:] + 1)


def test_reads_e8m0(tmp_path: Path) -> None:
    header = b'{"x":{"dtype":"F8_E8M0","shape":[2],"data_offsets":[0,2]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\x7f\x80")
    (tmp_path / "config.json").write_text("{}")
    assert Checkpoint.open(tmp_path).read("x").float().tolist() == [1.0, 2.0]


@pytest.mark.parametrize("index", [[3, 4, 5, 9, 3, 0], [], [999], [7, 6]], ids=str)
def test_rows(folder: Path, index: list[int]) -> None:
    index_R = torch.tensor(index, dtype=torch.int64)
    checkpoint = Checkpoint.open(folder)
    assert same(checkpoint.rows("long", index_R), tensors()["long"][index_R])
    if max(index, default=0) < 5:
        got = checkpoint.rows("t.F8_E4M3", index_R)
        assert same(got.view(torch.uint8), tensors()["t.F8_E4M3"].view(torch.uint8)[index_R])


def test_rows_reads_nothing_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, read, calls = Checkpoint.open(folder), os.preadv, []
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: calls.append(read(fd, views, at)) or calls[-1])
    checkpoint.rows("long", torch.tensor([5, 6, 900, 6]))
    assert calls == [2 * 520, 520]


def test_rows_out_of_range(folder: Path) -> None:
    with pytest.raises(UserError, match="rows 0 to 1000"):
        Checkpoint.open(folder).rows("long", torch.tensor([0, 1000]))


@pytest.mark.parametrize("in_kernel", [True, False])
def test_copy(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_kernel: bool) -> None:
    if not in_kernel:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    checkpoint = Checkpoint.open(folder)
    with (tmp_path / "out").open("w+b") as out:
        checkpoint.copy("long", out.fileno(), 24)
        out.seek(24)
        assert out.read() == tensors()["long"].numpy().tobytes()


def test_sharded(sharded: Path) -> None:
    checkpoint = Checkpoint.open(sharded)
    assert list(checkpoint.tensors) == ["a", "b", "c"]
    assert torch.equal(checkpoint.read("b"), torch.arange(3))


def test_fingerprint_sees_content_not_layout(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    whole = tmp_path_factory.mktemp("whole")
    (whole / "config.json").write_text("{}")
    held = {"a": torch.ones(4, 4), "b": torch.arange(3), "c": torch.zeros(2)}
    save_file(held, whole / "model.safetensors")
    before = Checkpoint.open(whole).fingerprint()
    assert before == Checkpoint.open(sharded).fingerprint()
    save_file(held | {"c": torch.tensor([0.0, 1.0])}, whole / "model.safetensors")
    assert Checkpoint.open(whole).fingerprint() != before


@pytest.mark.parametrize("position", [0, 60_000, -1])
def test_fingerprint_samples_large_tensors(tmp_path: Path, position: int) -> None:
    (tmp_path / "config.json").write_text("{}")
    x = torch.zeros(120_000)
    save_file({"x": x}, tmp_path / "model.safetensors")
    before = Checkpoint.open(tmp_path).fingerprint()
    x[position] = 1
    save_file({"x": x}, tmp_path / "model.safetensors")
    assert Checkpoint.open(tmp_path).fingerprint() != before


def test_pickled(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    held = {"a": torch.randn(6, 5).T, "b": torch.arange(4).to(torch.bfloat16)}
    torch.save(held, tmp_path / "pytorch_model.bin")
    checkpoint = Checkpoint.open(tmp_path)
    assert same(checkpoint.read("a"), held["a"])
    assert checkpoint.read("a").is_contiguous()
    assert same(checkpoint.rows("b", torch.tensor([2, 0])), held["b"][[2, 0]])
    assert checkpoint.tensors["a"].shape == (5, 6)
    with (tmp_path / "out").open("w+b") as out:
        checkpoint.copy("a", out.fileno(), 0)
        assert out.read() == held["a"].contiguous().numpy().tobytes()
    first = checkpoint.fingerprint()
    torch.save(held | {"b": torch.zeros(4, dtype=torch.bfloat16)}, tmp_path / "pytorch_model.bin")
    assert Checkpoint.open(tmp_path).fingerprint() != first


def test_pickled_of_old_torch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    torch.save({"a": torch.ones(3)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert torch.equal(Checkpoint.open(tmp_path).read("a"), torch.ones(3))


def test_pickled_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    torch.save({"a": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="convert it to safetensors"):
        Checkpoint.open(tmp_path)
    assert not (tmp_path / "ran").exists()


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def rewrite(folder: Path, header: str | bytes, data: bytes = b"\0" * 8) -> None:
    text = header.encode() if isinstance(header, str) else header
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


ENTRY = '"%s":{"dtype":"F32","shape":[%d],"data_offsets":[%d,%d]}'
HEADERS = {
    "not json": ("{", "not JSON"),
    "not utf8": (b'{"\xff": 1}', "not JSON"),
    "deep": ("[" * 100_000, "not JSON"),
    "list": ("[]", "not JSON"),
    "twice": ("{" + ENTRY % ("a", 2, 0, 8) + "," + ENTRY % ("a", 2, 0, 8) + "}", "a is listed twice"),
    "overlap": ("{" + ENTRY % ("a", 2, 0, 8) + "," + ENTRY % ("b", 1, 4, 8) + "}", "b overlaps"),
    "hole": ("{" + ENTRY % ("a", 1, 4, 8) + "}", "hole"),
    "beyond": ("{" + ENTRY % ("a", 4, 0, 16) + "}", "promises"),
    "trailing": ("{" + ENTRY % ("a", 1, 0, 4) + "}", "promises"),
    "size": ("{" + ENTRY % ("a", 3, 0, 8) + "}", "takes 8 bytes"),
    "reversed": ("{" + ENTRY % ("a", 2, 8, 0) + "}", "damaged"),
    "negative": ("{" + ENTRY % ("a", -2, 0, 8) + "}", "damaged"),
    "dtype": ('{"a":{"dtype":"F6_E2M3","shape":[2],"data_offsets":[0,8]}}', "F6_E2M3"),
    "list dtype": ('{"a":{"dtype":[],"shape":[2],"data_offsets":[0,8]}}', "dtype"),
    "no offsets": ('{"a":{"dtype":"F32","shape":[2]}}', "lacks"),
    "float shape": ('{"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}', "damaged"),
    "entry": ('{"a": 3}', "lacks"),
}


@pytest.mark.parametrize(("header", "message"), HEADERS.values(), ids=HEADERS)
def test_bad_header(folder: Path, header: str | bytes, message: str) -> None:
    rewrite(folder, header)
    with pytest.raises(UserError, match=message) as caught:
        Checkpoint.open(folder)
    assert "model.safetensors" in str(caught.value)


@pytest.mark.parametrize("size", [0, 5, 8, 300, -1], ids=str)
def test_truncated(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match="damaged or was not fully downloaded"):
        Checkpoint.open(folder)


def test_truncated_after_opening(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    os.truncate(folder / "model.safetensors", checkpoint.tensors["long"].start + 10)
    with pytest.raises(UserError, match="while being read"):
        checkpoint.read("long")


def test_header_length_beyond_file(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((1 << 63).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match="header should be"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("file", ["../model.safetensors", "sub/../../x.safetensors", "ABSOLUTE"])
def test_index_leaving_the_folder(sharded: Path, file: str) -> None:
    outside = sharded.parent / "model.safetensors"
    save_file({"c": torch.zeros(2)}, outside)
    write_index(sharded, {"a": 1, "b": 1, "c": str(outside) if file == "ABSOLUTE" else file})
    with pytest.raises(UserError, match="outside"):
        Checkpoint.open(sharded)


def test_index_naming_a_link_out_of_the_folder(sharded: Path) -> None:
    shard, outside = sharded / "model-00002-of-00002.safetensors", sharded.parent / "c.safetensors"
    shard.rename(outside)
    shard.symlink_to(outside)
    with pytest.raises(UserError, match="outside"):
        Checkpoint.open(sharded)


def test_hub_cache_links_are_fine(sharded: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in list(sharded.glob("*.json")) + list(sharded.glob("*.safetensors")):
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert torch.equal(Checkpoint.open(snapshot).read("c"), torch.zeros(2))


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002.*missing"):
        Checkpoint.open(sharded)


def test_tensor_not_where_the_index_says(sharded: Path) -> None:
    write_index(sharded, {"a": 1, "b": 2, "c": 2})
    with pytest.raises(UserError, match="says b is here"):
        Checkpoint.open(sharded)
    write_index(sharded, {"a": 1, "b": 1, "c": 2, "d": 2})
    with pytest.raises(UserError, match="says d is here"):
        Checkpoint.open(sharded)


def test_tensor_in_two_shards(sharded: Path) -> None:
    save_file({"c": torch.zeros(2), "a": torch.ones(1)}, sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(UserError, match="a is also in"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("text", ["{", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "[]", '{"a": 1, "a": 2}'])
def test_bad_index(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json"):
        Checkpoint.open(sharded)


def test_not_a_model_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        Checkpoint.open(tmp_path / "none")
    with pytest.raises(UserError, match=r"config\.json"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no weights"):
        Checkpoint.open(tmp_path)
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(UserError, match="adapter"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"config\.json"):
        Checkpoint.open(tmp_path)


def test_unreadable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:  # root, which tests may run as, can read everything
        patch.setattr(os, "access", lambda *_: False)
        with pytest.raises(UserError, match="permissions"):
            Checkpoint.open(folder)

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match="Permission denied"):
        Checkpoint.open(folder)


def test_unknown_tensor(folder: Path) -> None:
    with pytest.raises(UserError, match="no tensor named x"):
        Checkpoint.open(folder).read("x")
