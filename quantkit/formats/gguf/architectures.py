"""The architectures that quantkit writes as GGUF: what each checkpoint calls its tensors, what llama.cpp computes.

One literal table per architecture. Facts: llama.cpp of October 2026 (`src/models/`) and transformers' configuration
classes, whose defaults stand here because a config.json may leave them out. No torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quantkit.errors import UserError


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp knows of an architecture.

    name         general.architecture, and the prefix of its keys
    blocks       module of a decoder block in the checkpoint: its name under `blk.N.`
    experts      module of one expert: the name of the 3-D tensor of all experts [E, N, K]
    biases       names under `blk.N.` that may have a bias
    activation   what the MLP computes
    rope_types   what the rotary embedding can compute
    permuted     rows of q and k go from half-split to interleaved pairs
    plus_one     norms are stored as w + 1
    free_head    head_dim may differ from hidden_size / heads
    partial_rope the rotary embedding may turn a part of each head
    windows      a sliding window per layer is computed
    """

    name: str
    blocks: Mapping[str, str]
    biases: frozenset[str] = frozenset()
    experts: Mapping[str, str] = field(default_factory=dict)
    activation: str = "silu"
    rope_types: tuple[str, ...] = ("default", "linear", "yarn")
    permuted: bool = False
    plus_one: bool = False
    free_head: bool = True
    partial_rope: bool = False
    windows: bool = False


# Modules outside the decoder blocks, the same for all.
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

