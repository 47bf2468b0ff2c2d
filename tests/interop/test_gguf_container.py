"""llama.cpp's own loader takes the files that the writer makes, in one part and in many, and refuses what we refuse."""

import ctypes
import math
import random
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantkit.checkpoint.gguf_file import open_gguf, read_gguf
from quantkit.checkpoint.gguf_values import check_values
from quantkit.checkpoint.gguf_writer import GgufLayout, GgufWriter, KeyValue
from quantkit.errors import UserError
from tests.checkpoint.gguf_bytes import Gguf, u32, with_key
from tests.checkpoint.test_gguf_file import REFUSED, damage
from tests.interop.gguf_support import binding, tool

pytestmark = pytest.mark.interop
METADATA: dict[str, KeyValue] = {
    "general.architecture": ("string", "llama"),
    "general.file_type": ("u32", 0),
    "llama.context_length": ("u32", 64),
    "llama.embedding_length": ("u32", 64),
    "llama.block_count": ("u32", 2),
    "llama.feed_forward_length": ("u32", 96),
    "llama.attention.head_count": ("u32", 4),
    "llama.attention.layer_norm_rms_epsilon": ("f32", 1e-5),
    "llama.vocab_size": ("u32", 40),
    "tokenizer.ggml.model": ("string", "none"),
    "quantkit.texts": ("string[]", ["a", "é", ""]),
}


def model_layouts() -> list[GgufLayout]:
    shapes = {"token_embd": (40, 64), "output_norm": (64,), "output": (40, 64)}
    for i in range(2):
        block = {"attn_norm": (64,), "ffn_norm": (64,), "ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}
        block |= {f"attn_{part}": (64, 64) for part in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    types = {"ffn_up": "Q4_0", "ffn_gate": "Q8_0", "attn_q": "F16", "attn_k": "BF16", "output": "Q2_0"}
    return [
        GgufLayout(f"{name}.weight", types.get(name.split(".")[-1], "F32"), shape) for name, shape in shapes.items()
    ]


def write_model(folder: Path, max_shard_bytes: int, alignment: int | None = None) -> list[Path]:
    metadata = METADATA | ({} if alignment is None else {"general.alignment": ("u32", alignment)})
    writer = GgufWriter(folder, metadata, model_layouts(), max_shard_bytes)
    for name, layout in writer.layouts.items():
        if layout.type == "F32":
            values = torch.full(layout.shape, 0.02).contiguous().view(torch.uint8)
            writer.write_at(name, 0, values.flatten())
    writer.finish()
    return writer.paths


@pytest.mark.parametrize(("most", "alignment"), [(1 << 30, None), (20000, None), (20000, 64), (1, None)])
def test_llama_quantize_reads_it(tmp_path: Path, most: int, alignment: int | None) -> None:
    """llama-quantize's dry run lists every tensor with our types and shapes, whatever shard it lies in."""
    paths = write_model(tmp_path, most, alignment)
    assert (len(paths) > 1) == (most < 1 << 30)
    command = [str(tool("llama-quantize")), "--dry-run", "--allow-requantize", str(paths[0]), "q4_0"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    output = run.stdout + run.stderr
    for layout in model_layouts():
        (line,) = [line for line in output.splitlines() if f" {layout.name} " in line and "[" in line][-1:]
        assert layout.type.lower() in line.lower(), line
        sizes = line.split("[")[2].split("]")[0].replace(",", " ").split()
        assert [int(n) for n in sizes if n != "1"] == list(reversed(layout.shape)), line


def parameters(path: Path) -> int | None:
    """Parameters of the model as libllama loads it, every value checked; None where it does not."""
    llama_cpp = binding()
    llama_cpp.llama_backend_init()
    options = llama_cpp.llama_model_default_params()
    options.check_tensors = True
    options.use_extra_bufts = False  # values as they are in the file
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
    if not model:
        return None
    try:
        return llama_cpp.llama_model_n_params(model)
    finally:
        llama_cpp.llama_model_free(model)


@pytest.mark.parametrize("most", [1 << 30, 20000, 1])
def test_libllama_loads_it(tmp_path: Path, most: int) -> None:
    paths = write_model(tmp_path, most)
    assert parameters(paths[0]) == sum(math.prod(layout.shape) for layout in model_layouts())
    if len(paths) > 1:
        paths[1].unlink()
        assert parameters(paths[0]) is None


def ggml_takes(path: Path) -> bool:
    """Whether ggml's own header reader takes the file."""
    base = next(tool("llama-quantize").parent.glob("libggml-base.so*"), None)
    if base is None:
        pytest.skip("no libggml-base beside llama-quantize")
    library = ctypes.CDLL(str(base))

    class Params(ctypes.Structure):
        _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))

    library.gguf_init_from_file.restype = ctypes.c_void_p
    library.gguf_init_from_file.argtypes = [ctypes.c_char_p, Params]
    library.gguf_free.argtypes = [ctypes.c_void_p]
    found = library.gguf_init_from_file(str(path).encode(), Params(True, None))
    if found:
        library.gguf_free(found)
    return bool(found)


# What ggml's header reader takes and we do not: old files, and what its loader or its users trip over later.
STRICTER = {"version 2", "key too long", "key not UTF-8", "empty name", "name not UTF-8", "dimension 0", "no data"}
STRICTER |= {"data cut"}  # the data is looked at by the loader


@pytest.mark.parametrize("kind", REFUSED)
def test_ggml_refuses_what_we_refuse(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(REFUSED[kind][0])
    with pytest.raises(UserError):
        read_gguf(path)
    assert ggml_takes(path) == (kind in STRICTER)


@pytest.mark.parametrize("alignment", [1, 8, 32, 4096])
def test_ggml_takes_what_we_take(alignment: int, tmp_path: Path) -> None:
    paths = write_model(tmp_path, 20000, alignment)
    assert all(map(ggml_takes, paths))
    assert len(open_gguf(paths[-1]).tensors) == len(model_layouts())
    path = tmp_path / "sound.gguf"
    path.write_bytes(Gguf().raw())
    assert ggml_takes(path)
    path.write_bytes(replace(Gguf(), magic=bytes(4)).raw())
    assert not ggml_takes(path)


def test_ggml_takes_the_damaged_files_that_we_take(tmp_path: Path) -> None:
    """Damage that leaves a file readable leaves it so for both."""
    draw, path, taken = random.Random(0), tmp_path / "x.gguf", 0
    sound = with_key("general.alignment", u32(32)).raw()
    for _ in range(600):
        path.write_bytes(damage(sound, draw))
        try:
            read_gguf(path)
        except UserError:
            continue
        taken += 1
        assert ggml_takes(path), path.read_bytes()
    assert taken > 50


def test_an_unfinished_file_is_none_for_llama_cpp(tmp_path: Path) -> None:
    GgufWriter(tmp_path, METADATA, model_layouts(), 1 << 30).close()
    assert not ggml_takes(tmp_path / "model.gguf")


def test_check_tensors_agrees(tmp_path: Path) -> None:
    """llama.cpp's own check of the values refuses the files in which we find NaN scales, and no others."""
    for value, sound in ((struct.pack("<e", 1.0), True), (struct.pack("<e", float("nan")), False)):
        (path,) = write_model(tmp_path / str(sound), 1 << 30)
        tensor = read_gguf(path).tensors["blk.1.ffn_up.weight"]
        with path.open("r+b") as file:
            file.seek(tensor.start + 18 * 100)
            file.write(value)
        assert [bad.tensor for bad in check_values(open_gguf(path))] == ([] if sound else ["blk.1.ffn_up.weight"])
        assert (parameters(path) is not None) == sound
