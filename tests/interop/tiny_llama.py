"""The small Llama of the interop tests: sizes every engine's kernels take, weights of 0.06, bf16."""

from pathlib import Path

import torch


def save_tiny_llama(folder: Path, *, tied: bool = False, dtype: torch.dtype = torch.bfloat16) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=0.06,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
