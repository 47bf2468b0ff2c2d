"""Experts that a checkpoint keeps in one tensor per layer: each a linear of its own, in the file and in memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as t
from safetensors.torch import load_file
from torch import Tensor

from quantkit.algorithms.rtn import rtn
from quantkit.errors import UserError
from quantkit.grids.dequantize import dequantize
from quantkit.grids.integer import IntegerGrid
from quantkit.planner.model_inventory import take_inventory
from quantkit.quantization import pipeline
from quantkit.recipe import load as recipe
from quantkit.report.records import Report
from quantkit.runtime.load import load
from quantkit.types import TensorSpec
from quantkit.verification import verify_folder
from tests.tiny_models import EXPERTS

E, SPEC = 4, TensorSpec(4, 8, True)


class Stack(NamedTuple):
    """How one model keeps its experts: what the test knows of it, from its own reading of the model's code.

    param       of the first layer; names: of one expert's matrices in the file, with the rows each has
    transposed  stored [E, K, N]
    """

    config: Callable[[], t.PretrainedConfig]
    param: str
    names: dict[str, slice]
    transposed: bool = False


WIDTH = 16
HALVES = (slice(0, WIDTH), slice(WIDTH, 2 * WIDTH))
TURNS = (slice(0, None, 2), slice(1, None, 2))
EXPERT = "model.layers.0.mlp.experts.{e}"
SPARSE = "model.layers.0.block_sparse_moe.experts"
SMALL: Any = EXPERTS | {"intermediate_size": WIDTH, "num_local_experts": E}
MAMBA: Any = {"mamba_n_heads": 4, "mamba_d_head": 24, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}


def named(stem: str, names: tuple[str, ...], rows: tuple[slice, ...]) -> dict[str, slice]:
    return {f"{stem}.{name}": cut for name, cut in zip(names, rows, strict=True)}


STACKS = {
    "gpt_oss": Stack(
        lambda: t.GptOssConfig(**SMALL, head_dim=16, sliding_window=8),
        "model.layers.0.mlp.experts.gate_up_proj",
        named(EXPERT, ("gate_proj", "up_proj"), TURNS),
        True,
    ),
    "gpt_oss down": Stack(
        lambda: t.GptOssConfig(**SMALL, head_dim=16, sliding_window=8),
        "model.layers.0.mlp.experts.down_proj",
        named(EXPERT, ("down_proj",), (slice(None),)),
        True,
    ),
    "llama4": Stack(
        lambda: t.Llama4TextConfig(
            **SMALL | {"num_experts_per_tok": 1}, intermediate_size_mlp=80, head_dim=16, attention_chunk_size=16
        ),
        "model.layers.0.feed_forward.experts.gate_up_proj",
        named(EXPERT.replace("mlp", "feed_forward"), ("gate_proj", "up_proj"), HALVES),
        True,
    ),
    "granitemoe": Stack(
        lambda: t.GraniteMoeConfig(**SMALL),
        f"{SPARSE}.gate_up_proj",
        named(SPARSE + ".{e}", ("w1", "w3"), HALVES),
    ),
    "granitemoehybrid": Stack(
        lambda: t.GraniteMoeHybridConfig(
            **SMALL, **MAMBA, shared_intermediate_size=24, layer_types=["attention", "mamba"]
        ),
        f"{SPARSE}.gate_up_proj",
        named(SPARSE + ".{e}", ("gate_proj", "up_proj"), HALVES),
    ),
    "jetmoe": Stack(
        lambda: t.JetMoeConfig(**SMALL | {"num_key_value_heads": 2}, kv_channels=16),
        "model.layers.0.mlp.input_linear.weight",
        {"model.layers.0.mlp.input_linear.{e}": slice(None)},
    ),
}  # fmt: skip


def saved(config: t.PretrainedConfig, folder: Path) -> t.PreTrainedModel:
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager").eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if not name.endswith(("A_log", ".D", "dt_bias", "sinks")):
                param.add_(0.2 * torch.randn_like(param)) if param.dim() < 3 else param.normal_(std=0.15)
    model.save_pretrained(folder)
    return model


def quantize(model: Path, folder: Path, ids: Tensor | None = None, **data: Any) -> Report:
    weights = {"group_size": 8, "bits": 4, "algorithm": {"rtn": {"range": "minmax"}}}
    data = {"model": str(model), "weights": weights, "output": {"engine": None}} | data
    if ids is not None:
        data["calibration"] = {"data": "given as token ids"}
    return pipeline.quantize(recipe.from_data(data), folder, calibration=ids, progress=False)


@pytest.mark.parametrize("name", STACKS)
def test_each_expert_is_a_linear_of_its_own(name: str, tmp_path: Path) -> None:
    case = STACKS[name]
    original = saved(case.config(), tmp_path / "model").get_parameter(case.param)
    report = quantize(tmp_path / "model", tmp_path / "out")
    found = load(tmp_path / "out", dtype=torch.float32).get_parameter(case.param)
    names = {line.name for line in report.linears}
    for e in range(E):
        matrix, got = (original[e].T, found[e].T) if case.transposed else (original[e], found[e])
        for pattern, rows in case.names.items():
            assert pattern.format(e=e) in names
            expected = dequantize(rtn(matrix[rows].contiguous(), IntegerGrid(SPEC, torch.float32)))
            assert torch.equal(got[rows], expected)
    assert set(load_file(tmp_path / "out/model.safetensors")).isdisjoint({case.param})


@pytest.mark.parametrize("name", STACKS)
def test_gptq_on_the_experts_tokens(name: str, tmp_path: Path) -> None:
    """At 8 bits the loaded model computes what the original does: every expert's rows lie where they belong."""
    model = saved(STACKS[name].config(), tmp_path / "model")
    ids = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(0))
    weights = {"bits": 8, "group_size": 8, "algorithm": "gptq"}
    quantize(tmp_path / "model", tmp_path / "out", ids, weights=weights, transforms=["awq"])
    with torch.no_grad():
        expected, found = model(ids).logits, load(tmp_path / "out", dtype=torch.float32)(ids).logits
    # a token may choose another expert where two are close; wrong rows give about 1
    assert ((found - expected).norm() / expected.norm()).item() < 0.1


