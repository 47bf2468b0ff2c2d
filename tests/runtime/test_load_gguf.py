"""GGUF files as transformers models: the same logits as the model they hold, and the numbers gguf decodes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from torch import Tensor

import quantkit
from quantkit.errors import UserError
from quantkit.runtime.gguf_tokenizer import gguf_tokenizer
from tests.tiny_gguf import ARCHITECTURES, HEADS, MODEL, Gguf, bundled, tiny

IDS = torch.arange(3, 35)[None]


@torch.no_grad()
def logits(path: Path) -> Tensor:
    return quantkit.load(path)(IDS).logits


def test_a_float32_file_is_the_model(tmp_path: Path) -> None:
    """Permuted q and k, tied head, names and keys: not a bit differs."""
    with torch.no_grad():
        original = quantkit.load(MODEL, dtype="float32")(IDS).logits
    model = quantkit.load(bundled().save(tmp_path / "m.gguf"))
    assert model.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, original)
    assert model.generate(IDS[:, :4], max_new_tokens=2, do_sample=False).shape == (1, 6)


@pytest.mark.parametrize("type_", ["Q8_0", "Q4_0", "Q5_1", "BF16"])
def test_blocks_are_decoded(tmp_path: Path, type_: str) -> None:
    """Against a float32 file of what the gguf package decodes."""
    path = bundled(default=type_).save(tmp_path / "m.gguf")
    dense = bundled()
    for tensor in GGUFReader(path).tensors:
        if tensor.name in dense.tensors:
            dense.tensors[tensor.name] = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    assert torch.equal(logits(path), logits(dense.save(tmp_path / "dense.gguf")))


def test_k_quants_are_decoded(tmp_path: Path) -> None:
    """Q4_K and Q6_K, of which any bytes but those of scales are a weight."""
    random = np.random.default_rng(0)
    model, expected = bundled(), bundled()
    for name, type_, size in (("blk.0.ffn_down.weight", "Q4_K", 144), ("blk.1.ffn_up.weight", "Q6_K", 210)):
        rows, columns = model.tensors[name].shape
        data = random.integers(0, 256, (rows, columns // 256, size), np.uint8)
        halves = (slice(0, 2), slice(2, 4)) if type_ == "Q4_K" else (slice(208, 210),)
        for half in halves:
            data[..., half] = np.frombuffer(np.float16(1e-4).tobytes(), np.uint8)
        model.tensors[name], model.types[name] = data.reshape(rows, -1), type_
    path = model.save(tmp_path / "m.gguf")
    for tensor in GGUFReader(path).tensors:
        expected.tensors[tensor.name] = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
    assert torch.equal(logits(path), logits(expected.save(tmp_path / "dense.gguf")))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_loads(tmp_path: Path, name: str) -> None:
    path = tiny(name, "Q8_0").save(tmp_path / "m.gguf")
    model = quantkit.load(path)
    with torch.no_grad():
        found = model(IDS).logits
    assert found.shape == (1, 32, 264)
    assert found.isfinite().all()
    assert model.config.tie_word_embeddings == (name == "gemma3")
    q = dict(model.named_parameters())["model.layers.0.self_attn.qkv_proj.weight" if name == "phi3" else _Q]
    stored = next(
        t for t in GGUFReader(path).tensors if t.name == f"blk.0.attn_{'qkv' if name == 'phi3' else 'q'}.weight"
    )
    rows = dequantize(stored.data, stored.tensor_type)
    if name == "llama":  # neighbours there, halves here
        rows = rows.reshape(HEADS, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
    assert torch.equal(q, torch.from_numpy(rows.copy()))


_Q = "model.layers.0.self_attn.q_proj.weight"


def test_experts_and_norms(tmp_path: Path) -> None:
    """Each expert has its own rows of a 3-D tensor; Gemma's norms lie in the file as w + 1."""
    experts = tiny("qwen3moe", "F32")
    block = quantkit.load(experts.save(tmp_path / "e.gguf")).get_submodule("model.layers.1.mlp.experts")
    down = torch.from_numpy(experts.tensors["blk.1.ffn_down_exps.weight"])
    assert torch.equal(block.get_parameter("down_proj"), down)
    gate, up = (torch.from_numpy(experts.tensors[f"blk.1.ffn_{part}_exps.weight"]) for part in ("gate", "up"))
    assert torch.equal(block.get_parameter("gate_up_proj"), torch.cat([gate, up], 1))
    gemma = tiny("gemma3", "F32")
    norm = quantkit.load(gemma.save(tmp_path / "g.gguf")).get_parameter("model.layers.0.input_layernorm.weight")
    assert torch.equal(norm, torch.from_numpy(gemma.tensors["blk.0.attn_norm.weight"]) - 1)


