"""What inspect says of GGUF files whose every figure is known beforehand."""

import json
from pathlib import Path

import pytest
from gguf import GGUFReader
from typer.testing import CliRunner

import quantkit
from quantkit.cli.main import app
from tests.tiny_gguf import BLOCKS, EMBED, FF, HEAD, HEADS, KV_HEADS, tiny

MATRICES = BLOCKS * (EMBED * HEAD * (2 * HEADS + 2 * KV_HEADS) + 3 * EMBED * FF) + 2 * 264 * EMBED
VECTORS = EMBED * (2 * BLOCKS + 1)


def test_types_and_sizes(tmp_path: Path) -> None:
    model = tiny("llama", "Q8_0")
    model.types |= {f"blk.{i}.ffn_down.weight": "Q4_0" for i in range(BLOCKS)}
    path = model.save(tmp_path / "m.gguf")
    found = quantkit.inspect(path)
    json.dumps(found)
    assert (found["format"], found["architecture"], found["mix"]) == ("gguf", "llama", "Q8_0")
    assert (found["file_type"], found["version"], found["alignment"], found["name"]) == (7, 3, 32, "tiny")
    down = BLOCKS * EMBED * FF
    assert found["types"] == {
        "Q8_0": {
            "tensors": 6 * BLOCKS + 2,
            "weights": MATRICES - down,
            "bytes": (MATRICES - down) // 32 * 34,
            "bits_per_weight": 8.5,
        },
        "Q4_0": {"tensors": BLOCKS, "weights": down, "bytes": down // 32 * 18, "bits_per_weight": 4.5},
        "F32": {"tensors": 2 * BLOCKS + 1, "weights": VECTORS, "bytes": 4 * VECTORS, "bits_per_weight": 32.0},
    }
    rounded = (MATRICES - down) // 32 * 34 + down // 32 * 18
    assert found["bytes"] == rounded + 4 * VECTORS
    assert found["parameters"] == MATRICES + VECTORS
    assert found["bits_per_weight"]["quantized"] == pytest.approx(8 * rounded / MATRICES)
    assert found["bits_per_weight"]["model"] == pytest.approx(8 * found["bytes"] / found["parameters"])
    theirs = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    assert list(found["tensors"]) == list(theirs)
    for name, entry in found["tensors"].items():
        assert entry["type"] == theirs[name].tensor_type.name
        assert entry["shape"] == [int(n) for n in reversed(theirs[name].shape)]
        assert entry["bytes"] == theirs[name].n_bytes
    assert found["shards"] == [{"file": "m.gguf", "bytes": path.stat().st_size, "tensors": len(theirs)}]
    assert found["odd"] == []


def test_keys_are_shortened(tmp_path: Path) -> None:
    model = tiny()
    model.metadata["tokenizer.chat_template"] = ("STRING", "x" * 5000)
    keys = quantkit.inspect(model.save(tmp_path / "m.gguf"))["keys"]
    assert keys["llama.context_length"] == 256
    assert keys["tokenizer.ggml.tokens"] == {"length": 264, "first": ["!", '"', "#", "$"]}
    assert keys["tokenizer.ggml.merges"] == ["t h", "th e"]
    assert keys["tokenizer.chat_template"] == "x" * 200 + "... (5000 characters)"


ODD = {
    "gguf-pre": lambda g: g.metadata.pop("tokenizer.ggml.pre"),
    "gguf-template": lambda g: g.metadata.pop("tokenizer.chat_template"),
    "gguf-origin": lambda g: g.metadata.pop("quantkit.recipe"),
    "gguf-file-type": lambda g: g.metadata.update({"general.file_type": ("UINT32", 15)}),
    "gguf-tensor-missing": lambda g: g.tensors.pop("output_norm.weight"),
}


@pytest.mark.parametrize("rule", ODD)
def test_what_is_odd(tmp_path: Path, rule: str) -> None:
    model = tiny()
    ODD[rule](model)
    path = model.save(tmp_path / "m.gguf")
    (odd,) = [entry for entry in quantkit.inspect(path)["odd"] if entry["rule"] != "gguf-rows"]
    assert odd["rule"] == rule
    shown = CliRunner().invoke(app, ["inspect", str(path)]).output
    assert f"odd: {odd['where']}: {odd['message']}" in shown or f"odd: {odd['message']}" in shown


def test_an_imatrix_says_how_it_was_made(tmp_path: Path) -> None:
    model = tiny()
    del model.metadata["quantkit.recipe"]
    model.metadata["quantize.imatrix.file"] = ("STRING", "i.gguf")
    assert quantkit.inspect(model.save(tmp_path / "m.gguf"))["odd"] == []


def test_the_table(tmp_path: Path) -> None:
    path = tiny("qwen3moe", "Q8_0").save(tmp_path / "m.gguf")
    result = CliRunner().invoke(app, ["inspect", str(path)])
    assert result.exit_code == 0, result.output
    for words in (
        "qwen3moe, GGUF v3, Q8_0",
        "8.500 bits per quantized weight",
        "blk.*.ffn_up_exps.weight",
        "264 entries",
    ):
        assert words in result.output
    printed = json.loads(CliRunner().invoke(app, ["inspect", str(path), "--json"]).output)
    assert printed == quantkit.inspect(path)