def test_biases_follow_their_experts(tmp_path: Path) -> None:
    model = saved(STACKS["gpt_oss"].config(), tmp_path / "model")
    quantize(tmp_path / "model", tmp_path / "out")
    stored = load_file(tmp_path / "out/model.safetensors")
    bias = model.get_parameter("model.layers.0.mlp.experts.gate_up_proj_bias")
    assert torch.equal(stored["model.layers.0.mlp.experts.3.up_proj.bias"], bias[3, 1::2])
    loaded = load(tmp_path / "out", dtype=torch.float32)
    for name in ("gate_up_proj_bias", "down_proj_bias"):
        param = f"model.layers.1.mlp.experts.{name}"
        assert torch.equal(loaded.get_parameter(param), model.get_parameter(param))


def test_experts_that_stay_dense_stay_in_one_tensor(tmp_path: Path) -> None:
    saved(STACKS["gpt_oss"].config(), tmp_path / "model")
    quantize(tmp_path / "model", tmp_path / "out", ignore=["re:.*experts.*"])
    source, result = load_file(tmp_path / "model/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    experts = {name for name in source if ".experts." in name}
    assert len(experts) == 8
    for name in experts:
        assert torch.equal(result[name], source[name])


def test_some_experts_of_a_layer_stay_dense(tmp_path: Path) -> None:
    model = saved(STACKS["gpt_oss"].config(), tmp_path / "model")
    quantize(tmp_path / "model", tmp_path / "out", ignore=["re:.*experts\\.1\\..*"])
    loaded = load(tmp_path / "out", dtype=torch.float32)
    param = "model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(loaded.get_parameter(param)[1], model.get_parameter(param)[1])
    assert not torch.equal(loaded.get_parameter(param)[0], model.get_parameter(param)[0])


def tokens_of(report: Report, layer: int = 0) -> list[int | None]:
    """How many tokens reached the gates of a layer."""
    return [
        line.expert_tokens for line in report.linears if f"layers.{layer}." in line.name and "gate_proj" in line.name
    ]


def test_the_report_says_how_many_tokens_reached_each_expert(tmp_path: Path) -> None:
    model = saved(STACKS["gpt_oss"].config(), tmp_path / "model")
    ids = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(0))
    chosen: list[Tensor] = []
    model.model.layers[0].mlp.router.register_forward_hook(lambda _, args, found: chosen.append(found[2]))
    with torch.no_grad():
        model(ids)
    expected = torch.cat([c.reshape(-1) for c in chosen]).bincount(minlength=E).tolist()
    report = quantize(tmp_path / "model", tmp_path / "out", ids, experts={"share_below": 0})
    assert tokens_of(report) == expected
    assert sum(expected) == 2 * ids.numel()
    every = quantize(tmp_path / "model", tmp_path / "all", ids, experts={"calibrate": "all"})
    assert tokens_of(every) == [ids.numel()] * E


