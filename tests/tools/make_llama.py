"""Write a random bf16 Llama of any size to a folder, one tensor at a time: for memory and speed tests.

python tests/tools/make_llama.py OUT --layers 8                     # Llama-3-8B layer sizes, 128256 tokens, untied
python tests/tools/make_llama.py OUT --hidden 2048 --intermediate 8192 --layers 2 --heads 32 --kv-heads 8 --vocab 32000
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    for name, default in {
        "hidden": 4096,
        "intermediate": 14336,
        "layers": 8,
        "heads": 32,
        "kv-heads": 8,
        "vocab": 128256,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    a.output.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": a.hidden,
        "intermediate_size": a.intermediate,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "vocab_size": a.vocab,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    (a.output / "config.json").write_text(json.dumps(config, indent=2))
    kv = a.hidden // a.heads * a.kv_heads
    shapes = {
        "self_attn.q_proj": (a.hidden, a.hidden),
        "self_attn.k_proj": (kv, a.hidden),
        "self_attn.v_proj": (kv, a.hidden),
    }
    shapes |= {"self_attn.o_proj": (a.hidden, a.hidden), "mlp.gate_proj": (a.intermediate, a.hidden)}
    shapes |= {"mlp.up_proj": (a.intermediate, a.hidden), "mlp.down_proj": (a.hidden, a.intermediate)}
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    total, where = a.layers + 2, {}
    files = [{"model.embed_tokens.weight": (a.vocab, a.hidden)}]
    for i in range(a.layers):
        prefix = f"model.layers.{i}."
        norms = {f"{prefix}{n}.weight": (a.hidden,) for n in ("input_layernorm", "post_attention_layernorm")}
        files.append({f"{prefix}{n}.weight": s for n, s in shapes.items()} | norms)
    files.append({"lm_head.weight": (a.vocab, a.hidden), "model.norm.weight": (a.hidden,)})
    for i, tensors in enumerate(files):
        name = f"model-{i + 1:05}-of-{total:05}.safetensors"
        data = {n: torch.ones(s, dtype=torch.bfloat16) if len(s) == 1 else weight(*s) for n, s in tensors.items()}
        save_file(data, a.output / name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, name)
    index = {
        "metadata": {"total_size": sum(f.stat().st_size for f in a.output.glob("*.safetensors"))},
        "weight_map": where,
    }
    (a.output / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    main()
