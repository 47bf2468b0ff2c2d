"""A quantized output head: calibrated on what it reads, stored where engines look for it, refused where none would."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from quantkit.algorithms.rtn import rtn
from quantkit.errors import UserError
from quantkit.grids.dequantize import dequantize
from quantkit.grids.integer import IntegerGrid
from quantkit.quantization import block_quantizer, pipeline
from quantkit.quantization.calibration.statistics import Statistic
from quantkit.recipe import load as recipe
from quantkit.report.records import Report
from quantkit.runtime.load import load
from quantkit.types import TensorSpec
from quantkit.verification import verify_folder
from tests.tiny_models import GQA, random_tokens

WEIGHTS: Any = {"bits": 4, "group_size": 16, "algorithm": {"rtn": {"range": "minmax"}}}
ROWS: Any = GQA


def saved(folder: Path, *, tied: bool = False) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**ROWS, tie_word_embeddings=tied)).float().eval()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.2 * torch.randn_like(param))
    model.save_pretrained(folder)
    return model


def quantize(model: Path, folder: Path, ids: Tensor | None = None, **data: Any) -> Report:
    data = {"model": str(model), "weights": WEIGHTS, "head": {"bits": 8}, "output": {"engine": None}} | data
    if ids is not None:
        data["calibration"] = {"data": "given as token ids"}
    return pipeline.quantize(recipe.from_data(data), folder, calibration=ids, progress=False)


def test_only_the_keys_that_differ_are_given(tmp_path: Path) -> None:
    model = saved(tmp_path / "model")
    report = quantize(tmp_path / "model", tmp_path / "out")
    assert report.linears[-1].name == "lm_head"
    loaded = load(tmp_path / "out", dtype=torch.float32)
    expected = rtn(model.lm_head.weight.detach(), IntegerGrid(TensorSpec(8, 16, True), torch.float32))
    assert torch.equal(loaded.lm_head.weight.float(), dequantize(expected))
    stored = load_file(tmp_path / "out/model.safetensors")
    assert "lm_head.weight" not in stored
    assert "lm_head" not in {line.name for line in report.skipped}


@pytest.mark.parametrize("format_", ["compressed-tensors", "gptq"])
def test_gptq_on_what_the_head_reads(format_: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved(tmp_path / "model")
    ids = random_tokens(model, 6, 24)
    read: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda _, args, output: read.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        expected = model(ids).logits
    gathered = []
    gather = block_quantizer.head_statistic

    def spy(*args: Any, **needs: Any) -> Statistic:
        gathered.append(deepcopy(found := gather(*args, **needs)))  # GPTQ uses its memory
        return found

    monkeypatch.setattr(block_quantizer, "head_statistic", spy)
    weights, output = {"bits": 8, "group_size": 16, "algorithm": "gptq"}, {"engine": None, "format": format_}
    report = quantize(tmp_path / "model", tmp_path / "out", ids, weights=weights, output=output, propagate="original")
    torch.testing.assert_close(gathered[0].hessian_KK, read[0].T @ read[0], rtol=1e-4, atol=1e-3)
    head = report.linears[-1]
    assert head.gptq is not None
    assert head.gptq.tokens == ids.numel()
    with torch.no_grad():
        found = load(tmp_path / "out", dtype=torch.float32)(ids).logits
    assert ((found - expected).norm() / expected.norm()).item() < 0.02
    for engine in ("vllm", "transformers"):
        rules = {f.rule for f in verify_folder(tmp_path / "out", engine).findings if f.level == "error"}
        assert rules <= {"gptq-group"}, engine  # groups of 16 are too small for Marlin


def test_goes_on_behind_a_kill_before_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "model")
    ids = random_tokens(load(tmp_path / "model"), 6, 24)
    weights = {"bits": 4, "group_size": 16, "algorithm": "gptq"}
    quantize(tmp_path / "model", tmp_path / "once", ids, weights=weights)

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(block_quantizer.BlockQuantizer, "quantize_head", dies)
        with pytest.raises(KeyboardInterrupt):
            quantize(tmp_path / "model", tmp_path / "twice", ids, weights=weights)
    quantize(tmp_path / "model", tmp_path / "twice", ids, weights=weights)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("once", "twice"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_tied_head_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "model", tied=True)
    with pytest.raises(UserError, match="tied to its embedding"):
        quantize(tmp_path / "model", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_formats_without_a_place_for_it_refuse(tmp_path: Path) -> None:
    saved(tmp_path / "model")
    with pytest.raises(UserError, match=r"output.format awq has no place for a quantized head"):
        quantize(tmp_path / "model", tmp_path / "out", output={"format": "awq"}, weights=WEIGHTS | {"symmetric": False})


def test_gptq_of_the_head_needs_calibration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"head.*gptq needs calibration text"):
        recipe.from_data({"calibration": None, "head": {"algorithm": "gptq"}})
