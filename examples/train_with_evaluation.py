"""Trains the bundled model a little, and measures at each save what it will be worth in 4 bits.

    python examples/train_with_evaluation.py [STEPS]

Trackers are the Trainer's own: set report_to to "tensorboard", "wandb", "mlflow" or "trackio".
"""

import sys
import tempfile
from pathlib import Path

import torch
from quantkit_eval import QuantizedEvaluation
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

MODEL = Path(__file__).parent / "tiny-llama"
LENGTH = 128

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
ids = tokenizer((MODEL / "calibration.txt").read_text(), return_tensors="pt", verbose=False)["input_ids"][0]
windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        model,
        TrainingArguments(
            *(folder,), max_steps=steps, save_steps=steps // 2, logging_steps=steps // 2, report_to="none",
            per_device_train_batch_size=4, learning_rate=1e-5, disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": window, "labels": window} for window in windows],  # type: ignore[arg-type]
        processing_class=tokenizer,
        callbacks=[QuantizedEvaluation("rtn-w4a16", MODEL / "eval.txt", every=1, tokens=4096)],
    )  # fmt: skip
    trainer.train()
for row in trainer.state.log_history:
    if "eval_quantized_kl" in row:
        kl, own, made = (row[f"eval_{name}"] for name in ("quantized_kl", "perplexity", "quantized_perplexity"))
        print(f"step {row['step']}: KL {kl:.4f}, perplexity {own:.2f} -> {made:.2f} in 4 bits")
