"""Run by test_gptqmodel.py in an environment that has gptqmodel: logits of folders that transformers loads.

python gptqmodel_logits.py OUT FOLDER...   OUT: a torch file, folder -> (logits, tensors that found no place)
"""

import sys

import torch
from transformers import AutoModelForCausalLM

IDS = torch.arange(32).reshape(1, 32) * 13 % 512


def main() -> None:
    found = {}
    for folder in sys.argv[2:]:
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, output_loading_info=True)
        with torch.inference_mode():
            logits = model(IDS).logits.float()
        found[folder] = logits, sum(len(info[f"{what}_keys"]) for what in ("missing", "unexpected", "mismatched"))
    torch.save(found, sys.argv[1])


if __name__ == "__main__":
    main()
