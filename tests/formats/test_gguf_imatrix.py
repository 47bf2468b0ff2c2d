"""llama.cpp's importance matrices, read and written in both forms; what is no such file is one message."""

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import UserError
from quantkit.formats.gguf.imatrix import Imatrix, ImatrixEntry, importance_of, read_imatrix, write_imatrix

K = 8


def matrix() -> Imatrix:
    """A dense tensor and one of three experts, of which the second saw no token."""
    rng = np.random.default_rng(0)
    dense = ImatrixEntry(rng.random((1, K), np.float32) * 100, np.array([96], np.float32))
    experts = ImatrixEntry(rng.random((3, K), np.float32) * 50, np.array([10, 0, 86], np.float32))
    experts.sums[1] = 0
    return Imatrix({"blk.0.attn_q.weight": dense, "blk.1.ffn_up_exps.weight": experts}, ("a text",), 3, 32)


def dat(entries: list[tuple[str, int, list[float]]], tail: bytes = b"") -> bytes:
    """A .dat written from its description."""
    data = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
        data += struct.pack(f"<{len(values)}f", *values)
    return data + tail


def test_gguf_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path, given_ = tmp_path / "m.gguf", matrix()
    write_imatrix(path, given_)
    found = read_imatrix(path)
    assert (found.datasets, found.chunks, found.chunk_size) == (("a text",), 3, 32)
    assert found.entries.keys() == given_.entries.keys()
    for name, entry in found.entries.items():
        np.testing.assert_array_equal(entry.sums, given_.entries[name].sums)
        np.testing.assert_array_equal(entry.counts, given_.entries[name].counts)
    assert found.unreached == {"blk.1.ffn_up_exps.weight": 1}
    write_imatrix(tmp_path / "again.gguf", found)
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()


def test_the_gguf_is_laid_out_as_llama_imatrix_does(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "m.gguf", matrix())
    reader = GGUFReader(tmp_path / "m.gguf")
    keys = [key for key in reader.fields if not key.startswith("GGUF.")]
    assert keys == ["general.type", "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"]
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}  # ne0 first
    assert shapes["blk.1.ffn_up_exps.weight.in_sum2"] == [K, 3]
    assert shapes["blk.1.ffn_up_exps.weight.counts"] == [1, 3]
    assert shapes["blk.0.attn_q.weight.counts"] == [1, 1]


def test_importance_is_the_mean_square_and_one_where_no_token_came() -> None:
    given_ = matrix()
    dense, experts = given_.entries.values()
    np.testing.assert_array_equal(importance_of(given_, "blk.0.attn_q.weight"), dense.sums[0] / np.float32(96))
    found = importance_of(given_, "blk.1.ffn_up_exps.weight", (3, 5, K))
    assert found is not None
    assert found.shape == (3, K)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[1], np.ones(K))
    np.testing.assert_array_equal(found[2], experts.sums[2] / np.float32(86))
    assert importance_of(given_, "token_embd.weight") is None
    with pytest.raises(
        UserError, match=r"imatrix: blk.0.attn_q.weight has 8 values, the tensor \[5, 16\] needs 1 x 16"
    ):
        importance_of(given_, "blk.0.attn_q.weight", (5, 16))


def test_dat_keeps_the_importance(tmp_path: Path) -> None:
    path, given_ = tmp_path / "m.dat", matrix()
    write_imatrix(path, given_)
    assert path.read_bytes()[:4] == struct.pack("<i", 2)
    found = read_imatrix(path)
    assert (found.datasets, found.chunks) == (("a text",), 3)
    for name, shape in (("blk.0.attn_q.weight", (4, K)), ("blk.1.ffn_up_exps.weight", (3, 4, K))):
        ours, theirs = importance_of(given_, name, shape), importance_of(found, name, shape)
        assert ours is not None
        assert theirs is not None
        np.testing.assert_allclose(theirs, ours, rtol=1e-6)


