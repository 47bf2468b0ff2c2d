"""Quantize one model with quantkit and with llm-compressor, turn by turn, on the same tokens; print both side by side.

    python -m venv /tmp/peer && /tmp/peer/bin/pip install llmcompressor
    python eval/peers/compare.py --peer /tmp/peer/bin/python --model examples/tiny-llama \
        --text examples/tiny-llama/calibration.txt --eval examples/tiny-llama/eval.txt --group-size 32

Seconds are measured inside each process, imports excluded, model loading included. KL is against the original model, by
quantkit's own evaluation, and for llm-compressor's folder through transformers' reading of it. A model without a
tokenizer (a random one) is given random tokens and is not evaluated.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
VARIANTS = {
    "llm-compressor GPTQ": (None, []),
    "quantkit GPTQ (no re-fit)": ("gptq-w4a16", ["weights.algorithm={gptq: {refit: false}}"]),
    "quantkit gptq-w4a16": ("gptq-w4a16", []),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="Python of the environment llm-compressor is installed in")
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", help="calibration text; random tokens without it")
    parser.add_argument("--eval", help="text to evaluate on")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        ids = Path(scratch) / "ids.safetensors"
        save_file({"ids": tokens(a)}, ids)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
        folders = {}
        for turn in range(a.repeat):
            for number, (name, (recipe, sets)) in enumerate(VARIANTS.items()):
                folders[name] = Path(scratch) / f"{number}-{turn}"
                runs[name].append(run(a, ids, folders[name], recipe, sets))
        rows = {name: summary(found) for name, found in runs.items()}
        if a.eval:
            for name, folder in folders.items():
                rows[name] |= evaluate(folder, a.model, a.eval)
    show(rows, a.json)


def tokens(a: argparse.Namespace) -> torch.Tensor:
    """The first samples x seq_len tokens of the text (or random ones), int64 [samples, seq_len]."""
    if not a.text:
        vocab = json.loads((Path(a.model) / "config.json").read_text())["vocab_size"]
        return torch.randint(vocab, (a.samples, a.seq_len), generator=torch.Generator().manual_seed(0))
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(a.model)(Path(a.text).read_text(), add_special_tokens=False).input_ids
    return torch.tensor(ids[: a.samples * a.seq_len]).reshape(-1, a.seq_len)


def run(a: argparse.Namespace, ids: Path, output: Path, recipe: str | None, sets: list[str]) -> dict[str, Any]:
    """One quantization in a process of its own; its JSON line."""
    if recipe is None:
        command = [a.peer, HERE / "llmcompressor_gptq.py"]
    else:
        command = [sys.executable, HERE / "quantkit_gptq.py", "--recipe", recipe, *(f"--set={item}" for item in sets)]
    command += [a.model, ids, output, "--group-size", str(a.group_size)]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "seconds": statistics.median(run["seconds"] for run in found),
        "all_seconds": [round(run["seconds"], 2) for run in found],
        "peak_mib": max(run["peak_bytes"] for run in found) / 2**20,
    }


def evaluate(folder: Path, reference: str, text: str) -> dict[str, Any]:
    from quantkit_eval import evaluate as measure

    result = measure(str(folder), ref=reference, text=text, tokens=16384, progress=False).texts[0]
    assert result.divergence is not None
    return {
        "kl": result.divergence.kl_mean.value,
        "top1": result.divergence.top1_agreement.value,
        "perplexity": result.model.perplexity.value,
    }


def show(rows: dict[str, dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    base = rows["llm-compressor GPTQ"]["seconds"]
    print(f"{'':28}{'seconds':>9}{'ratio':>7}{'peak MiB':>10}{'KL':>10}   every run")
    for name, row in rows.items():
        kl = f"{row['kl']:.5f}" if "kl" in row else "-"
        ratio = row["seconds"] / base
        print(f"{name:28}{row['seconds']:9.2f}{ratio:7.2f}{row['peak_mib']:10.0f}{kl:>10}   {row['all_seconds']}")


if __name__ == "__main__":
    main()