def test_the_scale_beside_a_weight(tmp_path: Path) -> None:
    """What NVFP4 files have: a float32 number that the products are multiplied with; of experts one each."""
    model = tiny("qwen3moe", "F32")
    model.tensors["blk.0.attn_q.scale"] = np.array([3.0], np.float32)
    model.tensors["blk.0.attn_q.input_scale"] = np.array([7.0], np.float32)
    model.tensors["blk.1.ffn_down_exps.scale"] = np.arange(1, 5).astype(np.float32)
    loaded = quantkit.load(model.save(tmp_path / "m.gguf"))
    assert torch.equal(loaded.get_parameter(_Q), 3 * torch.from_numpy(model.tensors["blk.0.attn_q.weight"]))
    down = torch.from_numpy(model.tensors["blk.1.ffn_down_exps.weight"]) * torch.arange(1, 5)[:, None, None]
    assert torch.equal(loaded.get_parameter("model.layers.1.mlp.experts.down_proj"), down)


def test_dtype_and_folder(tmp_path: Path) -> None:
    bundled(default="Q8_0").save(tmp_path / "model.gguf")
    model = quantkit.load(tmp_path, dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert Path(model.name_or_path) == tmp_path / "model.gguf"


def nan(model: Gguf) -> None:
    model.tensors["blk.1.attn_norm.weight"][0] = np.nan


REFUSED = {
    "other architecture": (lambda g: g.metadata.update({"general.architecture": ("STRING", "mamba")}), "mamba"),
    "missing key": (lambda g: g.metadata.pop("llama.block_count"), r"llama\.block_count: missing"),
    "unknown tensor": (lambda g: g.tensors.update({"blk.0.x.weight": np.zeros((4, 4), np.float32)}), "unknown tensor"),
    "missing tensor": (lambda g: g.tensors.pop("blk.1.attn_v.weight"), "v_proj"),
    "nan": (nan, "NaN or infinite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_file_and_fault(tmp_path: Path, case: str) -> None:
    change, words = REFUSED[case]
    model = tiny()
    change(model)
    path = model.save(tmp_path / "m.gguf")
    with pytest.raises(UserError, match=words) as caught:
        quantkit.load(path)
    assert str(path) in str(caught.value)


def test_a_type_that_nothing_decodes(tmp_path: Path) -> None:
    model = tiny()
    model.types["output.weight"] = "I8"
    model.tensors["output.weight"] = np.zeros((264, 64), np.uint8)
    with pytest.raises(UserError, match=r"output\.weight is I8, which quantkit does not decode"):
        quantkit.load(model.save(tmp_path / "i8.gguf"))


# Tokenizers


def test_byte_pairs_as_the_original(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer, remark = gguf_tokenizer(bundled().save(tmp_path / "m.gguf"))
    original = AutoTokenizer.from_pretrained(MODEL)
    assert remark is None
    assert tokenizer.get_vocab() == original.get_vocab()
    text = (MODEL / "eval.txt").read_text(encoding="utf-8") + " 12345 caf\u00e9 \u4f60\u597d <|endoftext|>x\t\n\n  'll"
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert ids == original(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert tokenizer.decode(ids) == original.decode(ids)


def test_scores_are_merged_by_size(tmp_path: Path) -> None:
    """Sentencepiece: the neighbours with the highest score first, bytes for the rest, a space before the text."""
    pieces = {"<unk>": 0.0, "<s>": 0.0, "</s>": 0.0} | {f"<0x{i:02X}>": 0.0 for i in range(256)}
    pieces |= {"\u2581": -9.0, "a": -9.0, "b": -9.0, "c": -9.0, "ab": -2.0, "bc": -1.0, "\u2581a": -3.0}
    model = tiny(vocab=len(pieces))
    for key in list(model.metadata):
        if key.startswith("tokenizer."):
            del model.metadata[key]
    model.metadata |= {
        "tokenizer.ggml.model": ("STRING", "llama"),
        "tokenizer.ggml.tokens": ("STRING", list(pieces)),
        "tokenizer.ggml.scores": ("FLOAT32", list(pieces.values())),
        "tokenizer.ggml.token_type": ("INT32", [2, 3, 3] + [6] * 256 + [1] * 7),
        "tokenizer.ggml.bos_token_id": ("UINT32", 1),
    }
    tokenizer, _ = gguf_tokenizer(model.save(tmp_path / "m.gguf"))
    tokens = list(pieces)
    ids = tokenizer("abc\u00e9", add_special_tokens=True)["input_ids"]
    assert [tokens[i] for i in ids] == ["<s>", "\u2581a", "bc", "<0xC3>", "<0xA9>"]
    model.metadata["tokenizer.ggml.add_space_prefix"] = ("BOOL", False)
    model.metadata["tokenizer.ggml.add_bos_token"] = ("BOOL", False)
    tokenizer, _ = gguf_tokenizer(model.save(tmp_path / "n.gguf"))
    assert [tokens[i] for i in tokenizer("ab c")["input_ids"]] == ["ab", "\u2581", "c"]


def test_bos_by_the_way_of_splitting(tmp_path: Path) -> None:
    model = tiny()
    for pre, key, begins in (("gpt-2", None, False), ("llama-bpe", None, True), ("llama-bpe", False, False)):
        model.metadata["tokenizer.ggml.pre"] = ("STRING", pre)
        if key is not None:
            model.metadata["tokenizer.ggml.add_bos_token"] = ("BOOL", key)
        tokenizer, _ = gguf_tokenizer(model.save(tmp_path / "m.gguf"))
        assert (tokenizer("a")["input_ids"][0] == 258) == begins


def test_padding_rows_are_no_tokens(tmp_path: Path) -> None:
    tokenizer, _ = gguf_tokenizer(tiny().save(tmp_path / "m.gguf"))
    assert len(tokenizer.get_vocab()) == 260
    assert tokenizer("the <s>")["input_ids"][-1] == 258


UNBUILT = {
    "no pre known": ("tokenizer.ggml.pre", ("STRING", "nonsense"), "'nonsense'"),
    "no merges": ("tokenizer.ggml.merges", ("STRING", ["zz qq"]), "do not fit together"),
    "other kind": ("tokenizer.ggml.model", ("STRING", "t5"), "'t5'"),
    "twice": ("tokenizer.ggml.tokens", ("STRING", ["a"] * 264), "no list of different tokens"),
}


@pytest.mark.parametrize("case", UNBUILT)
def test_the_folders_tokenizer_where_the_keys_do_not_do(tmp_path: Path, case: str) -> None:
    key, value, words = UNBUILT[case]
    model = tiny()
    model.metadata[key] = value
    path = model.save(tmp_path / "m.gguf")
    with pytest.raises(UserError, match=f"{words}.*\nhint: copy tokenizer.json"):
        gguf_tokenizer(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, tmp_path)
    tokenizer, remark = gguf_tokenizer(path)
    assert len(tokenizer.get_vocab()) == 4096
    assert remark is not None
    assert words in remark