def test_dat_as_described(tmp_path: Path) -> None:
    path = tmp_path / "old.imatrix"  # the first bytes say which form it is
    path.write_bytes(dat([("blk.0.attn_q.weight", 4, [8.0, 2.0]), ("output.weight", 0, [3.0, 5.0])]))
    found = read_imatrix(path)
    np.testing.assert_array_equal(importance_of(found, "blk.0.attn_q.weight"), [2.0, 0.5])
    np.testing.assert_array_equal(importance_of(found, "output.weight"), [3.0, 5.0])
    assert (found.datasets, found.chunks) == ((), 0)
    path.write_bytes(dat([("x", 1, [1.0])], struct.pack("<ii", 7, 4) + b"text"))
    assert (read_imatrix(path).datasets, read_imatrix(path).chunks) == (("text",), 7)


def broken_gguf(path: Path, change: str) -> None:
    writer = GGUFWriter(path, "")
    writer.add_string("general.type", "model" if change == "type" else "imatrix")
    if change != "key":
        writer.add_array("imatrix.datasets", ["t"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 8)
    sums = np.ones((1, K), np.float16 if change == "dtype" else np.float32)
    sums[0, 0] = {"nan": np.nan, "negative": -1.0}.get(change, 1.0)
    writer.add_tensor("a.weight.in_sum2", sums)
    if change != "pair":
        writer.add_tensor("a.weight.counts", np.ones((3 if change == "counts" else 1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("type", "this GGUF file is a model, not an importance matrix"),
        ("key", "the key imatrix.datasets is missing"),
        ("dtype", "a.weight.in_sum2 is F16, expected F32"),
        ("nan", "a.weight: a value is NaN or infinite"),
        ("negative", "a.weight: a sum of squares or a count is negative"),
        ("pair", "a.weight has no tensor a.weight.counts"),
        ("counts", "a.weight has 8 sums and 3 counts"),
    ],
)
def test_refused(tmp_path: Path, change: str, message: str) -> None:
    broken_gguf(tmp_path / "m.gguf", change)
    with pytest.raises(UserError, match="(?s)" + message + ".*\nhint: "):
        read_imatrix(tmp_path / "m.gguf")


def test_refused_dat(tmp_path: Path) -> None:
    path, whole = tmp_path / "m.dat", dat([("blk.0.attn_q.weight", 4, [8.0, 2.0])])
    for data in (b"", b"\0\0\0", whole[:-1], whole[:12], dat([]), dat([("a", 1, [])]), dat([("a", 1, [1.0])] * 2)):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"m\.dat: .*\nhint: "):
            read_imatrix(path)
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match="hint: "):
            read_imatrix(missing)


def test_a_file_that_exists_stays(tmp_path: Path) -> None:
    for name in ("m.gguf", "m.dat"):
        (tmp_path / name).write_bytes(b"mine")
        with pytest.raises(UserError, match="exists and is never overwritten"):
            write_imatrix(tmp_path / name, matrix())
        assert (tmp_path / name).read_bytes() == b"mine"


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_damage_is_one_message(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Bytes of a good file changed, cut or replaced: an importance matrix, or a UserError, and nothing else."""
    folder = tmp_path_factory.getbasetemp()
    kind = data.draw(st.sampled_from(["gguf", "dat", "noise"]))
    if kind == "noise":
        content = data.draw(st.binary(max_size=200))
    else:
        source = folder / f"fuzz-source.{kind}"
        if not source.exists():
            write_imatrix(source, matrix())
        content = bytearray(source.read_bytes())
        for _ in range(data.draw(st.integers(0, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        content = content[: data.draw(st.integers(0, len(content)))]
    path = folder / "fuzzed"
    path.write_bytes(bytes(content))
    try:
        found = read_imatrix(path)
    except UserError:
        return
    for name in found.entries:
        importance = importance_of(found, name)
        assert importance is not None
        assert np.isfinite(importance).all()
