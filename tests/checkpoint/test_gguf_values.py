"""NaN and Inf in a GGUF file: found in every type that can hold them, and nowhere else."""

from pathlib import Path

import numpy as np
import pytest

from quantkit.checkpoint import gguf_values
from quantkit.checkpoint.gguf_file import open_gguf
from quantkit.checkpoint.gguf_values import BadValues, check_values
from quantkit.checkpoint.gguf_writer import GgufLayout, GgufWriter
from quantkit.ggml_types import GGML_TYPES

NAN, INF, LARGEST = b"\x01\x7e", b"\x00\xfc", b"\xff\x7b"
# Where the f16 scales of a block lie, from ggml-common.h.
SCALES = {
    **{name: (0,) for name in ("F16", "Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS", "Q1_0", "Q2_0", "IQ1_S", "IQ3_S")},
    **{name: (0,) for name in ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")},
    **{name: (0, 2) for name in ("Q4_1", "Q5_1", "Q8_1", "Q4_K", "Q5_K")},
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}
BLOCKS = 24


def write(folder: Path, type_name: str, data: np.ndarray) -> list[BadValues]:
    """Findings of a file with two tensors of one type; the first is zeros."""
    import torch

    type_ = GGML_TYPES[type_name]
    layouts = [GgufLayout(name, type_name, (BLOCKS // 2, 2 * type_.columns)) for name in ("zeros", "x")]
    writer = GgufWriter(folder, {"general.architecture": ("string", "llama")}, layouts, type_.nbytes)
    writer.write_at("x", 0, torch.from_numpy(data.reshape(-1)))
    writer.finish()
    return check_values(open_gguf(writer.paths[0]))


def blocks(type_name: str) -> np.ndarray:
    return np.zeros((BLOCKS, GGML_TYPES[type_name].nbytes), np.uint8)


@pytest.mark.parametrize("type_name", SCALES)
def test_scales(type_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_values, "PART", 5 * GGML_TYPES[type_name].nbytes + 1)  # parts that cut the tensor unevenly
    sound = blocks(type_name)
    sound[:] = 0xFF  # codes and everything else may be anything
    for start in SCALES[type_name]:
        sound[:, start : start + 2] = list(LARGEST)
    assert write(tmp_path / "sound", type_name, sound) == []
    what = "NaN or Inf values" if type_name == "F16" else "NaN or Inf scales"
    for start in SCALES[type_name]:
        for bad in (NAN, INF):
            damaged = sound.copy()
            damaged[[17, 23], start : start + 2] = list(bad)
            found = write(tmp_path / f"{start}{bad.hex()}", type_name, damaged)
            assert found == [BadValues("x", type_name, what, 2, BLOCKS, 17)]


@pytest.mark.parametrize(
    ("type_name", "dtype", "bad"),
    [("F32", "<f4", np.nan), ("F32", "<f4", -np.inf), ("F64", "<f8", np.nan), ("F64", "<f8", np.inf)],
)
def test_floats(type_name: str, dtype: str, bad: float, tmp_path: Path) -> None:
    values = np.full(BLOCKS, np.finfo(dtype).max, dtype)
    assert write(tmp_path / "sound", type_name, values.view(np.uint8)) == []
    values[3] = bad
    found = write(tmp_path / "bad", type_name, values.view(np.uint8))
    assert found == [BadValues("x", type_name, "NaN or Inf values", 1, BLOCKS, 3)]


@pytest.mark.parametrize(
    ("type_name", "start", "bad", "sound"),
    [
        ("BF16", 0, b"\x80\x7f", b"\x7f\x7f"),
        ("BF16", 0, b"\x81\xff", b"\x7f\xff"),
        ("MXFP4", 0, b"\xff", b"\xfe"),
        ("Q8_K", 0, b"\x00\x00\xc0\x7f", b"\xff\xff\x7f\x7f"),
        # 0x7c00 and 0x7bff, four bits in the top of each of four words
        ("IQ1_M", 48, b"\x00\x00\x00\x00\x00\xc0\x00\x70", b"\x00\xf0\x00\xf0\x00\xb0\x00\x70"),
    ],
)
def test_other_scales(type_name: str, start: int, bad: bytes, sound: bytes, tmp_path: Path) -> None:
    data = blocks(type_name)
    data[5, start : start + len(sound)] = list(sound)
    assert write(tmp_path / "sound", type_name, data) == []
    data[5, start : start + len(bad)] = list(bad)
    (found,) = write(tmp_path / "bad", type_name, data)
    assert (found.count, found.first, found.blocks) == (1, 5, BLOCKS)


@pytest.mark.parametrize("type_name", ["I8", "I16", "I32", "I64", "NVFP4"])
def test_types_that_cannot(type_name: str, tmp_path: Path) -> None:
    data = blocks(type_name)
    data[:] = 0xFF
    assert write(tmp_path, type_name, data) == []


def test_every_type_has_its_rule() -> None:
    for type_name in GGML_TYPES:
        if type_name not in ("I8", "I16", "I32", "I64", "NVFP4"):
            assert not gguf_values._bad(blocks(type_name), type_name).any()
