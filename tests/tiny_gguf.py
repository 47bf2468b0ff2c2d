"""Tiny GGUF files of each architecture, written by the gguf package from llama.cpp's own tables."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, quants
from numpy.typing import NDArray

MODEL = Path(__file__).resolve().parents[1] / "examples/tiny-llama"
EMBED, FF, HEADS, KV_HEADS, HEAD, BLOCKS, EXPERTS, EXPERT_FF = 64, 128, 4, 2, 16, 2, 4, 32
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3", "phi3", "qwen3moe")
_KINDS = {kind.name: kind for kind in GGUFValueType}


@dataclass
class Gguf:
    """A file to be: `metadata` key -> (kind of GGUFValueType, value), `tensors` name -> float32; types by name.

    types  tensor name -> type where it is not F32; bytes there instead of numbers for types gguf cannot quantize
    """

    metadata: dict[str, tuple[str, Any]] = field(default_factory=dict)
    tensors: dict[str, NDArray[Any]] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path, tensors_per_file: int = 0) -> Path:
        """Write it; tensors_per_file: into shards of so many, path-00001-of-0000N.gguf."""
        path.parent.mkdir(exist_ok=True)
        architecture = self.metadata.get("general.architecture", ("STRING", "llama"))[1]
        writer = GGUFWriter(path, architecture, split_max_tensors=tensors_per_file)
        if "general.architecture" not in self.metadata:
            del writer.kv_data[0]["general.architecture"]
        for key, (kind, value) in self.metadata.items():
            if key == "general.architecture":
                continue
            if isinstance(value, list):
                writer.add_key_value(key, value, GGUFValueType.ARRAY, sub_type=_KINDS[kind])
            else:
                writer.add_key_value(key, value, _KINDS[kind])
        for name, array in self.tensors.items():
            type_ = GGMLQuantizationType[self.types.get(name, "F32")]
            data = array if array.dtype == np.uint8 else quants.quantize(array, type_)
            writer.add_tensor(name, data, raw_dtype=type_)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def byte_tokenizer(vocab: int = 264) -> dict[str, tuple[str, Any]]:
    """256 bytes, two merges and special tokens: enough for llama.cpp to cut any text."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = [*bytes_to_unicode().values(), "th", "the", "<s>", "</s>"]
    tokens += [f"[PAD{i}]" for i in range(len(tokens), vocab)]
    kinds = [1] * 258 + [3, 3] + [5] * (vocab - 260)
    return {
        "tokenizer.ggml.model": ("STRING", "gpt2"),
        "tokenizer.ggml.pre": ("STRING", "gpt-2"),
        "tokenizer.ggml.tokens": ("STRING", tokens),
        "tokenizer.ggml.token_type": ("INT32", kinds),
        "tokenizer.ggml.merges": ("STRING", ["t h", "th e"]),
        "tokenizer.ggml.bos_token_id": ("UINT32", 258),
        "tokenizer.ggml.eos_token_id": ("UINT32", 259),
        "tokenizer.chat_template": ("STRING", "{{ messages }}"),
    }


def sizes(name: str, head: int = HEAD) -> dict[str, tuple[str, Any]]:
    """The keys of an architecture's sizes."""
    found: dict[str, tuple[str, Any]] = {
        "context_length": ("UINT32", 256),
        "embedding_length": ("UINT32", EMBED),
        "block_count": ("UINT32", BLOCKS),
        "feed_forward_length": ("UINT32", FF),
        "attention.head_count": ("UINT32", HEADS),
        "attention.head_count_kv": ("UINT32", KV_HEADS),
        "attention.layer_norm_rms_epsilon": ("FLOAT32", 1e-6),
        "rope.freq_base": ("FLOAT32", 10000.0),
        "rope.dimension_count": ("UINT32", head),
    }
    if name in ("qwen3", "gemma3", "qwen3moe"):
        found |= {"attention.key_length": ("UINT32", head), "attention.value_length": ("UINT32", head)}
    if name == "qwen3moe":
        found |= {"expert_count": ("UINT32", EXPERTS), "expert_used_count": ("UINT32", 2)}
        found |= {"expert_feed_forward_length": ("UINT32", EXPERT_FF)}
    if name == "gemma3":
        found |= {"attention.sliding_window": ("UINT32", 64)}
    return {f"{name}.{key}": value for key, value in found.items()}


