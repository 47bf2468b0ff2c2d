"""Runs in llm-compressor's own environment: GPTQ W4A16 on given token ids; prints its seconds and peak memory as JSON.

python llmcompressor_gptq.py MODEL IDS.safetensors OUTPUT --group-size 32 [--method gptq|rtn|awq]
"""

import argparse
import json
import os
import resource
import time

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("ids")
    parser.add_argument("output")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--method", choices=["gptq", "rtn"], default="gptq")
    parser.add_argument("--dtype", default="float32")
    a = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    ids = load_file(a.ids)["ids"]
    begin = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=getattr(torch, a.dtype))
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=a.group_size)
    scheme = {
        "config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        "ignore": ["lm_head"],
    }
    if a.method == "rtn":
        oneshot(model=model, recipe=[QuantizationModifier(**scheme)])
    else:
        data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
        recipe = [GPTQModifier(**scheme, actorder="static")]
        # It insists on a processor, though the data are token ids; a random model has none.
        processor = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, "?")))
        sizes = {"num_calibration_samples": len(ids), "max_seq_length": ids.shape[1]}
        oneshot(model=model, processor=processor, dataset=data, recipe=recipe, **sizes)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model.save_pretrained(a.output, save_compressed=True)
    print(json.dumps({"seconds": seconds, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
