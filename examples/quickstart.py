"""A first session with quantkit, cell by cell (`# %%` opens as a notebook in VS Code, Spyder and Jupytext).

    python examples/quickstart.py [MODEL] [FOLDER]

MODEL is a Hub id or a folder (default: the bundled model), FOLDER a new one for the results.
"""

# %% A model, and a place for what is made
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

import quantkit

MODEL = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "tiny-llama")
FOLDER = Path(sys.argv[2] if len(sys.argv) > 2 else "out/quickstart")

# %% Which recipe? Bits per weight, activations, whether it needs calibration, KL on the bundled model
for row in quantkit.recipes():
    kl = row.measured.kl if row.measured else None
    print(
        f"{row.name:20} {row.bits_per_weight:5.2f} bits  {row.activations:12} calibration {row.calibration:7} KL {kl}"
    )

# %% What will it take?
plan = quantkit.plan(MODEL, "gptq-w4a16")
print(f"{plan.bytes_after / 1e6:.1f} MB, {plan.peak_memory_bytes / 1e9:.1f} GB of memory, {plan.seconds_total:.0f} s")

# %% Quantize: calibrated on the texts that ship with quantkit. Yours: calibration="my.jsonl", or a list of texts
report = quantkit.quantize(MODEL, "gptq-w4a16", FOLDER / "w4")
print(f"{report.coverage}; {report.bits_per_weight:.2f} bits per weight; unseen text: {report.held_out}")

# %% Will an engine load it, and how far is it from the original?
print("vLLM:", quantkit.verify(FOLDER / "w4", "vllm").verdict)
result = quantkit.evaluate(FOLDER / "w4", ref=MODEL, tokens=8192)
print(result.to_json()["texts"][0]["kl"]["mean"])

# %% Use it: weights stay packed
tokenizer = AutoTokenizer.from_pretrained(FOLDER / "w4")
model = quantkit.load(FOLDER / "w4")
inputs = tokenizer("def main(", return_tensors="pt", add_special_tokens=False)
with torch.inference_mode():
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=24, do_sample=False)[0]))

# %% The same codes in another layout
print(quantkit.convert(FOLDER / "w4", FOLDER / "w4-gptq", "gptq").to_json()["converted"])