def shapes(name: str, vocab: int = 264, head: int = HEAD) -> dict[str, tuple[int, ...]]:
    """Every tensor of a tiny model."""
    q, kv = HEADS * head, KV_HEADS * head
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab, EMBED), "output_norm.weight": (EMBED,)}
    if name != "gemma3":
        found["output.weight"] = (vocab, EMBED)
    for i in range(BLOCKS):
        block: dict[str, tuple[int, ...]] = {"attn_norm.weight": (EMBED,), "ffn_norm.weight": (EMBED,)}
        if name == "phi3":
            block["attn_qkv.weight"] = (q + 2 * kv, EMBED)
        else:
            block |= {"attn_q.weight": (q, EMBED), "attn_k.weight": (kv, EMBED), "attn_v.weight": (kv, EMBED)}
        block["attn_output.weight"] = (EMBED, q)
        if name == "qwen2":
            block |= {"attn_q.bias": (q,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
        if name in ("qwen3", "gemma3", "qwen3moe"):
            block |= {"attn_q_norm.weight": (head,), "attn_k_norm.weight": (head,)}
        if name == "gemma3":
            block |= {"post_attention_norm.weight": (EMBED,), "post_ffw_norm.weight": (EMBED,)}
        if name == "qwen3moe":
            block["ffn_gate_inp.weight"] = (EXPERTS, EMBED)
            block |= {f"ffn_{part}_exps.weight": (EXPERTS, EXPERT_FF, EMBED) for part in ("gate", "up")}
            block["ffn_down_exps.weight"] = (EXPERTS, EMBED, EXPERT_FF)
        else:
            if name != "phi3":
                block["ffn_gate.weight"] = (FF, EMBED)
            block |= {"ffn_up.weight": (FF * (2 if name == "phi3" else 1), EMBED), "ffn_down.weight": (EMBED, FF)}
        found |= {f"blk.{i}.{part}": shape for part, shape in block.items()}
    return found


def tiny(name: str = "llama", type_: str = "Q8_0", file_type: int = 7, seed: int = 0, vocab: int = 264) -> Gguf:
    """A random model of an architecture; its matrices in one type."""
    random = np.random.default_rng(seed)
    metadata = {"general.architecture": ("STRING", name), "general.name": ("STRING", "tiny")}
    metadata |= {"general.file_type": ("UINT32", file_type), "general.quantization_version": ("UINT32", 2)}
    metadata |= sizes(name) | byte_tokenizer(vocab) | {"quantkit.recipe": ("STRING", "{}")}
    found = Gguf(metadata)
    for tensor, shape in shapes(name, vocab).items():
        found.tensors[tensor] = random.standard_normal(shape, np.float32) / 8 + ("norm" in tensor)
        if len(shape) > 1 and "gate_inp" not in tensor:
            found.types[tensor] = type_
    return found


def bundled(types: Mapping[str, str] | None = None, default: str = "F32") -> Gguf:
    """The model that comes along, as a llama file: its own weights and tokenizer. types: of single tensors."""
    from safetensors.torch import load_file

    config = json.loads((MODEL / "config.json").read_text())
    stored = load_file(MODEL / "model.safetensors")
    found = Gguf(_bundled_keys(config) | _bundled_tokenizer(config["vocab_size"]))
    for name, tensor in stored.items():
        array = tensor.float().numpy()
        place = _PLACES.get(name) or "blk.{}.{}.weight".format(name.split(".")[2], _PARTS[name.split(".")[-2]])
        if ".attn_q." in place or ".attn_k." in place:
            heads = config["num_attention_heads" if ".attn_q." in place else "num_key_value_heads"]
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        found.tensors[place] = np.ascontiguousarray(array)
        if array.ndim > 1:
            found.types[place] = (types or {}).get(place, default)
    return found


_PLACES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_PARTS = {
    **{f"{part}_proj": f"attn_{part}" for part in "qkv"},
    **{f"{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
    "o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def _bundled_keys(config: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}
    return {
        "general.architecture": ("STRING", "llama"),
        "general.file_type": ("UINT32", 0),
        "general.quantization_version": ("UINT32", 2),
        "llama.context_length": ("UINT32", config["max_position_embeddings"]),
        "llama.embedding_length": ("UINT32", config["hidden_size"]),
        "llama.block_count": ("UINT32", config["num_hidden_layers"]),
        "llama.feed_forward_length": ("UINT32", config["intermediate_size"]),
        "llama.attention.head_count": ("UINT32", config["num_attention_heads"]),
        "llama.attention.head_count_kv": ("UINT32", config["num_key_value_heads"]),
        "llama.attention.layer_norm_rms_epsilon": ("FLOAT32", config["rms_norm_eps"]),
        "llama.rope.freq_base": ("FLOAT32", config.get("rope_theta") or rope.get("rope_theta", 10000.0)),
        "llama.rope.dimension_count": ("UINT32", head),
        "llama.vocab_size": ("UINT32", config["vocab_size"]),
    }


def _bundled_tokenizer(vocab: int) -> dict[str, tuple[str, Any]]:
    stated = json.loads((MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    tokens: list[str] = [f"[PAD{i}]" for i in range(vocab)]
    kinds = [5] * vocab
    for token, index in stated["model"]["vocab"].items():
        tokens[index], kinds[index] = token, 1
    for added in stated["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], 3 if added["special"] else 4
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in stated["model"]["merges"]]
    return {
        "tokenizer.ggml.model": ("STRING", "gpt2"),
        "tokenizer.ggml.pre": ("STRING", "gpt-2"),
        "tokenizer.ggml.tokens": ("STRING", tokens),
        "tokenizer.ggml.token_type": ("INT32", kinds),
        "tokenizer.ggml.merges": ("STRING", merges),
    }