def test_models_that_hand_zeros_to_experts_count_the_tokens_that_are_theirs(tmp_path: Path) -> None:
    saved(STACKS["llama4"].config(), tmp_path / "model")
    ids = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(0))
    report = quantize(tmp_path / "model", tmp_path / "out", ids)
    counts = [c for c in tokens_of(report) if c is not None]
    assert sum(counts) == ids.numel()  # one expert per token


def test_all_tokens_are_refused_where_experts_are_not_handed_them(tmp_path: Path) -> None:
    saved(STACKS["llama4"].config(), tmp_path / "model")
    ids = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match=r"Llama4TextExperts(.|\n)*routed"):
        quantize(tmp_path / "model", tmp_path / "out", ids, experts={"calibrate": "all"})
    assert not (tmp_path / "out").exists()


def test_an_expert_of_few_tokens_shares_its_layers_statistics(tmp_path: Path) -> None:
    saved(STACKS["granitemoehybrid"].config(), tmp_path / "model")
    ids = torch.randint(3, 96, (2, 8), generator=torch.Generator().manual_seed(0))
    weights = {"bits": 4, "group_size": 8, "algorithm": "gptq"}
    report = quantize(tmp_path / "model", tmp_path / "out", ids, weights=weights, experts={"share_below": 1000})
    gates = [line for line in report.linears if "layers.0." in line.name and "gate_proj" in line.name]
    total = sum(line.expert_tokens or 0 for line in gates)
    assert total == 2 * ids.numel()
    for line in gates:
        assert line.gptq is not None
        assert line.gptq.tokens == total
        assert line.note is not None
        assert "all experts of its layer" in line.note


@pytest.mark.parametrize("name", ["gpt_oss", "jetmoe"])
def test_verify_refuses_what_transformers_would_leave_random(name: str, tmp_path: Path) -> None:
    saved(STACKS[name].config(), tmp_path / "model")
    quantize(tmp_path / "model", tmp_path / "out")
    rules = {f.rule for f in verify_folder(tmp_path / "out", "transformers").findings if f.level == "error"}
    assert "experts" in rules
    assert "experts" not in {f.rule for f in verify_folder(tmp_path / "out", "vllm").findings}
    with pytest.raises(UserError, match="one tensor per layer"):
        quantize(tmp_path / "model", tmp_path / "other", output={"engine": "transformers"})
    pattern = "re:.*experts.*" if name == "gpt_oss" else "re:.*put_linear.*"
    quantize(tmp_path / "model", tmp_path / "dense", ignore=[pattern])
    assert "experts" not in {f.rule for f in verify_folder(tmp_path / "dense", "transformers").findings}


@pytest.mark.parametrize("name", ["gpt_oss", "llama4", "granitemoe"])
def test_plan_knows_the_experts(name: str, tmp_path: Path) -> None:
    saved(STACKS[name].config(), tmp_path / "model")
    report = quantize(tmp_path / "model", tmp_path / "out")
    inventory = take_inventory(tmp_path / "model")
    shapes = {matrix.name: matrix.shape for matrix in inventory.matrices if matrix.limit is None}
    assert {line.name: line.shape for line in report.linears} == shapes
