"""What a folder says of its quantization, by whichever file, and weights that nothing describes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantkit_eval import evaluate
from safetensors.torch import save_file

from quantkit.checkpoint.quantization_config import descriptions, quantization_config, without_quantization
from quantkit.checkpoint.reader import Checkpoint
from quantkit.conversion import convert
from quantkit.errors import UserError
from quantkit.inspection import inspect_folder
from quantkit.planner.estimate import estimate
from quantkit.quantization import pipeline
from quantkit.recipe import load as recipe
from quantkit.runtime.load import load
from quantkit.verification import verify_folder

PLAIN = {"model.layers.0.q_proj.weight": torch.zeros(4, 4), "model.norm.weight": torch.ones(4)}
CODES = torch.zeros(4, 4, dtype=torch.uint8)


def folder(
    path: Path, tensors: dict[str, torch.Tensor], files: dict[str, Any] | None = None, **config: Any
) -> Checkpoint:
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    for name, content in (files or {}).items():
        (path / name).write_text(json.dumps(content))
    return Checkpoint.open(path)


def test_nothing_and_null_are_plain(tmp_path: Path) -> None:
    assert quantization_config(folder(tmp_path / "a", PLAIN)) is None
    null = {"quantization_config": None, "compression_config": None, "text_config": {"quantization_config": None}}
    assert quantization_config(folder(tmp_path / "b", PLAIN, **null)) is None
    assert without_quantization({"a": 1, "text_config": {"b": 2, "quantization_config": {}}}) == {
        "a": 1, "text_config": {"b": 2},
    }  # fmt: skip


SAID: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "inline": ({"quantization_config": {"quant_method": "awq"}}, {}, "awq"),
    "the older key": ({"compression_config": {"format": "pack-quantized"}}, {}, "compressed-tensors"),
    "of the text model": ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, {}, "fp8"),
    "modelopt's file": ({}, {"hf_quant_config.json": {"quantization": {"quant_algo": "FP8"}}}, "modelopt"),
    "awq's file": ({}, {"quant_config.json": {"w_bit": 4, "q_group_size": 128}}, "awq"),
    "gptq's file": ({}, {"quantize_config.json": {"bits": 4}}, "gptq"),
    "null beside a file": ({"quantization_config": None}, {"quantize_config.json": {"bits": 4}}, "gptq"),
    "both, agreeing": (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}}, {"quantize_config.json": {"bits": 4}}, "gptq",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SAID)
def test_every_place_is_read(tmp_path: Path, case: str) -> None:
    config, files, method = SAID[case]
    settings = quantization_config(folder(tmp_path / "m", PLAIN, files, **config))
    assert settings is not None
    assert settings["quant_method"] == method


@pytest.mark.parametrize(
    ("config", "files", "words"),
    [
        ({"quantization_config": []}, {}, "is a list, expected an object or null"),
        ({"quantization_config": "awq"}, {}, "is a str, expected an object or null"),
        ({"quantization_config": {}}, {}, "must name its quant_method"),
        ({"quantization_config": {"quant_method": 4}}, {}, "must name its quant_method"),
        (
            {"quantization_config": {"quant_method": "awq"}},
            {"hf_quant_config.json": {"quantization": {}}},
            "contradict",
        ),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            {"quantize_config.json": {"bits": 8}},
            "bits is 4 and 8",
        ),
        (
            {"quantization_config": {"quant_method": "awq", "group_size": 64}},
            {"quant_config.json": {"q_group_size": 128}},
            "group_size is 64 and 128",
        ),
    ],
)
def test_what_cannot_be_meant(tmp_path: Path, config: dict[str, Any], files: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        quantization_config(folder(tmp_path / "m", PLAIN, files, **config))


UNDESCRIBED = {
    "fp8": {"l.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)},
    "e5m2": {"l.weight": torch.zeros(4, 4).to(torch.float8_e5m2)},
    "int8": {"l.weight": CODES.to(torch.int8)},
    "uint8": {"l.weight": CODES},
    "int32": {"l.qweight": CODES.to(torch.int32)},
    "packed": {"l.weight_packed": CODES.to(torch.int32)},
    "a scale beside": {"l.weight": torch.zeros(4, 4), "l.weight_scale": torch.ones(1)},
    "an inverse scale": {"l.weight": torch.zeros(4, 4), "l.weight_scale_inv": torch.ones(1, 1)},
    "a zero point": {"l.weight": torch.zeros(4, 4), "l.weight_zero_point": torch.ones(1)},
    "scales alone": {"l.weight": torch.zeros(4, 4), "l.scales": torch.ones(4)},
    "an input's scale": {"l.weight": torch.zeros(4, 4), "l.input_scale": torch.ones(1)},
    "bitsandbytes": {"l.weight": torch.zeros(4, 4), "l.weight.absmax": torch.ones(4)},
    "experts in MX blocks": {"e.gate_up_proj_blocks": CODES, "e.gate_up_proj_scales": CODES.clone()},
}


@pytest.mark.parametrize("kind", UNDESCRIBED)
def test_weights_that_nothing_describes(tmp_path: Path, kind: str) -> None:
    checkpoint = folder(tmp_path / "m", PLAIN | UNDESCRIBED[kind])
    with pytest.raises(UserError, match="nothing describes its codes and scales"):
        quantization_config(checkpoint)
    assert quantization_config(
        folder(tmp_path / "m", PLAIN | UNDESCRIBED[kind], quantization_config={"quant_method": "x"})
    )


def test_what_plain_models_store_too(tmp_path: Path) -> None:
    """Causal masks in bytes, integer buffers, layer scales, a vector beside a vector."""
    kept = {
        "h.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "h.attn.mask": torch.ones(4, 4, dtype=torch.bool),
        "position_ids": torch.arange(4),
        "norm.scale": torch.ones(4),
        "layer_scale.weight": torch.ones(4),
    }
    assert quantization_config(folder(tmp_path / "m", PLAIN | kept)) is None
    assert not descriptions(folder(tmp_path / "m", PLAIN | kept))


@pytest.fixture(scope="module")
def undescribed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An FP8 folder of ours whose config.json forgot it."""
    root = Path(__file__).resolve().parents[2] / "examples/tiny-llama"
    out = tmp_path_factory.mktemp("fp8") / "out"
    pipeline.quantize(recipe.load("fp8-dynamic", ["output.engine=null"], str(root)), out, progress=False)
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("verb", ["quantize", "load", "eval", "inspect", "convert", "plan"])
def test_every_verb_refuses_them_in_the_same_words(undescribed: Path, tmp_path: Path, verb: str) -> None:
    text = Path(__file__).resolve().parents[2] / "examples/tiny-llama/eval.txt"
    loaded = recipe.load("fp8-dynamic", ["output.engine=null"], str(undescribed))
    run = {
        "quantize": lambda: pipeline.quantize(loaded, tmp_path / "out", progress=False),
        "load": lambda: load(undescribed),
        "eval": lambda: evaluate(undescribed, text=text, tokens=1024, progress=False),
        "inspect": lambda: inspect_folder(undescribed),
        "convert": lambda: convert(undescribed, tmp_path / "out", "fp8_tensor"),
        "plan": lambda: estimate(loaded, undescribed),
    }[verb]
    with pytest.raises(UserError, match="nothing describes its codes and scales"):
        run()
    assert not list(tmp_path.iterdir())


def test_verify_finds_them(undescribed: Path) -> None:
    verdict = verify_folder(undescribed, "vllm")
    assert verdict.verdict == "refused"
    assert any(finding.rule == "no-config" for finding in verdict.findings)