LLAMA = Architecture(
    name="llama",
    blocks={
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
    biases=frozenset({"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}),
    rope_types=("default", "linear", "yarn", "longrope", "llama3"),
    permuted=True,
)
QWEN2 = Architecture(
    name="qwen2",
    blocks={
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
    biases=frozenset({"attn_q", "attn_k", "attn_v"}),
    free_head=False,
)
QWEN3 = Architecture(
    name="qwen3",
    blocks={
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_proj": "attn_k",
        "self_attn.k_norm": "attn_k_norm",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
)
QWEN3_MOE = Architecture(
    name="qwen3moe",
    blocks={
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_proj": "attn_k",
        "self_attn.k_norm": "attn_k_norm",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate": "ffn_gate_inp",
    },
    experts={"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"},
)
GEMMA3 = Architecture(
    name="gemma3",
    blocks={
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_proj": "attn_k",
        "self_attn.k_norm": "attn_k_norm",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
    activation="gelu_pytorch_tanh",
    rope_types=("default", "linear"),  # yarn would scale the layers with a window too
    plus_one=True,
    windows=True,
)
PHI3 = Architecture(
    name="phi3",
    blocks={
        "input_layernorm": "attn_norm",
        "self_attn.qkv_proj": "attn_qkv",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
    rope_types=("default", "longrope"),
    free_head=False,
    partial_rope=True,
)

ARCHITECTURES: dict[str, Architecture] = {  # by model_type of config.json
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "gemma3": GEMMA3,
    "gemma3_text": GEMMA3,
    "phi3": PHI3,
}

# What transformers assumes where config.json is silent; None is derived (heads of k and v: as many as of q).
_COMMON = {"num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": False, "rope_theta": 10000.0}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _COMMON | {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
        "attention_bias": False, "mlp_bias": False,
    },
    "mistral": _COMMON | {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu", "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6, "sliding_window": 4096,
    },
    "qwen2": _COMMON | {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu", "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
        "layer_types": None,
    },
    "qwen3": _COMMON | {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "hidden_act": "silu",
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "attention_bias": False, "use_sliding_window": False,
        "sliding_window": 4096, "max_window_layers": 28, "layer_types": None,
    },
    "qwen3_moe": _COMMON | {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24,
        "num_attention_heads": 32, "num_key_value_heads": 4, "hidden_act": "silu", "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "attention_bias": False, "use_sliding_window": False, "sliding_window": 4096,
        "decoder_sparse_step": 1, "moe_intermediate_size": 768, "num_experts_per_tok": 8, "num_experts": 128,
        "norm_topk_prob": False, "mlp_only_layers": None,
    },
    "gemma3_text": _COMMON | {
        "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0, "attention_bias": False, "query_pre_attn_scalar": 256, "sliding_window": 4096,
        "sliding_window_pattern": 6, "layer_types": None, "final_logit_softcapping": None,
        "attn_logit_softcapping": None, "use_bidirectional_attention": False,
    },
    "phi3": _COMMON | {
        "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
        "num_attention_heads": 32, "hidden_act": "silu", "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "sliding_window": None,
    },
}  # fmt: skip


_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SIZES += ("num_key_value_heads", "head_dim", "max_position_embeddings", "num_experts", "num_experts_per_tok")
_SIZES += ("moe_intermediate_size", "sliding_window", "sliding_window_pattern", "original_max_position_embeddings")

_DERIVED = ("num_key_value_heads", "head_dim", "sliding_window")  # may be null
_MOST = {"num_hidden_layers": 512, "num_experts": 1024}  # of llama.cpp; of all others: of a u32


def find(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a config.json. UserError with the possible ones where it has no table here."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise UserError(
            f"model_type {kind!r}: not an architecture that quantkit writes as GGUF\n"
            f"hint: possible are {', '.join(ARCHITECTURES)}; `output: {{format: compressed-tensors}}` takes any model"
        )
    return ARCHITECTURES[kind]


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's part of a config.json with transformers' defaults filled in, head_dim and kv heads too.

    UserError where a size is not a positive integer that the file can hold.
    """
    find(config)
    kind = config["model_type"]
    text = dict(config)
    if kind == "gemma3":  # of text and images: its language model alone
        nested = config.get("text_config")
        kind, text = "gemma3_text", dict(nested) if isinstance(nested, Mapping) else {}
        if isinstance(tied := config.get("tie_word_embeddings"), bool):
            text["tie_word_embeddings"] = tied
    for saved, name in (("num_local_experts", "num_experts"), ("_sliding_window_pattern", "sliding_window_pattern")):
        if saved in text:  # transformers 5 saves them under these names
            text.setdefault(name, text[saved])
    full: dict[str, Any] = DEFAULTS[kind] | text | {"model_type": kind}
    if full["num_key_value_heads"] is None:
        full["num_key_value_heads"] = full["num_attention_heads"]
    _check_sizes(full)
    if full["head_dim"] is None:
        full["head_dim"] = full["hidden_size"] // full["num_attention_heads"]
    return full


def _check_sizes(full: Mapping[str, Any]) -> None:
    """UserError where a number of config.json is none that a file can hold."""
    for key in _SIZES:
        if key not in full or (full[key] is None and key in _DERIVED):
            continue
        value, most = full[key], _MOST.get(key, (1 << 32) - 1)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
            raise UserError(
                f"config.json: `{key}: {value!r}`, expected an integer from 1 to {most}\n"
                "hint: take config.json from the model's source"
            )
    for key in ("rms_norm_eps", "final_logit_softcapping"):
        number = full.get(key) or (1.0 if key == "final_logit_softcapping" else 0.0)
        if not isinstance(number, int | float) or not 0 < number < 1e30:
            raise UserError(
                f"config.json: `{key}: {full.get(key)!r}`, expected a positive number\n"
                "hint: take config.json from the model's source"
            )


def layer_types(full: Mapping[str, Any]) -> list[str]:
    """Per layer "full_attention" or "sliding_attention", as transformers derives it from complete settings."""
    layers, kind = full["num_hidden_layers"], full["model_type"]
    if isinstance(given := full.get("layer_types"), list | tuple) and given:
        return [str(kind) for kind in given]
    if kind == "gemma3_text":
        pattern = full["sliding_window_pattern"]
        return ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)]
    off = kind == "llama" or (kind.startswith("qwen") and not full["use_sliding_window"])
    if off or not full["sliding_window"]:
        return ["full_attention"] * layers
    first = full["max_window_layers"] if kind in ("qwen2", "qwen3") else 0
    return ["sliding_attention" if i >= (first or 0) else "full_attention" for i in range(layers)]


def window(full: Mapping[str, Any]) -> int | None:
    """The sliding window of the layers that have one, in tokens; None where no layer has."""
    return full["sliding_window"] if "sliding_attention" in layer_types(full) else None
