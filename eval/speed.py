"""Run a quantized model on quantkit's kernels and with its weights dequantized at every call, turn by turn.

    python eval/speed.py --model examples/tiny-llama [--set scheme=W4A16] [--dtype float32]
    python eval/speed.py --random 1B --set weights.group_size=128

Prints, for evaluation (batches of text) and for decoding (one new token for each sequence), seconds of both and their
ratio, what the packed model takes in memory, and the largest difference of log-probabilities. --random 1B quantizes a
Llama of that size with random weights (2 GB on disk for a while).
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import quantkit
from quantkit.recipe.load import load as load_recipe
from quantkit.runtime.quant_linear import QuantLinear

SIZES = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 32000},
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 256},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model that is not quantized yet")
    parser.add_argument("--random", choices=SIZES, help="a model of this size instead")
    parser.add_argument("--recipe", default="rtn-w4a16")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="changes of the recipe; codes are rounded to nearest",
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--tokens", type=int, default=2048, help="of evaluation, in sequences of 256")
    parser.add_argument("--decode", type=int, default=16, help="new tokens")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    if (a.model is None) == (a.random is None):
        parser.error("give --model or --random")
    with tempfile.TemporaryDirectory() as scratch:
        source = a.model or random_model(a.random, Path(scratch) / "source")
        recipe = load_recipe(
            a.recipe, [*a.set, "weights.algorithm=rtn", "calibration=null", "output.engine=null"], model=str(source)
        )
        quantkit.quantize(None, recipe, Path(scratch) / "quantized", progress=False)
        dtype = getattr(torch, a.dtype)
        models = [quantkit.load(Path(scratch) / "quantized", dtype=dtype) for _ in range(2)]
        found = measure(*models, a.tokens, a.decode, a.repeat)
    if a.json:
        print(json.dumps(found, indent=1))
        return
    print(f"{found['layers']} layers on {', '.join(found['kernels'])}; packed weights {found['megabytes']:.1f} MB")
    for what in ("evaluation", "decoding"):
        row = found[what]
        slow, fast = row["dequantized"], row["kernels"]
        print(f"{what:<11} dequantized {slow:8.3f} s   kernels {fast:8.3f} s   {row['ratio']:.1f} times faster")
    print(f"largest difference of log-probabilities {found['difference']:.2g}")


def random_model(size: str, folder: Path) -> Path:
    """A Llama with random weights in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES[size], max_position_embeddings=2048, dtype=torch.bfloat16)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@torch.inference_mode()
def measure(model: PreTrainedModel, slow: PreTrainedModel, tokens: int, new: int, repeat: int) -> dict[str, Any]:
    """Medians of turns between the model and `slow`, the same one, whose weights are dequantized at every call."""
    layers = quant_linears(model)
    packed = sum(buffer.nbytes for layer in layers for buffer in layer.buffers())
    for layer in quant_linears(slow):
        layer._refused = slow.device, slow.dtype
    ids = torch.randint(
        model.config.vocab_size, (max(1, tokens // 256), 256), generator=torch.Generator().manual_seed(0)
    )

    def evaluate(which: PreTrainedModel) -> torch.Tensor:
        return torch.stack([which(row[None], use_cache=False).logits[0].float().log_softmax(-1) for row in ids])

    def decode(which: PreTrainedModel) -> torch.Tensor:
        return which.generate(ids[:1, :8], max_new_tokens=new, min_new_tokens=new, do_sample=False)

    difference = (evaluate(model) - evaluate(slow)).abs().max().item()  # the first call repacks
    found = {
        "layers": len(layers),
        "kernels": sorted({layer.kernel.name if layer.kernel else "none" for layer in layers}),
    }
    found |= {"megabytes": packed / 1e6, "difference": difference}
    for name, task in (("evaluation", evaluate), ("decoding", decode)):
        seconds: dict[str, list[float]] = {"kernels": [], "dequantized": []}
        for _ in range(repeat):
            for way, which in (("kernels", model), ("dequantized", slow)):
                began = time.perf_counter()
                task(which)
                seconds[way].append(time.perf_counter() - began)
        medians = {way: statistics.median(times) for way, times in seconds.items()}
        found[name] = medians | {"ratio": medians["dequantized"] / medians["kernels"], "samples": seconds}
    return found


def quant_linears(model: PreTrainedModel) -> list[QuantLinear]:
    return [module for module in model.modules() if isinstance(module, QuantLinear)]


if __name__ == "__main__":
    try:
        main()
    except quantkit.UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
