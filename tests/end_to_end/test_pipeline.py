"""The whole line on small models, against an independent reading of what it should do.

The references run transformers' own model with hooks: no streaming, no graph, no shared statistics.
"""

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from quantkit.algorithms.gptq import factor, gptq
from quantkit.algorithms.rtn import rtn
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import UserError
from quantkit.formats.compressed_tensors import tensors as ct
from quantkit.grids.dequantize import (
    dequantize,
)
from quantkit.grids.integer import IntegerGrid, RangeSearch
from quantkit.model.meta_model import (
    build_meta_model,
    read_config,
)
from quantkit.model.streamed_model import (
    StreamedModel,
)
from quantkit.model.weight_sources import weight_sources
from quantkit.quantization import pipeline
from quantkit.recipe import load as recipe
from quantkit.report.records import Report
from quantkit.runtime.load import load
from quantkit.types import QuantizedWeight, TensorSpec
from tests.killed_run import killed_at
from tests.tiny_models import CONFIGS, random_tokens, tiny_model

GROUPS = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
GROUPS += [["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
CALIBRATION = {"data": "given as token ids"}


def save(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    tiny_model(name).to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def ids(llama: Path) -> Tensor:
    return random_tokens(AutoModelForCausalLM.from_pretrained(llama), 5, 24, seed=1)


def quantize(model: Path, output: Path, ids: Tensor | None, **data: Any) -> Report:
    data = {"model": str(model), "weights": {"group_size": 16}} | data
    if ids is not None:
        data["calibration"] = CALIBRATION
    return pipeline.quantize(recipe.from_data(data), output, calibration=ids, progress=False)


def unpacked(folder: Path) -> dict[str, QuantizedWeight]:
    checkpoint = Checkpoint.open(folder)
    modules = [name.removesuffix(".weight_packed") for name in checkpoint.tensors if name.endswith(".weight_packed")]
    specs = ct.read_config(checkpoint.config["quantization_config"], modules)
    return {
        name: ct.unpack(
            {t.removeprefix(f"{name}."): checkpoint.read(t) for t in checkpoint.tensors if t.startswith(f"{name}.")},
            spec,
        )
        for name, spec in specs.items()
    }


def digest(folder: Path) -> dict[str, str]:
    """Hash of every file of a result but the report, which tells times."""
    files = (path for path in folder.iterdir() if path.name != "quantkit-report.json")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_rounding_without_calibration(llama: Path, tmp_path: Path) -> None:
    report = quantize(
        llama, tmp_path / "out", None, weights={"group_size": 16, "bits": 3, "algorithm": {"rtn": {"range": "minmax"}}}
    )
    source, result = load_file(llama / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    grid = IntegerGrid(TensorSpec(3, 16, True), torch.bfloat16)
    found = unpacked(tmp_path / "out")
    assert len(found) == len(report.linears) == 14
    for name, q in found.items():
        expected = rtn(source.pop(f"{name}.weight"), grid)
        assert torch.equal(q.codes_NK, expected.codes_NK)
        assert torch.equal(q.scale_NG, expected.scale_NG)
    for name, tensor in source.items():
        assert torch.equal(result[name], tensor), name


def reference_gptq(model: nn.Module, ids: Tensor, grid: IntegerGrid, *, refit: bool) -> dict[str, QuantizedWeight]:
    """Sequential GPTQ by plain hooks: every group sees the quantized ones before it; float64 statistics."""
    original = AutoModelForCausalLM.from_pretrained(model.name_or_path, dtype=torch.float32)
    done = {}
    for index, block in enumerate(model.model.layers):
        for group in GROUPS:
            seen: dict[str, Tensor] = {}
            handles = []
            for key, source in (("x", block), ("x0", original.model.layers[index])):

                def keep(_: nn.Module, args: tuple, key: str = key, seen: dict[str, Tensor] = seen) -> None:
                    seen[key] = args[0].flatten(0, 1).double()

                handles.append(source.get_submodule(group[0]).register_forward_pre_hook(keep))
            with torch.no_grad():
                model(ids), original(ids)
            for handle in handles:
                handle.remove()
            damped = factor((seen["x"].T @ seen["x"]).float(), tokens=ids.numel())
            for name in group:
                linear = block.get_submodule(name)
                drift = linear.weight.data.double() @ (seen["x0"] - seen["x"]).T @ seen["x"]
                q, _ = gptq(linear.weight.data.float(), damped, grid, drift_NK=drift.float() if refit else None)
                linear.weight.data = dequantize(q).float()
                done[f"model.layers.{index}.{name}"] = q
    return done


@pytest.mark.parametrize("refit", [False, True], ids=["plain", "refit"])
def test_gptq_equals_plain_hooks(llama: Path, ids: Tensor, tmp_path: Path, refit: bool) -> None:
    quantize(llama, tmp_path / "out", ids, weights={"group_size": 16, "algorithm": {"gptq": {"refit": refit}}})
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    grid = IntegerGrid(TensorSpec(4, 16, True), torch.bfloat16, RangeSearch(), ct.SIGNED_SCALES)
    expected = reference_gptq(model, ids, grid, refit=refit)
    found = unpacked(tmp_path / "out")
    assert found.keys() == expected.keys()
    # Sums in another order flip a rare rounding, and what comes after a flip may differ a lot: look at the first ten.
    names = [name for name in expected if ".0." in name or ".1.self_attn" in name][:10]
    different = torch.cat([(found[name].codes_NK != expected[name].codes_NK).flatten() for name in names])
    assert different.float().mean() < 0.005


def test_refit_comes_nearer_to_the_original(llama: Path, ids: Tensor, tmp_path: Path) -> None:
    original = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    errors = {}
    for name, algorithm in {"rtn": "rtn", "gptq": {"gptq": {"refit": False}}, "refit": {"gptq": {}}}.items():
        quantize(llama, tmp_path / name, ids, weights={"group_size": 16, "bits": 3, "algorithm": algorithm})
        with torch.no_grad():
            errors[name] = (
                (load(tmp_path / name, dtype=torch.float32)(ids).logits - original(ids).logits).square().mean().item()
            )
    assert errors["refit"] < errors["gptq"] < errors["rtn"]


@pytest.mark.parametrize("propagate", ["quantized", "original"])
def test_same_recipe_same_bytes(llama: Path, ids: Tensor, tmp_path: Path, propagate: str) -> None:
    for name in ("one", "two"):
        quantize(llama, tmp_path / name, ids, weights={"group_size": 16, "algorithm": "gptq"}, propagate=propagate)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


@pytest.mark.parametrize("name", ["llama", "gemma2", "falcon"])
def test_halted_batches_give_the_bytes_of_separate_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(name, tmp_path / "model")
    ids = random_tokens(AutoModelForCausalLM.from_pretrained(folder), 6, 24)
    monkeypatch.setattr("quantkit.quantization.calibration.hidden_states.BATCH_TOKENS", (48, 48))  # three batches
    weights = {"group_size": 16, "algorithm": "gptq"}
    quantize(folder, tmp_path / "halted", ids, weights=weights)
    monkeypatch.setattr("quantkit.quantization.block_quantizer.fits", lambda *_: False)
    quantize(folder, tmp_path / "separate", ids, weights=weights)
    assert digest(tmp_path / "halted") == digest(tmp_path / "separate")


def test_no_thread_outlives_its_run(llama: Path, ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    quantize(llama, tmp_path / "a", ids, weights={"group_size": 16, "algorithm": "gptq"})
    assert threading.active_count() == before
    quantizer = "quantkit.quantization.block_quantizer.quantize_group"
    monkeypatch.setattr(quantizer, lambda *_, **__: 1 / 0)  # dies with batches halted in the block
    with pytest.raises(ZeroDivisionError):
        quantize(llama, tmp_path / "b", ids, weights={"group_size": 16, "algorithm": "gptq"})
    assert threading.active_count() == before


def test_states_on_disk_give_the_same_bytes(
    llama: Path, ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"group_size": 16, "algorithm": "gptq"}
    quantize(llama, tmp_path / "memory", ids, weights=weights)
    monkeypatch.setattr("quantkit.quantization.calibration.spill.STATES_LIMIT", 100)
    quantize(llama, tmp_path / "disk", ids, weights=weights)
    assert digest(tmp_path / "memory") == digest(tmp_path / "disk")
    assert not list((tmp_path / "disk").glob("*.states"))


def test_propagating_the_original_ignores_quantized_blocks(llama: Path, ids: Tensor, tmp_path: Path) -> None:
    weights = {"group_size": 16, "algorithm": {"gptq": {"refit": False}}}
    quantize(llama, tmp_path / "a", ids, weights=weights, propagate="original")
    quantize(
        llama,
        tmp_path / "b",
        ids,
        weights=weights,
        propagate="original",
        overrides=[{"match": "re:model.layers.0", "weights": {"bits": 2}}],
    )
    quantize(
        llama, tmp_path / "c", ids, weights=weights, overrides=[{"match": "re:model.layers.0", "weights": {"bits": 2}}]
    )
    a, b, c = (unpacked(tmp_path / name)["model.layers.1.self_attn.q_proj"].codes_NK for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(b, c)


@pytest.mark.parametrize("stop", [0, 1, 2])
@pytest.mark.parametrize(
    "recipe_data", [{"transforms": ["awq"]}, {"weights": {"group_size": 16, "algorithm": "gptq"}}], ids=["awq", "gptq"]
)
def test_goes_on_where_it_stopped(
    llama: Path, ids: Tensor, tmp_path: Path, stop: int, recipe_data: dict[str, Any]
) -> None:
    quantize(llama, tmp_path / "whole", ids, **recipe_data)
    if stop < 2:
        with killed_at(stop):
            quantize(llama, tmp_path / "out", ids, **recipe_data)
        assert not (tmp_path / "out").exists()
    report = quantize(llama, tmp_path / "out", ids, **recipe_data)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    whole = json.loads((tmp_path / "whole" / "quantkit-report.json").read_text())
    assert report.to_json()["linears"] == whole["linears"]


def test_refuses_to_go_on_with_another_recipe(llama: Path, ids: Tensor, tmp_path: Path) -> None:
    with killed_at(0):
        quantize(llama, tmp_path / "out", ids)
    with pytest.raises(UserError, match=r"bits.*--restart|--restart"):
        quantize(llama, tmp_path / "out", ids, weights={"group_size": 16, "bits": 8})
    with pytest.raises(UserError, match="calibration"):
        quantize(llama, tmp_path / "out", ids + 1)
    quantize(llama, tmp_path / "out", ids)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_architecture_end_to_end(name: str, tmp_path: Path) -> None:
    """AWQ then GPTQ; the loaded result computes what transformers computes with the decoded weights."""
    folder = save(name, tmp_path / "model", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = random_tokens(model, 4, 16)
    weights = {"bits": 8, "group_size": 8, "symmetric": False, "algorithm": "gptq"}
    report = quantize(folder, tmp_path / "out", ids, transforms=["awq"], weights=weights)
    assert report.linears
    assert all(line.reason for line in report.skipped)
    with torch.no_grad():
        expected, found = model(ids).logits, load(tmp_path / "out", dtype=torch.float32)(ids).logits
    assert ((found - expected).norm() / expected.norm()).item() < 0.02  # 8-bit weights: a wrong row order gives about 1


def test_experts_are_written_under_their_own_names(tmp_path: Path) -> None:
    folder = save("qwen3_moe", tmp_path / "model")
    one = random_tokens(AutoModelForCausalLM.from_pretrained(folder), 1, 1)
    ids = one.repeat(1, 8)  # so little that some experts see none
    report = quantize(folder, tmp_path / "out", ids, weights={"group_size": 8, "algorithm": "gptq"})
    names = {line.name for line in report.linears}
    for expert in range(4):
        for projection in ("gate_proj", "up_proj", "down_proj"):
            assert f"model.layers.1.mlp.experts.{expert}.{projection}" in names
    assert any("no calibration token" in warning for warning in report.warnings)
    assert "model.layers.0.mlp.gate" in {line.name for line in report.skipped}


def test_a_module_in_memory(llama: Path, ids: Tensor, tmp_path: Path) -> None:
    import quantkit

    model = AutoModelForCausalLM.from_pretrained(llama)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = {"calibration": CALIBRATION, "weights": {"group_size": 16, "algorithm": "gptq"}}
    model.generation_config.temperature, model.generation_config.do_sample = (
        0.6,
        False,
    )  # which transformers does not save
    report, quantized = quantkit.quantize_module(model, data, calibration=ids, progress=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    quantize(llama, tmp_path / "out", ids, weights={"group_size": 16, "algorithm": "gptq"})
    with torch.no_grad():
        assert torch.equal(quantized(ids).logits, load(tmp_path / "out")(ids).logits)
    assert len(report.linears) == 14
    assert quantized.generation_config.temperature == model.generation_config.temperature == 0.6
    kept = quantkit.quantize(model, data, tmp_path / "kept", calibration=ids, progress=False)
    assert kept.linears == report.linears
    assert json.loads((tmp_path / "kept/generation_config.json").read_text())["temperature"] == 0.6


def test_awq_with_readers_of_several_widths(llama: Path, ids: Tensor, tmp_path: Path) -> None:
    """The coarsest grid of a fold's readers decides its scale; the others are folded alike and stay right."""
    overrides = [{"match": "re:.*[kv]_proj", "weights": {"bits": 8}}]
    report = quantize(llama, tmp_path / "o", ids, transforms=["awq"], overrides=overrides)
    attention = next(fold for fold in report.folds if "self_attn.q_proj" in fold.consumers)
    assert set(attention.consumers) == {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
    assert attention.loss is not None
    assert attention.loss_unscaled is not None
    assert attention.loss <= attention.loss_unscaled
    bits = {name.rpartition(".")[2]: q.spec.bits for name, q in unpacked(tmp_path / "o").items()}
    assert (bits["q_proj"], bits["k_proj"], bits["v_proj"]) == (4, 8, 8)
    with torch.no_grad():
        wanted, got = (load(folder, torch.float32)(ids).logits for folder in (llama, tmp_path / "o"))
    assert float((wanted - got).norm() / wanted.norm()) < 0.2  # a fold applied to some readers only gives over 1


def test_a_table_that_is_read_row_by_row_is_on_no_meta_device(llama: Path) -> None:
    """Models move ids to where their embedding lies (Llama 4), or look up the padding token's row (Gemma 4)."""
    checkpoint = Checkpoint.open(llama)
    model = build_meta_model(read_config(llama))
    streamed = StreamedModel(
        model, weight_sources(model, checkpoint.tensors), checkpoint, torch.float32, torch.device("cpu")
    )
    table = checkpoint.read("model.embed_tokens.weight").float()
    rows = []

    def use_the_table(module: nn.Module, args: tuple) -> Tensor:
        weight = module.get_parameter("weight")
        rows.append((weight[5], weight[5, :], weight[torch.tensor([1, 2])]))
        return args[0].to(weight.device)

    model.get_input_embeddings().register_forward_pre_hook(use_the_table)
    tokens = torch.tensor([[3, 4, 5]])
    hidden, _ = streamed.first_call(tokens)
    assert torch.equal(hidden, table[tokens])
    for found, index in zip(rows[0], (5, 5, [1, 2]), strict=True):
        assert torch.equal(found, table[index])
