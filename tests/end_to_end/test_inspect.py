"""What inspect says of folders written here by hand, tensor by tensor, so that every figure is known beforehand."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from quantkit.errors import UserError
from quantkit.inspection import (
    inspect_folder,
)
from quantkit.report.console import (
    render_inspection,
)

N, K, VOCABULARY, GROUP = 16, 64, 40, 32


def write(folder: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any] | None, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    content = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY, **config}
    if quantization:
        content["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(content))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def config(groups: dict[str, dict[str, Any]], ignore: list[str], method: str = "compressed-tensors") -> dict[str, Any]:
    acts = {"input_activations": None, "output_activations": None, "format": "pack-quantized"}
    return {
        "quant_method": method,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": acts | group for i, group in enumerate(groups.values())},
        "ignore": ignore,
    }


def weights(bits: int, group_size: int | None, symmetric: bool) -> dict[str, Any]:
    strategy = {"strategy": "channel"} if group_size is None else {"strategy": "group", "group_size": group_size}
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False, **strategy}


def packed(name: str, bits: int, groups: int, symmetric: bool, *, shape: bool = True) -> dict[str, torch.Tensor]:
    tensors = {
        f"{name}.weight_packed": torch.zeros(N, -(-K * bits // 32), dtype=torch.int32),
        f"{name}.weight_scale": torch.ones(N, groups, dtype=torch.bfloat16),
    }
    if shape:
        tensors[f"{name}.weight_shape"] = torch.tensor([N, K])
    if not symmetric:
        tensors[f"{name}.weight_zero_point"] = torch.zeros(-(-N * bits // 32), groups, dtype=torch.int32)
    return tensors


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Layers: asymmetric 4-bit groups with bias, 8-bit channels; dense: an ignored one, head, embedding, norm."""
    tensors = packed("model.layers.0.q_proj", 4, K // GROUP, symmetric=False)
    tensors |= packed("model.layers.1.q_proj", 8, 1, symmetric=True)
    tensors |= {
        "model.layers.0.gate.weight": torch.zeros(8, K, dtype=torch.bfloat16),
        "model.layers.0.q_proj.bias": torch.zeros(N, dtype=torch.bfloat16),
        "model.layers.0.norm.weight": torch.zeros(K, dtype=torch.bfloat16),
        "model.embed_tokens.weight": torch.zeros(VOCABULARY, K, dtype=torch.bfloat16),
        "lm_head.weight": torch.zeros(VOCABULARY, K, dtype=torch.bfloat16),
    }
    groups = {
        "a": {"targets": ["model.layers.0.q_proj"], "weights": weights(4, GROUP, symmetric=False)},
        "b": {"targets": [r"re:.*layers\.1\..*"], "weights": weights(8, None, symmetric=True)},
    }
    return write(tmp_path / "mixed", tensors, config(groups, ["lm_head", r"re:.*gate$"]))


def test_schemes_and_bits(mixed: Path) -> None:
    found = inspect_folder(mixed)
    first, second = found["modules"].values()
    assert list(found["modules"]) == ["model.layers.0.q_proj", "model.layers.1.q_proj"]
    assert (first["scheme"], second["scheme"]) == ("int4 asym g32", "int8 sym channel")
    assert first["shape"] == second["shape"] == [N, K]
    first_bits = N * K * 4 + N * 2 * 16 + N * 2 * 4  # codes, scales, zero points
    second_bits = N * K * 8 + N * 16
    assert first["bits_per_weight"] == first_bits / (N * K)
    assert second["bits_per_weight"] == second_bits / (N * K)
    assert found["bits_per_weight"]["quantized"] == (first_bits + second_bits) / (2 * N * K)
    parameters = 2 * N * K + 8 * K + N + K + 2 * VOCABULARY * K
    stored = (first_bits + second_bits) // 8 + 2 * 16 + 2 * (parameters - 2 * N * K)
    assert found["parameters"] == parameters
    assert found["bytes"] == stored
    assert found["bf16_bytes"] == 2 * parameters
    assert found["bits_per_weight"]["model"] == 8 * stored / parameters
    assert sum(kind["bytes"] for kind in found["kinds"].values()) == stored
    assert found["kinds"]["zero points"] == {"tensors": 1, "bytes": N * 2 * 4 // 8}
    assert found["kinds"]["scales"] == {"tensors": 2, "bytes": 3 * 2 * N}


def test_reasons(mixed: Path) -> None:
    reasons = {entry["name"]: entry["reason"] for entry in inspect_folder(mixed)["unquantized"]}
    assert reasons == {
        "lm_head.weight": "ignored by the recipe",
        "model.embed_tokens.weight": "embeddings are never quantized",
        "model.layers.0.gate.weight": "ignored by the recipe",
        "model.layers.0.norm.weight": "norms and vectors are never quantized",
        "model.layers.0.q_proj.bias": "biases are never quantized",
    }
    skipped = {"skipped": [{"name": "model.layers.0.gate", "reason": "a router"}]}
    (mixed / "quantkit-report.json").write_text(json.dumps(skipped))
    reasons = {entry["name"]: entry["reason"] for entry in inspect_folder(mixed)["unquantized"]}
    assert reasons["model.layers.0.gate.weight"] == "a router"
    (mixed / "quantkit-report.json").write_text("[]")
    with pytest.raises(UserError, match=r"quantkit-report\.json: not a report"):
        inspect_folder(mixed)


def test_columns_without_weight_shape(tmp_path: Path) -> None:
    tensors = packed("a.q_proj", 3, K // GROUP, symmetric=True, shape=False)
    group = {"targets": ["Linear"], "weights": weights(3, GROUP, symmetric=True)}
    found = inspect_folder(write(tmp_path / "m", tensors, config({"a": group}, [])))
    assert found["modules"]["a.q_proj"]["shape"] == [N, K]
    assert found["modules"]["a.q_proj"]["bits_per_weight"] == 3 + 16 / GROUP
    channel = {"targets": ["Linear"], "weights": weights(3, None, symmetric=True)}
    tensors = packed("a.q_proj", 3, 1, symmetric=True, shape=False)
    with pytest.raises(UserError, match=r"a\.q_proj: .*needs the tensors weight_shape"):
        inspect_folder(write(tmp_path / "m", tensors, config({"a": channel}, [])))


def test_dense_and_tied(tmp_path: Path) -> None:
    tensors = {
        "model.embed_tokens.weight": torch.zeros(VOCABULARY, K),
        "model.layers.0.q_proj.weight": torch.zeros(N, K),
    }
    found = inspect_folder(write(tmp_path / "m", tensors, None, tie_word_embeddings=True))
    assert found["modules"] == {}
    assert found["bits_per_weight"] == {"quantized": None, "model": 32.0}
    reasons = {entry["name"]: entry["reason"] for entry in found["unquantized"]}
    assert reasons["model.layers.0.q_proj.weight"] == "the folder is not quantized"
    assert reasons["lm_head"] == "tied to the embedding"
    assert found["shards"][0]["file"] == "model.safetensors"
    assert found["shards"][0]["bytes"] == (tmp_path / "m" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors"])
def test_what_it_cannot_read_is_said(tmp_path: Path, method: str) -> None:
    group = {"targets": ["Linear"], "weights": weights(4, GROUP, symmetric=True) | {"type": "float"}}
    tensors = packed("a.q_proj", 4, K // GROUP, symmetric=True)
    found = inspect_folder(write(tmp_path / "m", tensors, config({"a": group}, [], method)))
    assert found["note"]
    assert found["parameters"] is None
    assert found["bf16_bytes"] is None
    assert found["bytes"] == sum(t.nbytes for t in tensors.values())
    assert {entry["reason"] for entry in found["unquantized"]} == {"packed in a way quantkit does not read"}
    console = Console(record=True, width=120, file=StringIO())
    render_inspection(found, console)
    assert found["note"][:20] in console.export_text()


def test_rendering(mixed: Path) -> None:
    found = inspect_folder(mixed)
    assert json.loads(json.dumps(found)) == found
    console = Console(record=True, width=120, file=StringIO())
    render_inspection(found, console)
    shown = console.export_text()
    for text in ("int4 asym g32", "int8 sym channel", "model.layers.*.q_proj", "ignored by the recipe", "zero points"):
        assert text in shown


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent"):
        inspect_folder(tmp_path / "absent")
    with pytest.raises(UserError, match=r"config\.json"):
        inspect_folder(tmp_path)
