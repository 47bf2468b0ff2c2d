"""The reader of GGUF headers: what other writers write, and one clear refusal of each kind of damage."""

import random
import struct
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantkit.checkpoint.gguf_file import open_gguf, read_gguf
from quantkit.checkpoint.gguf_header import GgufFile, parse_gguf
from quantkit.errors import UserError
from quantkit.ggml_types import GGML_TYPES
from tests.checkpoint.gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    I32,
    STRING,
    U8,
    U16,
    U32,
    Entry,
    Gguf,
    array,
    string,
    text,
    u32,
    with_key,
    with_tensor,
)

PATH = Path("some.gguf")
HUGE = 1 << 60


def parse(raw: bytes) -> GgufFile:
    return parse_gguf(BytesIO(raw), PATH)


def test_sound_file() -> None:
    file = parse(Gguf().raw())
    assert (file.version, file.alignment) == (3, 32)
    assert file.metadata == {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "tokenizer.ggml.tokens": ["a", "é", ""],
        "tokenizer.ggml.scores": [1.5, -2.0],
    }
    assert list(file.metadata_types.values()) == ["string", "u32", "string[]", "f32[]"]
    first, second = file.tensors.values()
    assert (first.name, first.type, first.shape, first.nbytes) == ("token_embd.weight", "F32", (2, 8), 64)
    assert (second.name, second.type, second.shape, second.nbytes) == ("output.weight", "Q8_0", (1, 32), 34)
    assert second.start == first.start + 64 == len(Gguf().raw()) - 64


