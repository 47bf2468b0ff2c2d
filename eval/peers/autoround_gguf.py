"""Runs in AutoRound's own environment: `--format gguf:q4_k_m --iters 0` of a model; prints its seconds as JSON.

    python autoround_gguf.py MODEL TEXT OUTPUT.gguf --seq-len 256

Its exporter names the pre-tokenizer by the hash of a fixed text's tokens and stops at a tokenizer it has not met. Here
it is given a name instead (--pre, one that llama.cpp knows); the weights are as it makes them. All windows of the text
are used.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

HERE = str(Path(__file__).resolve().parent)
sys.path[:] = [place for place in sys.path if place != HERE]  # a file here is called like the package `gguf`

import torch  # noqa: E402
from auto_round import AutoRound  # noqa: E402
from auto_round.export.export_to_gguf import llama_cpp_conversion  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def name_the_pre_tokenizer(name: str) -> None:
    """AutoRound imports llama.cpp's converter under a name of its own while it exports: changed right behind that."""
    original = llama_cpp_conversion._import_conversion_from

    def imported(*arguments: object) -> object:
        context = original(*arguments)
        base = sys.modules["conversion.base"]
        base.TextModel.get_vocab_base_pre = lambda self, tokenizer: name
        return context

    llama_cpp_conversion._import_conversion_from = imported


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--pre", default="gpt-2")
    a = parser.parse_args()
    name_the_pre_tokenizer(a.pre)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    ids = torch.tensor(tokenizer(a.text.read_text(), add_special_tokens=False).input_ids)
    windows = ids[: len(ids) // a.seq_len * a.seq_len].reshape(-1, a.seq_len)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in windows]
    begin = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32)
    data = torch.utils.data.DataLoader(rows, batch_size=8)
    sizes = {"seqlen": a.seq_len, "nsamples": len(rows), "batch_size": 8}
    with tempfile.TemporaryDirectory(dir=a.output.parent) as scratch:
        autoround = AutoRound(model, tokenizer, scheme="gguf:q4_k_m", iters=0, dataset=data, device_map="cpu", **sizes)
        autoround.quantize_and_save(scratch, format="gguf:q4_k_m")
        seconds = time.perf_counter() - begin
        shutil.move(next(Path(scratch).rglob("*.gguf")), a.output)
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
