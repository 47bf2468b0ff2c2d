"""What SmoothQuant is for, on the bundled model: a few loud channels ruin 8-bit inputs with one range, and come back.

Four channels of each block's norms are multiplied by 32 or 64 and the columns that read them divided by as much. The
float model computes the same; what changes is what one range for all inputs of a linear has to cover.

    python examples/smoothquant_outliers.py [MODEL CALIBRATION.txt EVAL.txt]
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from quantkit_eval import TextResult, evaluate
from safetensors.torch import load_file, save_file

import quantkit

HERE = Path(__file__).parent
TINY = HERE / "tiny-llama"
FACTORS = (32.0, 64.0, 64.0, 32.0)  # powers of two: exact in every float type
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
STATIC_W8A8 = {"scheme": "W8A8", "activations": {"type": "int8", "dynamic": False}}


def plant(source: Path, target: Path) -> None:
    """Write the Llama in `source` with loud channels, others in every norm, into the new folder `target`."""
    shutil.copytree(source, target)
    file = target / "model.safetensors"
    tensors = load_file(file)
    layers = json.loads((source / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    generator = torch.Generator().manual_seed(0)
    for layer in range(layers):
        for norm, readers in READERS.items():
            weight_K = tensors[f"model.layers.{layer}.{norm}.weight"]
            loud = torch.randperm(len(weight_K), generator=generator)[: len(FACTORS)]
            factors = torch.tensor(FACTORS, dtype=weight_K.dtype)
            weight_K[loud] *= factors
            for reader in readers:
                tensors[f"model.layers.{layer}.{reader}.weight"][:, loud] /= factors
    save_file(tensors, file, metadata={"format": "pt"})


def measure(
    model: Path, transforms: list[Any], work: Path, calibration: dict[str, Any], text: Path, tokens: int
) -> TextResult:
    """Quantize to static W8A8 behind `transforms` and evaluate against the float model it was made from."""
    output = work / f"{model.name}-{len(list(work.iterdir()))}"
    recipe = STATIC_W8A8 | {"calibration": calibration, "transforms": transforms}
    quantkit.quantize(model, recipe, output, progress=False)
    return evaluate(output, ref=model, text=text, tokens=tokens, progress=False).texts[0]


def rows(
    source: Path, text: Path, calibration: dict[str, Any], work: Path, tokens: int
) -> list[tuple[str, str, TextResult]]:
    """(model, scheme, what evaluate found) of each line of the table."""
    planted = work / "planted"
    plant(source, planted)
    cases = [
        ("as trained", source, []),
        ("with loud channels", planted, []),
        ("with loud channels", planted, ["smoothquant"]),
    ]
    name = "W8A8, static inputs per tensor"
    return [
        (kind, " after ".join([name, *transforms]), measure(model, transforms, work, calibration, text, tokens))
        for kind, model, transforms in cases
    ]


def main() -> None:
    given = [Path(argument) for argument in sys.argv[1:4]] or [TINY, TINY / "calibration.txt", TINY / "eval.txt"]
    calibration = {"data": str(given[1]), "samples": 64, "seq_len": 256}
    print("| model | scheme | perplexity | KL |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        found = rows(given[0], given[2], calibration, Path(folder), 32768)
        for kind, scheme, result in found:
            divergence = result.divergence
            assert divergence is not None
            if result is found[0][2]:
                print(f"| as trained | bfloat16 | {divergence.reference.perplexity.value:.3f} | 0 |")
            kl = divergence.kl_mean
            half, perplexity = (kl.high - kl.low) / 2, result.model.perplexity.value
            print(f"| {kind} | {scheme} | {perplexity:.3f} | {kl.value:.5f} ± {half:.5f} |")
    print(f"{found[0][2].tokens} tokens of {given[2].name} in {found[0][2].windows} windows")


if __name__ == "__main__":
    main()