def test_reads_what_gguf_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    arrays = {
        "a": np.arange(15, dtype=np.float32).reshape(3, 5),
        "b": np.arange(6, dtype=np.float16),
        "c": np.arange(8, dtype=np.int64).reshape(2, 2, 2, 1),
    }
    blocks = gguf.quants.quantize(
        np.linspace(-1, 1, 256, dtype=np.float32).reshape(4, 64), gguf.GGMLQuantizationType.Q5_0
    )
    values = {"uint8": 200, "int8": -7, "uint16": 60000, "int16": -300, "uint32": 1 << 31, "int32": -5}
    values |= {"uint64": 1 << 63, "int64": -(1 << 62), "float32": 0.25, "float64": 0.1, "bool": True, "string": "é\n\0"}
    for kind, value in values.items():
        getattr(writer, f"add_{kind}")(f"k.{kind}", value)
    writer.add_array("k.texts", ["x", "", "yz"])
    writer.add_array("k.whole", [1, -2, 3])
    writer.add_array("k.truths", [True, False])
    writer.add_custom_alignment(64)
    for name, value in arrays.items():
        writer.add_tensor(name, value)
    writer.add_tensor("q", blocks, raw_dtype=gguf.GGMLQuantizationType.Q5_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = read_gguf(path)
    assert file.alignment == 64 == file.metadata.pop("general.alignment")
    assert file.metadata.pop("general.architecture") == "llama"
    expected = {f"k.{kind}": value for kind, value in values.items()}
    assert file.metadata == expected | {"k.texts": ["x", "", "yz"], "k.whole": [1, -2, 3], "k.truths": [True, False]}
    assert file.metadata_types["k.bool"] == "bool"
    assert file.metadata_types["k.uint64"] == "u64"
    assert file.metadata_types["k.whole"] == "i32[]"
    raw = path.read_bytes()
    for name, value in (arrays | {"q": blocks}).items():
        tensor = file.tensors[name]
        assert tensor.shape == (value.shape if name != "q" else (4, 64))
        assert raw[tensor.start : tensor.start + tensor.nbytes] == value.tobytes()
    assert [tensor.type for tensor in file.tensors.values()] == ["F32", "F16", "I64", "Q5_0"]


def test_without_torch() -> None:
    script = (
        "import sys, quantkit.checkpoint.gguf_file, quantkit.checkpoint.gguf_values; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_the_types_that_gguf_knows() -> None:
    """Numbers and block sizes in our table are those of the gguf package, where it has them."""
    for type_, (columns, nbytes) in gguf.GGML_QUANT_SIZES.items():
        ours = GGML_TYPES[type_.name]
        if type_.name == "Q8_1":  # the package still has the 40 bytes of 2023; ggml-common.h two halves and 32 codes
            continue
        assert (ours.number, ours.columns, ours.nbytes) == (type_.value, columns, nbytes), type_.name


@pytest.mark.parametrize("name", GGML_TYPES)
def test_every_type_of_llama_cpp(name: str) -> None:
    """Q2_0, which PyPI's gguf does not know, like any other."""
    type_ = GGML_TYPES[name]
    entry = Entry("x", (2 * type_.columns, 3), type_.number)
    tensor = parse(Gguf(tensors=(entry,), data=bytes(6 * type_.nbytes)).raw()).tensors["x"]
    assert (tensor.type, tensor.shape, tensor.nbytes) == (name, (3, 2 * type_.columns), 6 * type_.nbytes)


def test_scalar_and_no_tensor_at_all() -> None:
    assert parse(Gguf(tensors=(Entry("x", ()),), data=bytes(4)).raw()).tensors["x"].shape == ()
    assert parse(Gguf(tensors=(), data=b"", alignment=1).raw()).tensors == {}


def test_text_values_of_any_bytes() -> None:
    """Old files have tokens that are parts of characters; llama.cpp takes them."""
    file = parse(with_key("k", array(STRING, 2, text(b"\xe2\x96") + text("x"))).raw())
    assert file.metadata["k"] == ["�", "x"]


def test_padding_at_the_end_may_be_missing_or_more() -> None:
    raw = Gguf().raw()
    assert parse(raw[:-30]).tensors == parse(raw).tensors == parse(raw + bytes(100)).tensors


REFUSED = {
    "empty": (b"", "the file is empty"),
    "another magic": (b"PK\3\4" + bytes(90), r"not a GGUF file: it begins b'PK\\x03\\x04.*', expected b'GGUF'"),
    "shorter than a magic": (b"GG", "begins b'GG', expected b'GGUF'"),
    "old magic": (b"tjgg\1\0\0\0" + bytes(90), "not a GGUF file"),
    "unfinished": (Gguf(magic=bytes(4)).raw(), "the file is unfinished"),
    "version 1": (Gguf(version=1).raw(), r"GGUF version 1, expected 3\nhint: fetch a newer file"),
    "version 2": (Gguf(version=2).raw(), r"GGUF version 2, expected 3\nhint: fetch a newer file"),
    "version 0": (Gguf(version=0).raw(), "GGUF version 0, expected 3"),
    "version 4": (Gguf(version=4).raw(), r"GGUF version 4, expected 3\nhint: a newer quantkit"),
    "big-endian": (Gguf(order=">").raw(), "the file is big-endian"),
    "big-endian version 2": (Gguf(order=">", version=2).raw(), r"big-endian"),
    "tensors": (Gguf(tensor_count=HUGE).raw(), rf"announces {HUGE} tensors, more than a file of \d+ bytes holds"),
    "tensors below zero": (Gguf(tensor_count=-1).raw(), rf"announces {2**64 - 1} tensors"),
    "keys": (Gguf(key_count=HUGE).raw(), rf"announces {HUGE} keys, more than a file of \d+ bytes holds"),
    "one key too many": (Gguf(key_count=5).raw(), "which|should take|is of type"),
    "one tensor too many": (Gguf(tensor_count=3).raw(), "tensor 2"),
    "too many tensors": (
        Gguf(tensor_count=1 << 17, data=bytes(1 << 22)).raw(),
        "announces 131072 tensors, expected at most 65536",
    ),
    "key length": (
        replace(Gguf(), keys=((b"", b""),)).raw()[:24] + struct.pack("<Q", HUGE) + bytes(64),
        f"{HUGE} bytes",
    ),
    "key too long": (with_key("k" * 65536, u32(1)).raw(), "key 4, at byte .* is 65536 bytes long, expected 1 to 65535"),
    "empty key": (with_key("", u32(1)).raw(), "key 4, at byte .* is 0 bytes long"),
    "key not UTF-8": (with_key(b"k\xff", u32(1)).raw(), r"key 4, at byte .* is not UTF-8: b'k\\xff'"),
    "key twice": (with_key("llama.block_count", u32(1)).raw(), "key 'llama.block_count' is there twice"),
    "text length": (with_key("k", string("x", HUGE)).raw(), rf"value of key 'k' should take {HUGE} bytes"),
    "text in array": (with_key("k", array(STRING, 1, text("x", HUGE))).raw(), rf"key 'k' should take {HUGE} bytes"),
    "array length": (with_key("k", array(U32, HUGE, b"")).raw(), rf"key 'k' should take {4 * HUGE} bytes"),
    "texts": (with_key("k", array(STRING, HUGE, b"")).raw(), rf"key 'k' should take {8 * HUGE} bytes"),
    "array of arrays": (with_key("k", array(ARRAY, 1, array(U8, 1, b"x"))).raw(), "key 'k' is an array of arrays"),
    "array of unknown": (with_key("k", array(13, 1, b"xxxx")).raw(), "key 'k' is of type 13, expected"),
    "unknown value": (with_key("k", struct.pack("<ii", 77, 1)).raw(), "key 'k' is of type 77, expected"),
    "value below zero": (with_key("k", struct.pack("<ii", -1, 1)).raw(), "key 'k' is of type -1, expected"),
    "alignment 0": (with_key("general.alignment", u32(0)).raw(), "general.alignment is 0, expected a power of two"),
    "alignment 24": (with_key("general.alignment", u32(24)).raw(), "general.alignment is 24, expected a power of two"),
    "alignment type": (
        with_key("general.alignment", struct.pack("<iQ", 10, 32)).raw(),
        "general.alignment is of type u64, expected u32",
    ),
    "alignment list": (
        with_key("general.alignment", array(U32, 1, struct.pack("<I", 32))).raw(),
        r"general.alignment is of type u32\[\], expected u32",
    ),
    "name of 64": (
        with_tensor(name="n" * 64).raw(),
        "name of tensor 1, at byte .* 64 bytes long, expected 1 to 63.*nnn",
    ),
    "long name in bytes": (with_tensor(name="é" * 32).raw(), "is 64 bytes long"),
    "empty name": (with_tensor(name="").raw(), "name of tensor 1, at byte .* is 0 bytes long"),
    "name length": (with_tensor(length=HUGE).raw(), rf"the name of tensor 1 should take {HUGE} bytes"),
    "name not UTF-8": (with_tensor(name=b"\xc3(").raw(), "name of tensor 1, at byte .* is not UTF-8"),
    "name twice": (with_tensor(name="token_embd.weight").raw(), "tensor 'token_embd.weight' is there twice"),
    "5 dimensions": (with_tensor(dims=(32, 1, 1, 1, 1)).raw(), "'output.weight' has 5 dimensions, expected at most 4"),
    "dimensions": (with_tensor(rank=1 << 31).raw(), f"has {1 << 31} dimensions"),
    "dimension 0": (with_tensor(dims=(32, 0)).raw(), r"'output.weight' has shape \[0, 32\], expected dimensions of at"),
    "negative": (with_tensor(dims=(32, -1)).raw(), r"'output.weight' has shape \[-1, 32\], expected dimensions"),
    "overflow": (with_tensor(dims=(1 << 32, 1 << 32)).raw(), "more elements than a file can hold"),
    "bytes overflow": (with_tensor(dims=(1 << 62, 1), type=28).raw(), f"ends at byte {(1 << 65) + 64 + 352}"),
    "type 43": (with_tensor(type=43).raw(), r"'output.weight' is of type 43, .* \(0 to 42\)"),
    "type 4, removed": (with_tensor(type=4).raw(), "'output.weight' is of type 4,"),
    "type 137 of another program": (with_tensor(type=137).raw(), "'output.weight' is of type 137,"),
    "type below zero": (with_tensor(type=-1).raw(), "'output.weight' is of type -1,"),
    "no whole blocks": (
        with_tensor(dims=(48, 1)).raw(),
        "is Q8_0 with rows of 48, expected a multiple of its block of 32",
    ),
    "no whole super-blocks": (with_tensor(dims=(128, 2), type=12).raw(), "is Q4_K with rows of 128, .* of 256"),
    "scalar of blocks": (with_tensor(dims=()).raw(), "is Q8_0 with rows of 1,"),
    "offset past the end": (with_tensor(offset=1 << 40).raw(), f"begins at byte {1 << 40} .* which has 480 bytes"),
    "offset near overflow": (with_tensor(offset=2**64 - 32).raw(), f"begins at byte {2**64 - 32}"),
    "unaligned": (
        with_tensor(offset=65).raw(),
        "begins at byte 65 of the data, expected a multiple of the alignment, 32",
    ),
    "overlap": (with_tensor(offset=32).raw(), "begins at byte 32 of the data and overlaps .*, expected byte 64"),
    "same place": (with_tensor(offset=0).raw(), "begins at byte 0 of the data and overlaps"),
    "hole": (
        replace(with_tensor(offset=96), data=bytes(160)).raw(),
        "'output.weight' .* leaves a hole .*expected byte 64",
    ),
    "data cut": (
        Gguf().raw()[:-40],
        "'output.weight' begins at byte 64 .* which has 440 bytes\nhint: the file is damaged",
    ),
    "no data": (Gguf(data=b"").raw(), "'token_embd.weight' begins at byte 0"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name(kind: str, tmp_path: Path) -> None:
    """Each kind of damage is one message that names the file and what is wrong, and a hint."""
    raw, message = REFUSED[kind]
    path = tmp_path / "some.gguf"
    path.write_bytes(raw)
    with pytest.raises(UserError, match=message) as caught:
        read_gguf(path)
    first, hint = str(caught.value).split("\n")
    assert first.startswith(f"{path}: ")
    assert hint.startswith("hint: ")


def test_cut_anywhere() -> None:
    """A file cut at any byte before the end of its last tensor is refused, and says how."""
    raw = Gguf().raw()
    for length in range(len(raw) - 30):
        with pytest.raises(UserError, match=r"some\.gguf: .*(should take|announces|ends at|begins|empty).*\nhint: "):
            parse(raw[:length])


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a file"):
        read_gguf(tmp_path)
    with pytest.raises(UserError, match="No such file"):
        read_gguf(tmp_path / "x.gguf")


def test_no_large_allocation_before_the_header_is_judged(tmp_path: Path) -> None:
    """Files that really have the bytes they announce: 512 MiB of one value, of empty texts, of keys, of a name."""
    many = b"".join(text(f"{i:04}" + "k" * 65531) + u32(0) for i in range(1200))
    cases = {
        "goes on beyond byte 100000000, at the value of key 'k'": with_key("k", array(U8, 1 << 29, b"")).raw(),
        "goes on beyond byte 100000000, at the value of key 't'": with_key("t", array(STRING, 1 << 26, b"")).raw(),
        "goes on beyond byte 100000000, at the value of key 's'": with_key("s", string("", 1 << 29)).raw(),
        "keys and names take more than": replace(Gguf(), key_count=1200).raw()[:24] + many,
        "goes on beyond byte 100000000, at the name of tensor 1": with_tensor(length=1 << 28).raw(),
        "announces 1048576 tensors, expected at most 65536": Gguf(tensor_count=1 << 20).raw(),
        "tensor 'x' begins at byte 7 of the data": replace(
            with_key("k", array(U8, 90 << 20, bytes(90 << 20))), tensors=(Entry("x", offset=7),)
        ).raw(),
    }
    for kind, raw in cases.items():
        path = tmp_path / "x.gguf"
        with path.open("wb") as file:
            file.write(raw)
            file.truncate(1 << 30)
        tracemalloc.start()
        try:
            with pytest.raises(UserError, match=kind):
                read_gguf(path)
            assert tracemalloc.get_traced_memory()[1] < 64 << 20, kind
        finally:
            tracemalloc.stop()


def test_most_tensors_and_keys_stay_small() -> None:
    """As many tensors and keys as a file may have, the last of them wrong."""
    keys = b"".join(text(f"{i:0480}") + u32(i) for i in range(1 << 14))
    tail = struct.pack("<IQQi", 2, 8, 1, 0)
    tensors = b"".join(text(f"{i}") + tail + struct.pack("<Q", 32 * i) for i in range((1 << 16) - 1))
    raw = b"GGUF" + struct.pack("<IQQ", 3, 1 << 16, 1 << 14) + keys + tensors + Entry("last", (8, 1), 43).raw()
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="'last' is of type 43"):
            parse(raw)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


# Headers with fields from the edges of what a number can be, mixed with sound ones.
EDGES = st.sampled_from(
    [0, 1, 2, 31, 32, 33, 63, 64, 255, 256, 1 << 31, (1 << 32) - 1, HUGE, (1 << 63) - 1, 1 << 63, -1]
)
NAMES = st.one_of(st.text(max_size=8), st.binary(max_size=70), st.sampled_from(["x", "y", "output.weight"]))
LENGTHS = st.one_of(st.none(), st.none(), st.none(), EDGES.map(lambda n: n % 2**64))
VALUES = st.one_of(
    st.builds(string, NAMES, LENGTHS),
    st.integers(0, 2**32 - 1).map(u32),
    st.sampled_from([32, 64, 8, 1, 0, 24]).map(u32),
    st.builds(array, st.integers(-1, 14), EDGES.map(lambda n: n % 2**64), st.binary(max_size=40)),
    st.builds(lambda kind, n: array(kind, n, bytes(8 * n)), st.integers(0, 12), st.integers(0, 9)),
    st.builds(lambda kind, raw: struct.pack("<i", kind) + raw, st.integers(-2, 20), st.binary(max_size=16)),
)
KEYS = st.one_of(NAMES, st.sampled_from(["general.alignment", "general.architecture", "split.count"]))
ENTRIES = st.builds(
    Entry,
    name=NAMES,
    dims=st.lists(st.one_of(EDGES, st.sampled_from([32, 256, 512])), max_size=5).map(tuple),
    type=st.one_of(st.integers(0, 44), st.sampled_from([-1, 137, 1 << 30])),
    offset=st.one_of(st.sampled_from([0, 32, 64, 128, 2048]), EDGES),
    rank=st.one_of(st.none(), st.none(), st.none(), st.sampled_from([0, 1, 4, 5, (1 << 32) - 1])),
    length=LENGTHS,
)
SOUND = st.sampled_from([3] * 30)
FILES = st.builds(
    Gguf,
    keys=st.lists(st.tuples(KEYS, VALUES), max_size=4).map(tuple),
    tensors=st.one_of(st.just(Gguf().tensors), st.lists(ENTRIES, max_size=3).map(tuple)),
    data=st.sampled_from([bytes(128), b"", bytes(4096)]),
    version=st.one_of(SOUND, EDGES.map(lambda n: n % 2**32)),
    order=st.sampled_from(["<"] * 20 + [">"]),
    key_count=st.one_of(st.none(), st.none(), st.none(), EDGES),
    tensor_count=st.one_of(st.none(), st.none(), st.none(), EDGES),
)
FILES_EACH = 40  # drawn by hypothesis are one header and a seed; each gives so many files


def judge(raw: bytes) -> bool:
    """Whether the file is taken; refused or taken, it fits in memory, and what is taken adds up."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        file = parse(raw)
    except UserError as error:
        assert str(error).startswith("some.gguf: ")  # noqa: PT017
        assert str(error).count("\nhint: ") == str(error).count("\n") == 1  # noqa: PT017
        return False
    finally:
        assert tracemalloc.get_traced_memory()[1] - before < 8 << 20
    end = 0
    for tensor in file.tensors.values():
        assert end <= tensor.start <= tensor.start + tensor.nbytes <= len(raw)
        assert tensor.start % file.alignment == 0
        end = tensor.start + tensor.nbytes
    return True


def damage(raw: bytes, draw: random.Random) -> bytes:
    """The file with up to three places overwritten, bytes put in or left out, perhaps cut."""
    damaged = bytearray(raw)
    for _ in range(draw.randint(1, 3)):
        new = draw.choice([draw.randbytes(draw.randint(1, 9)), bytes(8), b"\xff" * 8, bytes([draw.randint(0, 15)])])
        start = draw.randrange(len(damaged))
        damaged[start : start + draw.choice([0, 1, len(new), len(new)])] = new
    return bytes(damaged[: draw.choice([None, None, None, draw.randrange(len(damaged))])])


def test_fuzz_headers() -> None:
    """6,000 headers, made of edge values or damaged byte by byte: a UserError or a file that adds up, nothing else."""
    files = taken = 0

    @settings(max_examples=150, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(FILES, st.integers(0, 2**32 - 1))
    def fuzz(file: Gguf, seed: int) -> None:
        nonlocal files, taken
        draw, sound = random.Random(seed), with_key("general.alignment", u32(32)).raw()
        made = [file.raw(), *(damage(draw.choice([file.raw(), sound, sound]), draw) for _ in range(FILES_EACH - 1))]
        tracemalloc.start()
        try:
            taken += sum(map(judge, made))
        finally:
            tracemalloc.stop()
        files += len(made)

    fuzz()
    assert files >= 5000
    assert 200 < taken < files // 2, "the files were nearly all sound, or nearly all refused at once"


def shards(folder: Path, count: int = 3) -> list[Path]:
    """A whole set of shards with one tensor each; all keys in the first."""
    paths = []
    for i in range(count):
        split = (
            ("split.no", struct.pack("<iH", U16, i)),
            ("split.count", struct.pack("<iH", U16, count)),
            ("split.tensors.count", struct.pack("<ii", I32, count)),
        )
        keys = (*Gguf().keys, *split) if i == 0 else split
        paths.append(folder / f"m-{i + 1:05}-of-{count:05}.gguf")
        paths[-1].write_bytes(Gguf(keys, (Entry(f"t{i}"),), bytes(64)).raw())
    return paths


def rewrite(path: Path, number: int, count: int, total: int, name: str = "t1", kind: int = U16) -> None:
    keys = [("split.no", number), ("split.count", count)]
    raw = tuple((key, struct.pack("<iH" if kind == U16 else "<iI", kind, value)) for key, value in keys)
    total_key = ("split.tensors.count", struct.pack("<ii", I32, total))
    path.write_bytes(Gguf((*raw, total_key), (Entry(name),), bytes(64)).raw())


def test_shards_are_one_model(tmp_path: Path) -> None:
    paths = shards(tmp_path)
    for path in paths:
        file = open_gguf(path)
        assert file.path == paths[0]
        assert file.metadata["general.architecture"] == "llama"
        assert [(t.name, t.path) for t in file.tensors.values()] == [(f"t{i}", paths[i]) for i in range(3)]
    assert list(read_gguf(paths[1]).tensors) == ["t1"]


def test_shard_missing(tmp_path: Path) -> None:
    paths = shards(tmp_path)
    paths[1].unlink()
    for path in (paths[0], paths[2]):
        with pytest.raises(UserError, match=r"m-00002-of-00003\.gguf: missing, expected all 3 shards"):
            open_gguf(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"number": 2}, r"m-00002.*shard 3 of 3 of a model with 3 tensors, expected shard 2 of 3 .* with 3 tensors"),
        ({"count": 4}, r"m-00002.*shard 2 of 4 of a model with 3 tensors, expected shard 2 of 3"),
        ({"total": 9}, r"m-00002.*shard 2 of 3 of a model with 9 tensors, expected shard 2 of 3 .* with 3 tensors"),
        ({"name": "t0"}, r"m-00002.*'t0' is in m-00001-of-00003\.gguf too"),
        ({"kind": U32}, r"m-00002.*split\.no of a shard is u32, expected u16"),
        ({"number": 3}, r"m-00002.*split\.no is 3 and split\.count 3"),
    ],
)
def test_shard_of_another_set(tmp_path: Path, change: dict, message: str) -> None:
    paths = shards(tmp_path)
    rewrite(paths[1], **{"number": 1, "count": 3, "total": 3, **change})
    for path in (paths[0], paths[2]):
        with pytest.raises(UserError, match=message) as caught:
            open_gguf(path)
        assert "\nhint: " in str(caught.value)


def test_shard_without_its_keys(tmp_path: Path) -> None:
    paths = shards(tmp_path)
    paths[2].write_bytes(Gguf((), (Entry("t2"),), bytes(64)).raw())
    with pytest.raises(UserError, match=r"m-00003.*split\.no of a shard is missing, expected u16"):
        open_gguf(paths[0])


def test_shards_with_too_few_tensors(tmp_path: Path) -> None:
    for i, path in enumerate(shards(tmp_path)):
        raw = path.read_bytes().replace(struct.pack("<ii", I32, 3), struct.pack("<ii", I32, 4))
        path.write_bytes(raw)
        assert read_gguf(path).metadata["split.tensors.count"] == 4, i
    with pytest.raises(UserError, match="hold 3 tensors, expected 4"):
        open_gguf(path)


def test_shard_by_another_name(tmp_path: Path) -> None:
    path = shards(tmp_path)[0].rename(tmp_path / "model.gguf")
    with pytest.raises(UserError, match=r"shard 1 of 3 by its keys, expected a file name NAME-00001-of-00003\.gguf"):
        open_gguf(path)
    path = shards(tmp_path)[1].rename(tmp_path / "m-00001-of-00003.gguf")
    with pytest.raises(UserError, match=r"shard 2 of 3 by its keys, expected a file name NAME-00002-of-00003"):
        open_gguf(path)


def test_what_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(Gguf(keys=(("general.type", string("imatrix")),)).raw())
    assert read_gguf(path).metadata == {"general.type": "imatrix"}
    with pytest.raises(UserError, match=r"general\.architecture.*general\.type is 'imatrix'"):
        open_gguf(path)
    for value in (u32(1), array(BOOL, 1, b"\1"), array(F32, 0, b"")):
        path.write_bytes(Gguf(keys=(("general.architecture", value),)).raw())
        with pytest.raises(UserError, match=r"not a model: it has no key `general\.architecture`"):
            open_gguf(path)
