"""Hashes of what eight recipes make of two small models: a change that should move no byte is checked with this.

    python tests/tools/golden_bytes.py > before.json        # on the old commit
    python tests/tools/golden_bytes.py before.json          # on the new one: names what differs, exit code 1

Hashes depend on the processor and on torch, so they are compared on one machine and never committed. One thread; about
two minutes. Of the report everything counts but the times, the memory and the recipe as it was written.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LLAMA = ROOT / "examples/tiny-llama"
CASES = {
    "rtn": ("rtn-w4a16", []),
    "awq": ("awq", []),
    "gptq with sweeps": ("gptq-w4a16", []),
    "smoothquant w8a8": ("w8a8", ["transforms=[smoothquant]"]),
    "fp8-kv": ("fp8-kv", []),
    "nvfp4a16": ("nvfp4a16", []),
    "rotation": ("rotation-gptq-w4a16", []),
    "mixed": ("mixed-fp8-w4a16", []),
}
UNSTABLE = ("seconds", "seconds_total", "peak_memory_bytes", "model", "versions", "quantkit")


def make_moe(folder: Path) -> None:
    """A random Qwen3-MoE with the tokenizer of the bundled model."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=4096, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128,
        max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    for file in LLAMA.glob("tokenizer*"):
        shutil.copy(file, folder)


def hashes(model: Path, recipe: str, settings: list[str], work: Path) -> dict[str, str]:
    """File name -> sha256 of what the recipe writes."""
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    data = f"calibration={{data: {LLAMA / 'calibration.txt'}, samples: 16, seq_len: 128}}"
    given = [data, "weights.group_size=32", *settings]
    if recipe in ("w8a8", "nvfp4a16", "fp8-kv", "mixed-fp8-w4a16"):
        given.remove("weights.group_size=32")
    command = [sys.executable, "-m", "quantkit", "quantize", "-r", recipe, "-m", str(model), "-o", str(out)]
    path = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "eval"))
    subprocess.run(
        [*command, *(word for setting in given for word in ("--set", setting))],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}, stdout=subprocess.DEVNULL, check=True,
    )  # fmt: skip
    found = {}
    for file in sorted(out.iterdir()):
        content = file.read_bytes()
        if file.name == "quantkit-report.json":
            report = json.loads(content)
            content = json.dumps({k: v for k, v in report.items() if k not in UNSTABLE}, sort_keys=True).encode()
        found[file.name] = hashlib.sha256(content).hexdigest()
    return found


def main() -> int:
    work = Path(tempfile.mkdtemp())
    make_moe(work / "moe")
    found = {
        f"{model.name}: {name}": hashes(model, recipe, settings, work)
        for model in (LLAMA, work / "moe")
        for name, (recipe, settings) in CASES.items()
    }
    shutil.rmtree(work)
    if len(sys.argv) < 2:
        print(json.dumps(found, indent=1))
        return 0
    before = json.loads(Path(sys.argv[1]).read_text())
    different = [
        f"{case}: {file}"
        for case in before.keys() | found.keys()
        for file in before.get(case, {}).keys() | found.get(case, {}).keys()
        if before.get(case, {}).get(file) != found.get(case, {}).get(file)
    ]
    print("\n".join(sorted(different)) or f"all files of {len(found)} runs are equal")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
