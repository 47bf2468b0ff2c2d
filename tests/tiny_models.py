"""Tiny random models of transformers' own classes, one per architecture: two layers, hidden 32 to 64, float32.

Norm weights and biases are random too: a proof on weights of one and biases of zero would prove little.
"""

from collections.abc import Callable

import torch
import transformers as t
from torch import Tensor, nn

COMMON = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA = COMMON | {"num_key_value_heads": 2}
GEMMA = GQA | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
EXPERTS = GQA | {"num_experts_per_tok": 2}

CONFIGS: dict[str, Callable[[], t.PretrainedConfig]] = {
    "llama": lambda: t.LlamaConfig(**GQA),
    "mistral": lambda: t.MistralConfig(**GQA, sliding_window=8),
    "qwen2": lambda: t.Qwen2Config(**GQA),
    "qwen3": lambda: t.Qwen3Config(**GQA, head_dim=16),
    "gemma2": lambda: t.Gemma2Config(**GEMMA),
    "gemma3": lambda: t.Gemma3TextConfig(**GEMMA),
    "phi3": lambda: t.Phi3Config(**GQA),
    "gpt2": lambda: t.GPT2Config(
        vocab_size=96, n_positions=64, n_embd=48, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    ),
    "gpt_neox": lambda: t.GPTNeoXConfig(**COMMON | {"hidden_size": 64}),
    "opt": lambda: t.OPTConfig(
        vocab_size=96,
        hidden_size=48,
        ffn_dim=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=48,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "falcon": lambda: t.FalconConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1, eos_token_id=2
    ),
    "falcon_new": lambda: t.FalconConfig(
        vocab_size=96,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
        bias=True,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "stablelm": lambda: t.StableLmConfig(**GQA | {"hidden_size": 64}, use_qkv_bias=True),
    "olmo2": lambda: t.Olmo2Config(**GQA),
    "cohere": lambda: t.CohereConfig(**GQA, logit_scale=0.5),
    "granite": lambda: t.GraniteConfig(
        **GQA, residual_multiplier=0.3, attention_multiplier=0.2, embedding_multiplier=3.0, logits_scaling=2.0
    ),
    "qwen3_moe": lambda: t.Qwen3MoeConfig(
        **EXPERTS, head_dim=16, num_experts=4, moe_intermediate_size=24, norm_topk_prob=True
    ),
    "mixtral": lambda: t.MixtralConfig(**EXPERTS, num_local_experts=4),
}


def tiny_model(name: str, seed: int = 0) -> t.PreTrainedModel:
    """A random model of architecture `name`, in evaluation mode; experts run one by one as Python loops."""
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    model = t.AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager").eval()
    with torch.no_grad():
        for path, param in model.named_parameters():
            if param.dim() == 1:  # norms around their neutral value, biases around zero
                param.add_(0.3 * torch.randn_like(param))
            else:
                param.normal_(std=0.5 if "embed" in path else param.shape[-1] ** -0.5)
    model.tie_weights()
    return model


def blocks_of(model: t.PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks: the longest list of modules of the model."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == 2]
    return lists[0]


def block_inputs(
    model: t.PreTrainedModel, index: int = 0, *, rows: int = 2, length: int = 12, seed: int = 0, use_cache: bool = False
) -> tuple[nn.Module, tuple, dict]:
    """Block `index` with the arguments the model itself passes to it for random tokens [rows, length]."""
    block, seen = blocks_of(model)[index], []

    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append((args, kwargs))

    handle = block.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            model(random_tokens(model, rows, length, seed), use_cache=use_cache)
    finally:
        handle.remove()
    return block, *seen[0]


def random_tokens(model: t.PreTrainedModel, rows: int, length: int, seed: int = 0) -> Tensor:
    """Token ids [rows, length], never the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.get_text_config().vocab_size, (rows, length), generator=generator)
