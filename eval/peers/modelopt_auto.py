"""ModelOpt's auto_quantize on the candidates of `quantkit auto`: its choice as a recipe of quantkit's.

    python -m venv /tmp/peer && /tmp/peer/bin/pip install nvidia-modelopt transformers accelerate datasets requests
    /tmp/peer/bin/python eval/peers/modelopt_auto.py --model M --calibration TEXT --bits 4.5 > modelopt.yaml
    quantkit quantize --recipe modelopt.yaml --output OUT && quantkit eval OUT --ref M --text EVAL --tokens 16384

Both choices are then run by the same GPTQ, so the figures tell the choices apart and not the rounding. Formats are told
their true size (`effective_bits`, scales included); whole rows are left out, whose size depends on the layer.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def formats(bits: list[int], groups: list[int]) -> list[tuple[dict[str, Any], str]]:
    """ModelOpt's configurations of integer weights, each with its name."""
    found = []
    for b in bits:
        for g in groups:
            entries = [
                {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": b, "block_sizes": {-1: g}}},
                {"quantizer_name": "*input_quantizer", "enable": False},
            ]
            config = {"quant_cfg": entries, "algorithm": "max", "effective_bits": b + 16 / g}
            found.append((config, f"{b} {g}"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--bits", type=float, required=True, help="per weight of the linears")
    parser.add_argument("--method", default="kl_div", choices=["kl_div", "gradient"])
    a = parser.parse_args()
    import modelopt.torch.quantization as mtq

    tokenizer = AutoTokenizer.from_pretrained(a.model)
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32).eval()
    ids = tokenizer(Path(a.calibration).read_text(), add_special_tokens=False, return_tensors="pt").input_ids[0]
    batches = list(ids[: 128 * 256].view(16, 8, 256))
    linears = {name: m.weight.numel() for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    head = sum(size for name, size in linears.items() if "lm_head" in name)  # counts, though it is disabled
    bits = (a.bits * (sum(linears.values()) - head) + 16 * head) / sum(linears.values())
    known = formats([3, 4, 5, 6], [32, 64, 128])
    with contextlib.redirect_stdout(sys.stderr):
        model, state = mtq.auto_quantize(
            model,
            constraints={"effective_bits": bits},
            quantization_formats=[config for config, _ in known],
            data_loader=[{"input_ids": batch} for batch in batches],
            forward_step=lambda m, batch: m(**batch) if a.method == "gradient" else m(**batch).logits,
            loss_func=lambda output, batch: torch.nn.functional.cross_entropy(
                output.logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten()
            ),
            disabled_layers=["*lm_head*"],
            num_calib_steps=len(batches),
            num_score_steps=2,
            method=a.method,
        )
    print(f"# by ModelOpt's auto_quantize, {a.method}: {state['best']['constraints']}")
    print(f"model: {json.dumps(str(a.model))}")
    print(f"calibration: {{data: {json.dumps(str(a.calibration))}, samples: 128, seq_len: 256}}")
    print("weights: {bits: 4, algorithm: {gptq: {sweeps: 2}}}\noverrides:")
    for name, module in model.named_modules():
        quantizer: Any = getattr(module, "weight_quantizer", None)
        if name not in linears or "lm_head" in name:
            continue
        if not quantizer.is_enabled:
            print(f"  - {{match: {name}, skip: true}}")
            continue
        size = (quantizer.block_sizes or {}).get(-1)
        print(f"  - {{match: {name}, weights: {{bits: {quantizer.num_bits}, group_size: {size}}}}}")


if __name__ == "__main__":
    main()
