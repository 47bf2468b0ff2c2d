"""transformers reads our folders through compressed-tensors: every tensor finds its place and the logits agree."""

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import UserError
from quantkit.formats.compressed_tensors import tensors as ct
from quantkit.runtime.load import load
from quantkit.types import TensorSpec
from tests.interop.packing import pack_folder
from tests.interop.tiny_llama import save_tiny_llama

pytestmark = pytest.mark.interop
pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
pytest.importorskip("accelerate", reason="transformers needs accelerate for quantized folders")

IDS = torch.arange(32).reshape(1, 32) * 13 % 512


@torch.inference_mode()
def logits(folder: Path, dtype: torch.dtype, **options: object) -> tuple[Tensor, dict[str, set]]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    return model(IDS).logits.float(), info


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def lost(info: dict[str, set]) -> list[int]:
    return [len(info[f"{what}_keys"]) for what in ("missing", "unexpected", "mismatched")]


@pytest.fixture
def folders(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """Packed and dense folder; the parameter holds pack_folder's options, and `tied`."""
    options = dict(getattr(request, "param", {"spec": TensorSpec(4, 128, True)}))
    dtype = options.pop("dtype", torch.bfloat16)
    save_tiny_llama(tmp_path / "source", tied=options.pop("tied", False), dtype=dtype)
    pack_folder(tmp_path / "source", tmp_path / "packed", tmp_path / "dense", **options)
    return tmp_path / "packed", tmp_path / "dense"


def mixed(name: str) -> TensorSpec | None:
    if name.endswith("layers.0.mlp.down_proj"):
        return None
    return TensorSpec(8, -1, True) if "v_proj" in name or "layers.1.mlp.down" in name else TensorSpec(4, 64, True)


CASES = {
    "w4 g128": {"spec": TensorSpec(4, 128, True)},
    "w4 g32, half the scales negative": {"spec": TensorSpec(4, 32, True), "negative": True},
    "w4 g128 tied": {"spec": TensorSpec(4, 128, True), "tied": True},
    "w4 g128 fp16": {"spec": TensorSpec(4, 128, True), "dtype": torch.float16},
    "w3 g64": {"spec": TensorSpec(3, 64, True)},
    "w8 channel": {"spec": TensorSpec(8, -1, True)},
    "mixed, one layer plain, three shards": {"spec": mixed, "max_shard": 400_000},
}


@pytest.mark.parametrize("folders", CASES.values(), ids=CASES, indirect=True)
def test_loads_whole_and_agrees(folders: tuple[Path, Path]) -> None:
    packed, dense = folders
    dtype = Checkpoint.open(dense).dtype
    exact, _ = logits(dense, torch.float32)
    theirs, info = logits(packed, dtype)
    assert lost(info) == [0, 0, 0]
    floor = relative(logits(dense, dtype)[0], exact)
    assert relative(theirs, exact) <= max(1.5 * floor, 1e-6)
    with torch.inference_mode():
        assert relative(load(packed)(IDS).logits.float(), theirs) <= 1.5 * floor


@pytest.mark.parametrize("folders", [{"spec": TensorSpec(b, 32, False)} for b in (4, 8)], indirect=True, ids=str)
def test_asymmetric(folders: tuple[Path, Path]) -> None:
    """transformers 5.23 with compressed-tensors 0.20 forgets to pack the zero points of the model it loads into, so the
    weights are dequantized at load; where that bug is absent the plain way works as well."""
    from transformers import CompressedTensorsConfig

    packed, dense = folders
    exact, _ = logits(dense, torch.float32)
    floor = relative(logits(dense, torch.bfloat16)[0], exact)
    theirs, info = logits(packed, torch.bfloat16, quantization_config=CompressedTensorsConfig(dequantize=True))
    assert lost(info) == [0, 0, 0]
    assert relative(theirs, exact) <= 1.5 * floor


def without(packed: Path, key: str, entry: str | None = None) -> dict:
    config = json.loads((packed / "config.json").read_text())
    settings = config["quantization_config"]
    if entry is None:
        del settings[key]
    else:
        settings[key].remove(entry)
    (packed / "config.json").write_text(json.dumps(config))
    return settings


def check(packed: Path, settings: dict) -> None:
    linears = [n[:-7] for n in Checkpoint.open(packed).tensors if n.endswith("_proj.weight") or n == "lm_head.weight"]
    ct.check(settings, Checkpoint.open(packed).tensors, linears)


def test_without_status_the_weights_are_random(folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    packed, dense = folders
    check(packed, json.loads((packed / "config.json").read_text())["quantization_config"])
    settings = without(packed, "quantization_status")
    caplog.set_level(logging.ERROR)
    theirs, info = logits(packed, torch.bfloat16)
    assert lost(info)[0] > 0  # what we guard against: no exception there ...
    assert relative(theirs, logits(dense, torch.float32)[0]) > 1
    with pytest.raises(UserError, match="quantization_status"):  # ... but one here
        check(packed, settings)
    with pytest.raises(UserError, match="quantization_status"):
        load(packed)


def test_without_the_head_in_ignore(folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    packed, _ = folders
    settings = without(packed, "ignore", "lm_head")
    caplog.set_level(logging.ERROR)
    _, info = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16, output_loading_info=True)
    assert lost(info)[0] > 0  # only a warning: the head would be random, NaN or fail when it is run
    with pytest.raises(UserError, match="lm_head is stored as plain weights"):
        check(packed, settings)
