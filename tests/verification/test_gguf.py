"""What verify and inspect say of GGUF files: sound ones of each architecture, and each fault alone."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import quantkit
from quantkit.cli.main import app
from quantkit.errors import UserError
from quantkit.verification import ENGINES, verify_folder
from tests.tiny_gguf import ARCHITECTURES, BLOCKS, Gguf, tiny

Change = Callable[[Gguf], Any]


def found(path: Path, engine: str = "llama.cpp") -> dict[str, str]:
    """Rule -> level of the findings that are worth more than a word."""
    return {f.rule: f.level for f in verify_folder(path, engine).findings if f.level != "info"}


@pytest.mark.parametrize("type_", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sound_files_load(tmp_path: Path, name: str, type_: str) -> None:
    numbers = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2, "Q5_1": 9}
    path = tiny(name, type_, numbers[type_]).save(tmp_path / "m.gguf")
    result = verify_folder(path, "llama.cpp")
    assert (result.verdict, result.findings) == ("loads", [])
    assert result.hardware["CPU"] == "yes"


def put(key: str, kind: str, value: Any) -> Change:
    return lambda g: g.metadata.update({key: (kind, value)})


def drop(*keys: str) -> Change:
    return lambda g: [g.metadata.pop(key) for key in keys]


def tensor(name: str, *shape: int) -> Change:
    return lambda g: g.tensors.update({name: np.zeros(shape, np.float32)})


def without(*names: str) -> Change:
    return lambda g: [g.tensors.pop(name) for name in names]


def typed(type_: str, *names: str) -> Change:
    return lambda g: g.types.update(dict.fromkeys(names, type_))


GATES = tuple(f"blk.{i}.ffn_gate_inp.weight" for i in range(BLOCKS))
# The change, architecture, rule and level, words of the message.
FAULTS: dict[str, tuple[Change, str, str, str, str]] = {
    "no context": (drop("llama.context_length"), "llama", "gguf-key", "error", "required and missing"),
    "no blocks": (drop("qwen3.block_count"), "qwen3", "gguf-key", "error", "required and missing"),
    "no epsilon": (drop("llama.attention.layer_norm_rms_epsilon"), "llama", "gguf-key", "error", "missing"),
    "no experts": (drop("qwen3moe.expert_used_count"), "qwen3moe", "gguf-key", "error", "missing"),
    "kind": (put("llama.context_length", "INT32", 256), "llama", "gguf-key", "error", "i32, and is read as u32"),
    "kind of a string": (put("llama.rope.freq_base", "STRING", "x"), "llama", "gguf-key", "error", "read as f32"),
    "zero": (put("llama.embedding_length", "UINT32", 0), "llama", "gguf-key", "error", "it is 0"),
    "no tokenizer": (drop("tokenizer.ggml.model"), "llama", "gguf-key", "error", "missing"),
    "tokenizer": (put("tokenizer.ggml.model", "STRING", "x"), "llama", "gguf-tokenizer", "error", "no kind of"),
    "no tokens": (drop("tokenizer.ggml.tokens"), "llama", "gguf-tokenizer", "error", "no list of tokens"),
    "few types": (put("tokenizer.ggml.token_type", "INT32", [1] * 9), "llama", "gguf-tokenizer", "error", "9 entries"),
    "many types": (put("tokenizer.ggml.token_type", "INT32", [1] * 300), "llama", "gguf-tokenizer", "warning", "300"),
    "few scores": (put("tokenizer.ggml.scores", "FLOAT32", [0.5] * 3), "llama", "gguf-tokenizer", "error", "3 entries"),
    "scores of text": (put("tokenizer.ggml.scores", "STRING", ["x"] * 264), "llama", "gguf-tokenizer", "error", "f32"),
    "twice": (put("tokenizer.ggml.tokens", "STRING", ["a"] * 264), "llama", "gguf-tokenizer", "error", "twice"),
    "no merges": (drop("tokenizer.ggml.merges"), "llama", "gguf-tokenizer", "error", "cannot be merged"),
    "bos": (put("tokenizer.ggml.bos_token_id", "UINT32", 999), "llama", "gguf-tokenizer", "warning", "token 999"),
    "no pre": (drop("tokenizer.ggml.pre"), "llama", "gguf-pre", "warning", "tokens will differ"),
    "empty pre": (put("tokenizer.ggml.pre", "STRING", ""), "qwen2", "gguf-pre", "warning", "tokens will differ"),
    "default pre": (put("tokenizer.ggml.pre", "STRING", "default"), "llama", "gguf-pre", "warning", "default way"),
    "unknown pre": (put("tokenizer.ggml.pre", "STRING", "gpt-9"), "llama", "gguf-pre", "error", "'gpt-9'"),
    "missing": (without("blk.1.ffn_up.weight"), "llama", "gguf-tensor-missing", "error", "needs this tensor"),
    "no norm": (without("output_norm.weight"), "gemma3", "gguf-tensor-missing", "error", "needs this tensor"),
    "no q norm": (without("blk.0.attn_q_norm.weight"), "qwen3", "gguf-tensor-missing", "error", "needs this tensor"),
    "no experts' gate": (without(GATES[0]), "qwen3moe", "gguf-tensor-missing", "error", "needs this tensor"),
    "blocks without end": (
        put("llama.block_count", "UINT32", 1 << 31),
        *("llama", "gguf-tensor-missing", "error", "and this key says 2147483648 blocks"),
    ),
    "vocabulary alone": (
        lambda g: g.tensors.clear(),
        "llama",
        "gguf-tensor-missing",
        "error",
        "the file has 0 tensors",
    ),
    "extra": (tensor("blk.0.extra.weight", 4, 32), "llama", "gguf-tensor-extra", "error", "one too many"),
    "extra gate": (tensor("blk.0.ffn_gate.weight", 128, 64), "phi3", "gguf-tensor-extra", "error", "one too many"),
    "one block more": (tensor("blk.2.attn_norm.weight", 64), "llama", "gguf-tensor-extra", "error", "one too many"),
    "k shape": (tensor("blk.0.attn_k.weight", 64, 64), "llama", "gguf-shape", "error", "64 x 64, and the keys say 32"),
    "qkv shape": (tensor("blk.0.attn_qkv.weight", 96, 64), "phi3", "gguf-shape", "error", "say 128 x 64"),
    "vocabulary": (tensor("token_embd.weight", 100, 64), "llama", "gguf-shape", "error", "100 x 64"),
    "frequencies": (tensor("rope_freqs.weight", 7), "llama", "gguf-shape", "error", "keys say 8"),
    "rope": (put("llama.rope.dimension_count", "UINT32", 8), "llama", "gguf-rope", "error", "rotates all"),
    "float16 norm": (typed("F16", "output_norm.weight"), "llama", "gguf-type", "error", "in F32 alone"),
    "float16 bias": (typed("F16", "blk.0.attn_q.bias"), "qwen2", "gguf-type", "error", "in F32 alone"),
    "no biases": (
        without(*(f"blk.{i}.attn_{p}.bias" for i in range(BLOCKS) for p in "qkv")),
        *("qwen2", "gguf-bias", "warning", "wrong results"),
    ),
    "file type lies": (
        put("general.file_type", "UINT32", 15),
        "llama",
        "gguf-file-type",
        "warning",
        "says Q4_K_M, but",
    ),
    "float file type": (
        put("general.file_type", "UINT32", 0),
        "llama",
        "gguf-file-type",
        "warning",
        "says F32, but 100%",
    ),
    "no mix": (put("general.file_type", "UINT32", 99), "llama", "gguf-file-type", "warning", "the number of no mix"),
    "version": (drop("general.quantization_version"), "llama", "gguf-version", "warning", "not 2"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named(tmp_path: Path, fault: str) -> None:
    change, name, rule, level, words = FAULTS[fault]
    model = tiny(name)
    change(model)
    result = verify_folder(model.save(tmp_path / "m.gguf"), "llama.cpp")
    hits = [f for f in result.findings if f.rule == rule and f.level == level]
    assert any(words in f.message for f in hits), result.findings
    assert all(f.remedy for f in result.findings)
    assert result.verdict == ("refused" if level == "error" else "loads")


HALF_NAN = np.frombuffer(np.float16(np.nan).tobytes(), np.uint8)
# First byte of a scale, bytes of a block, columns of it.
SCALES = {"Q8_0": (0, 34, 32), "Q4_1": (2, 20, 32), "Q4_K": (2, 144, 256), "Q6_K": (208, 210, 256)}
SCALES |= {"Q2_K": (82, 84, 256), "Q3_K": (108, 110, 256), "IQ4_XS": (0, 136, 256), "Q5_K": (0, 176, 256)}


@pytest.mark.parametrize("type_", SCALES)
def test_a_scale_that_is_nan(tmp_path: Path, type_: str) -> None:
    at, size, columns = SCALES[type_]
    blocks = np.zeros((64, max(1, 256 // columns) * size), np.uint8)
    model = tiny()
    model.metadata |= {"llama.feed_forward_length": ("UINT32", 256), "tokenizer.ggml.pre": ("STRING", "gpt-2")}
    for i in range(BLOCKS):
        for part in ("gate", "up"):
            tensor(f"blk.{i}.ffn_{part}.weight", 256, 64)(model)
        model.tensors[f"blk.{i}.ffn_down.weight"] = blocks.copy()
        model.types[f"blk.{i}.ffn_down.weight"] = type_
    assert found(model.save(tmp_path / "sound.gguf")) == {}
    model.tensors["blk.1.ffn_down.weight"][-1, -size:][at : at + 2] = HALF_NAN
    result = verify_folder(model.save(tmp_path / "nan.gguf"), "llama.cpp")
    assert result.verdict == "refused"
    assert [(f.rule, f.where) for f in result.findings if f.level == "error"] == [("gguf-nan", "blk.1.ffn_down.weight")]


def test_a_number_that_is_infinite(tmp_path: Path) -> None:
    model = tiny()
    model.tensors["blk.0.attn_norm.weight"][3] = np.inf
    assert found(model.save(tmp_path / "m.gguf")) == {"gguf-nan": "error"}


def test_rows_that_are_no_multiple_of_256(tmp_path: Path) -> None:
    """A mix of k-quants falls back to blocks of 32 there: that is no lie of the file type."""
    model = tiny("llama", "Q5_0", file_type=15)
    result = verify_folder(model.save(tmp_path / "m.gguf"), "llama.cpp")
    assert [f.rule for f in result.findings] == ["gguf-rows"]
    assert "rows of 64, 128 columns, no multiple of 256" in result.findings[0].message
    assert found(tiny("llama", "Q4_1", file_type=15).save(tmp_path / "lie.gguf")) == {"gguf-file-type": "warning"}


def test_what_engines_say_of_a_sound_file(tmp_path: Path) -> None:
    result = quantkit.verify(tiny().save(tmp_path / "m.gguf"))
    assert result.verdict == "loads"
    assert result.engines is not None
    assert {name: one.verdict for name, one in result.engines.items()} == {
        "vllm": "refused",
        "sglang": "loads",
        "transformers": "loads",
        "llama.cpp": "loads",
        "tensorrt-llm": "refused",
    }
    assert set(result.engines) == set(ENGINES)
    assert "vllm-gguf-plugin" in result.engines["vllm"].findings[0].message


OTHERS: dict[str, tuple[str, Change, str, str, str]] = {
    "head size": ("qwen3", lambda _: None, "transformers", "gguf-config", "takes 128"),
    "experts": ("qwen3moe", lambda _: None, "transformers", "gguf-config", "takes 768"),
    "scaled": (
        "llama",
        tensor("rope_freqs.weight", 8),
        "transformers",
        "gguf-rope-scaling",
        "how positions are scaled",
    ),
    "padding": ("phi3", lambda _: None, "transformers", "gguf-config", "takes 32000, and the embedding has 264 rows"),
    "scale": ("gemma3", lambda _: None, "transformers", "gguf-config", "as for heads of 256 features"),
    "bias": ("llama", tensor("blk.0.attn_q.bias", 64), "transformers", "gguf-bias", "without biases"),
    "architecture": (
        "llama",
        put("general.architecture", "STRING", "plamo3"),
        *("sglang", "gguf-architecture", "no configuration of 'plamo3'"),
    ),
    "no table": (
        "llama",
        put("general.architecture", "STRING", "plamo3"),
        *("llama.cpp", "gguf-architecture", "no table of the keys and tensors of 'plamo3'"),
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_other_engines_do_not_read(tmp_path: Path, case: str) -> None:
    name, change, engine, rule, words = OTHERS[case]
    model = tiny(name)
    change(model)
    result = verify_folder(model.save(tmp_path / "m.gguf"), engine)
    assert any(f.rule == rule and words in f.message for f in result.findings), result.findings
    if case == "no table":
        assert result.verdict == "unknown"


def test_hardware_and_checksums(tmp_path: Path) -> None:
    path = tiny().save(tmp_path / "model.gguf")
    assert verify_folder(path, "sglang", hardware="cpu").verdict == "refused"
    assert verify_folder(path, "llama.cpp", hardware="cpu").verdict == "loads"
    (tmp_path / "quantkit-report.json").write_text(json.dumps({"files": {"model.gguf": "0" * 64}}))
    result = verify_folder(tmp_path, "llama.cpp", checksums=True)
    assert [f.rule for f in result.findings if f.level == "error"] == ["checksum"]


def test_a_folder_means_its_file(tmp_path: Path) -> None:
    tiny().save(tmp_path / "model.gguf")
    (tmp_path / "quantkit-report.json").write_text("{}")
    assert verify_folder(tmp_path, "llama.cpp").verdict == "loads"
    assert quantkit.inspect(tmp_path)["architecture"] == "llama"
    (tmp_path / "mmproj-model.gguf").write_bytes(b"GGUF")
    assert quantkit.verify(tmp_path, "llama.cpp").verdict == "loads"
    (tmp_path / "model.gguf").rename(tmp_path / "a.gguf")
    tiny().save(tmp_path / "b.gguf")
    with pytest.raises(UserError, match=r"2 GGUF files: a.gguf, b.gguf\nhint: give one"):
        quantkit.verify(tmp_path)
    assert verify_folder(tmp_path, "llama.cpp").verdict == "refused"


def test_shards(tmp_path: Path) -> None:
    """Any one of them means all; one that is missing is one message; transformers takes none."""
    tiny().save(tmp_path / "m.gguf", tensors_per_file=8)
    shards = sorted(tmp_path.glob("*.gguf"))
    assert len(shards) == 3
    whole = verify_folder(tiny().save(tmp_path / "whole/m.gguf"), "llama.cpp")
    for path in (*shards, tmp_path):
        assert verify_folder(path, "llama.cpp").findings == whole.findings
        found = quantkit.inspect(path)
        assert [shard["tensors"] for shard in found["shards"]] == [8, 8, 5]
        assert len(found["tensors"]) == 21
    refused = verify_folder(tmp_path, "transformers")
    assert refused.verdict == "refused"
    assert "these are shards" in refused.findings[0].message
    model = quantkit.load(tmp_path)
    one = quantkit.load(tmp_path / "whole")
    assert all((a == b).all() for a, b in zip(model.parameters(), one.parameters(), strict=True))
    shards[1].unlink()
    with pytest.raises(UserError, match="00002-of-00003"):
        quantkit.inspect(shards[0])
    assert verify_folder(tmp_path, "llama.cpp").verdict == "refused"


DAMAGED = {
    "empty": b"",
    "magic alone": b"GGUF",
    "version 2": b"GGUF" + (2).to_bytes(4, "little") + bytes(16),
    "big-endian": b"GGUF" + (3).to_bytes(4, "big") + bytes(16),
    "counts": b"GGUF" + (3).to_bytes(4, "little") + (1 << 60).to_bytes(8, "little") * 2,
    "no magic": b"ABCD" + bytes(30),
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("verb", ["inspect", "verify", "eval"])
def test_damaged_files_are_one_message(tmp_path: Path, verb: str, damage: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(DAMAGED[damage])
    result = CliRunner().invoke(app, [verb, str(path)])
    assert result.exit_code == 2, result.output
    assert f"error: {path}: a GGUF file that cannot be read: " in result.output
    assert result.output.count("error: ") == 1
    assert "hint: " in result.output
    assert verify_folder(path, "llama.cpp").verdict == "refused"


def test_cut_short(tmp_path: Path) -> None:
    whole = tiny().save(tmp_path / "m.gguf").read_bytes()
    for size in (30, len(whole) // 50, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut.gguf: a GGUF file that cannot be read"):
            quantkit.inspect(tmp_path / "cut.gguf")


def test_exit_codes(tmp_path: Path) -> None:
    path = tiny().save(tmp_path / "m.gguf")
    assert CliRunner().invoke(app, ["verify", str(path), "--engine", "llama.cpp"]).exit_code == 0
    refused = CliRunner().invoke(app, ["verify", str(path), "--engine", "vllm"])
    assert refused.exit_code == 1
    assert "vllm-gguf-plugin" in refused.output


def test_reading_imports_no_torch(tmp_path: Path) -> None:
    path = tiny().save(tmp_path / "m.gguf")
    code = (
        "import sys\nfrom quantkit import inspect, verify\n"
        f"inspect({str(path)!r}); verify({str(path)!r})\n"
        "print([name for name in ('torch', 'transformers', 'gguf') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
