"""Generate text with a folder that quantkit wrote (or any dense one); its weights stay packed in memory.

python examples/generate.py out/tiny-llama-awq "def main("
"""

import sys

import torch
from transformers import AutoTokenizer

import quantkit

if __name__ == "__main__":
    path = sys.argv[1] if len(sys.argv) > 1 else "out/tiny-llama-awq"
    prompt = sys.argv[2] if len(sys.argv) > 2 else "def main("
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = quantkit.load(path)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))
