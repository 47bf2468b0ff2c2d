"""Outlines of GGUF files for the tests of mixes: names, shapes and the keys that count, without any data."""

from dataclasses import dataclass
from itertools import groupby
from typing import Any

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Outline:
    """A model's names and shapes, which need not fit each other: the mixes look at rows' lengths alone.

    columns   of all rows but ffn_down's, which has `down`
    experts   of each block, 0: no experts
    """

    architecture: str = "llama"
    layers: int = 8
    heads: int = 4
    keys: int = 4
    tied: bool = False
    experts: int = 0
    columns: int = 256
    down: int = 512

    @property
    def metadata(self) -> dict[str, tuple[str, Any]]:
        numbers = {
            "block_count": self.layers, "context_length": 128, "embedding_length": self.columns,
            "feed_forward_length": self.down, "attention.head_count": self.heads,
            "attention.head_count_kv": self.keys, "vocab_size": 4,
        }  # fmt: skip
        if self.experts:
            numbers |= {"expert_count": self.experts, "expert_used_count": 2, "expert_feed_forward_length": self.down}
        if self.architecture == "phi3":
            numbers |= {"rope.scaling.original_context_length": 128, "attention.sliding_window": 0}
        if self.architecture == "gemma3":
            numbers |= {"attention.sliding_window": 64}
        keys: dict[str, tuple[str, Any]] = {"general.architecture": ("string", self.architecture)}
        keys |= {f"{self.architecture}.{key}": ("u32", value) for key, value in numbers.items()}
        return keys | {f"{self.architecture}.attention.layer_norm_rms_epsilon": ("f32", 1e-5)}

    @property
    def shapes(self) -> Shapes:
        K, down = self.columns, self.down
        shapes: Shapes = {"token_embd.weight": (4, K)}
        for i in range(self.layers):
            block: Shapes = {"attn_norm.weight": (K,), "ffn_norm.weight": (K,)}
            if self.architecture == "phi3":
                block |= {"attn_qkv.weight": (3, K), "ffn_up.weight": (4, K)}
            else:
                block |= {"attn_q.weight": (2, K), "attn_k.weight": (2, K), "attn_v.weight": (2, K)}
            if self.architecture in ("qwen3", "qwen3moe", "gemma3"):
                block |= {"attn_q_norm.weight": (8,), "attn_k_norm.weight": (8,)}
            if self.architecture == "qwen2":
                block |= {f"attn_{part}.bias": (8,) for part in "qkv"}
            block["attn_output.weight"] = (2, K)
            if self.experts:
                block["ffn_gate_inp.weight"] = (self.experts, K)
                block |= {f"ffn_{part}_exps.weight": (self.experts, 1, K) for part in ("gate", "up")}
                block["ffn_down_exps.weight"] = (self.experts, 1, down)
            else:
                if self.architecture != "phi3":
                    block |= {"ffn_gate.weight": (2, K), "ffn_up.weight": (2, K)}
                block["ffn_down.weight"] = (2, down)
            shapes |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
        shapes["output_norm.weight"] = (K,)
        return shapes if self.tied else shapes | {"output.weight": (4, K)}


def summary(types: dict[str, str]) -> str:
    """Types by tensor, F32 left out, as in `attn_v Q6_K*2,Q4_K; ...`: runs of blocks with the same type."""
    by_kind: dict[str, list[str]] = {}
    for name, type_ in types.items():
        if type_ != "F32":
            kind = name.removesuffix(".weight").split(".", 2)[-1]
            by_kind.setdefault(kind, []).append(type_)
    rows = []
    for kind, values in sorted(by_kind.items()):
        runs = [(type_, len(list(run))) for type_, run in groupby(values)]
        rows.append(f"{kind} " + ",".join(type_ if n == 1 else f"{type_}*{n}" for type_, n in runs))
    return "; ".join(rows)
