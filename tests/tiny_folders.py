"""Tiny Llama folders in every safetensors format, written by hand from the formats' descriptions, codes all alike."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, FFN, HEADS, KV_HEADS, VOCAB = 256, 512, 4, 2, 64
HEAD = HIDDEN // HEADS
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}
SHAPES = {f"model.layers.{layer}.{name}": shape for layer in range(2) for name, shape in LINEARS.items()}
DENSE = {"lm_head": (VOCAB, HIDDEN)}
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
INT8_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
FP8_TOKEN = INT8_TOKEN | {"type": "float"}
STATIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
KV = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


def integer(bits: int = 4, group_size: int = 128, symmetric: bool = True) -> dict[str, Any]:
    strategy = "channel" if group_size == -1 else "group"
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "dynamic": False}
    return weights | ({} if group_size == -1 else {"group_size": group_size})


def floating(strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False} | more


FP4 = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False}
NVFP4 = FP4 | {"strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
MXFP4 = FP4 | {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
MXFP8 = MXFP4 | {"num_bits": 8}


def ct(weights: Any, layout: str | None, inputs: Any = None, **more: Any) -> dict[str, Any]:
    """quantization_config of compressed-tensors with one group for all Linears but the head."""
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": layout,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "version": "0.17.0",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    } | more


def gptq(**more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True} | more


def awq(**more: Any) -> dict[str, Any]:
    base = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
    return base | {"modules_to_not_convert": ["lm_head"]} | more


def fp8(block: list[int] | None = None, scheme: str = "dynamic", **more: Any) -> dict[str, Any]:
    base = {"quant_method": "fp8", "activation_scheme": scheme, "weight_block_size": block}
    return base | {"ignored_layers": ["lm_head"]} | more


def modelopt(algo: str, **more: Any) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algo, "ignore": ["lm_head"]} | more


CONFIGS: dict[str, dict[str, Any]] = {
    "W4A16": ct(integer(), "pack-quantized"),
    "W4A16 asym": ct(integer(symmetric=False), "pack-quantized"),
    "W3A16": ct(integer(3, 32), "pack-quantized"),
    "W8A16": ct(integer(8, -1), "pack-quantized"),
    "W8A8": ct(integer(8, -1), "int-quantized", INT8_TOKEN),
    "W8A8 static": ct(integer(8, -1), "int-quantized", STATIC),
    "W4A8": ct(integer(), "pack-quantized", INT8_TOKEN),
    "W4A8-FP8": ct(integer(), "pack-quantized", FP8_TOKEN),
    "FP8": ct(floating("tensor"), "float-quantized", STATIC | {"type": "float"}),
    "FP8 dynamic": ct(floating("channel"), "float-quantized", FP8_TOKEN),
    "FP8 block": ct(
        floating("block", block_structure=[128, 128]),
        "float-quantized",
        floating("group", group_size=128, dynamic=True),
    ),
    "FP8 weight-only": ct(floating("channel"), "naive-quantized"),
    "NVFP4": ct(NVFP4, "nvfp4-pack-quantized", NVFP4 | {"dynamic": "local"}),
    "NVFP4A16": ct(NVFP4, "nvfp4-pack-quantized"),
    "MXFP4": ct(MXFP4, "mxfp4-pack-quantized", MXFP4 | {"dynamic": True}),
    "MXFP4A16": ct(MXFP4, "mxfp4-pack-quantized"),
    "MXFP8": ct(MXFP8, "mxfp8-quantized", MXFP8 | {"dynamic": True}),
    "kv": ct(integer(), "pack-quantized", kv_cache_scheme=KV),
    "gptq": gptq(),
    "gptq v2": gptq(checkpoint_format="gptq_v2"),
    "gptq 8": gptq(bits=8, group_size=-1),
    "awq": awq(),
    "awq sym": awq(zero_point=False),
    "fp8": fp8(scheme="static"),
    "fp8 block": fp8([128, 128]),
    "modelopt fp8": modelopt("FP8"),
    "modelopt nvfp4": modelopt("NVFP4"),
}


def tensors_of(kind: str, N: int, K: int) -> dict[str, Tensor]:
    """One module's tensors in a format of CONFIGS."""
    f8, u8 = (lambda *shape: torch.ones(shape).to(torch.float8_e4m3fn)), torch.uint8
    scale = lambda *shape: torch.full(shape, 0.01, dtype=torch.bfloat16)  # noqa: E731
    one = lambda value: torch.tensor([value], dtype=torch.float32)  # noqa: E731
    words = lambda *shape: torch.zeros(shape, dtype=torch.int32)  # noqa: E731
    packed = lambda bits, groups: {  # noqa: E731
        "weight_packed": words(N, -(-K * bits // 32)),
        "weight_scale": scale(N, groups),
        "weight_shape": torch.tensor([N, K]),
    }
    if kind in ("W4A16", "W4A8", "W4A8-FP8", "kv"):
        return packed(4, K // 128)
    if kind == "W4A16 asym":
        return packed(4, K // 128) | {"weight_zero_point": words(N // 8, K // 128)}
    if kind in ("W3A16", "W8A16"):
        return packed(3, K // 32) if kind == "W3A16" else packed(8, 1)
    if kind.startswith("W8A8"):
        tensors = {"weight": torch.zeros(N, K, dtype=torch.int8), "weight_scale": scale(N, 1).float()}
        return tensors | ({"input_scale": one(0.02)} if "static" in kind else {})
    if kind in ("FP8", "FP8 dynamic", "FP8 weight-only", "FP8 block"):
        shape = {"FP8": (1,), "FP8 block": (-(-N // 128), K // 128)}.get(kind, (N, 1))
        return {"weight": f8(N, K), "weight_scale": scale(*shape).float()} | (
            {"input_scale": one(0.02)} if kind == "FP8" else {}
        )
    if kind.startswith(("NVFP4", "modelopt nvfp4")):
        ours = kind.startswith("NVFP4")
        tensors = {
            "weight_packed" if ours else "weight": torch.zeros(N, K // 2, dtype=u8),
            "weight_scale": f8(N, K // 16),
            "weight_global_scale" if ours else "weight_scale_2": one(10000.0 if ours else 1e-4),
        }
        inputs = {"input_global_scale": one(300.0)} if ours else {"input_scale": one(0.003)}
        return tensors | ({} if kind == "NVFP4A16" else inputs)
    if kind.startswith("MXFP4"):
        return {
            "weight_packed": torch.zeros(N, K // 2, dtype=u8),
            "weight_scale": torch.full((N, K // 32), 120, dtype=u8),
        }
    if kind == "MXFP8":
        return {"weight": f8(N, K), "weight_scale": torch.full((N, K // 32), 120, dtype=u8)}
    if kind.startswith("gptq"):
        bits, groups = (8, 1) if "8" in kind else (4, K // 128)
        zero = {"gptq": 0x77777777, "gptq 8": 0x7F7F7F7F, "gptq v2": -0x77777778}[kind]
        return {
            "qweight": words(K * bits // 32, N),
            "qzeros": torch.full((groups, N * bits // 32), zero, dtype=torch.int32),
            "scales": scale(groups, N).half(),
            "g_idx": (torch.arange(K) // (K // groups)).int(),
        }
    if kind.startswith("awq"):
        return {
            "qweight": words(K, N // 8),
            "qzeros": torch.full((K // 128, N // 8), -0x77777778, dtype=torch.int32),
            "scales": scale(K // 128, N).half(),
        }
    if kind == "fp8 block":
        return {"weight": f8(N, K), "weight_scale_inv": scale(-(-N // 128), K // 128).float()}
    assert kind in ("fp8", "modelopt fp8"), kind
    return {"weight": f8(N, K), "weight_scale": torch.tensor(0.01), "input_scale": torch.tensor(0.02)}


class Folder:
    """A folder about to be written: change qc, config or tensors, then `save`."""

    def __init__(self, kind: str) -> None:
        self.qc: dict[str, Any] | None = json.loads(json.dumps(CONFIGS[kind])) if kind != "dense" else None
        self.config = dict(MODEL)
        self.tensors: dict[str, Tensor] = {
            "model.embed_tokens.weight": torch.zeros(VOCAB, HIDDEN, dtype=torch.bfloat16),
            "lm_head.weight": torch.ones(VOCAB, HIDDEN, dtype=torch.bfloat16),
            "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
        }
        for name, (N, K) in SHAPES.items():
            parts = {"weight": torch.zeros(N, K, dtype=torch.bfloat16)} if kind == "dense" else tensors_of(kind, N, K)
            self.tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in parts.items()}
            if kind == "kv" and name.endswith("k_proj"):
                stem = name.rpartition(".")[0]
                self.tensors |= {f"{stem}.{letter}_scale": torch.tensor([0.1]) for letter in "kv"}

    def dense(self, name: str) -> None:
        """Store a quantized module unquantized."""
        for key in [key for key in self.tensors if key.rpartition(".")[0] == name]:
            del self.tensors[key]
        self.tensors[f"{name}.weight"] = torch.zeros(SHAPES[name], dtype=torch.bfloat16)

    def save(self, path: Path, shards: int = 1) -> Path:
        path.mkdir()
        config = self.config | ({"quantization_config": self.qc} if self.qc is not None else {})
        (path / "config.json").write_text(json.dumps(config))
        (path / "tokenizer.json").write_text("{}")
        tensors = {name: tensor.contiguous().clone() for name, tensor in self.tensors.items()}
        if shards == 1:
            save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
            return path
        weight_map = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            part = {name: tensors[name] for name in sorted(tensors)[shard::shards]}
            save_file(part, path / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        return path
