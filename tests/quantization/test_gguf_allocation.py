"""Measured mixes: harms against whole runs of the model, the size that is met, the choice beside llama.cpp's mixes."""

import copy
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import transformers as t
from torch import Tensor

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import UserError
from quantkit.formats.gguf.mixes import bytes_of, given_types
from quantkit.formats.gguf.tensor_names import Place, places
from quantkit.model.meta_model import build_meta_model, read_config
from quantkit.model.streamed_model import StreamedModel
from quantkit.model.ties import equal_tensors, settle_ties
from quantkit.model.weight_sources import weight_sources
from quantkit.progress import Progress
from quantkit.quantization import gguf_allocation, gguf_budget
from quantkit.quantization.gguf_allocation import Allocation, HarmTable, Trial, measure_harms
from quantkit.quantization.gguf_layout import GgufPlan, gguf_plan
from quantkit.quantization.gguf_measured import measured_types, whole_model
from quantkit.quantization.gguf_weights import TensorParts, WeightPart, model_parts, rounded, sampled_error, with_types
from quantkit.quantization.imatrix import gather
from quantkit.quantization.output_divergence import OutputDivergence
from quantkit.recipe.gguf import Gguf
from tests.tiny_models import random_tokens

LLAMA = t.LlamaConfig(
    vocab_size=96, hidden_size=256, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
)  # fmt: skip
EXPERTS = t.Qwen3MoeConfig(
    vocab_size=96, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
    norm_topk_prob=True, initializer_range=0.2,
)  # fmt: skip
TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q6_K", "Q8_0", "F16")  # those with a short search
IDS = torch.randint(3, 96, (3, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def few_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_budget, "FREE", TYPES)


def save_llama(folder: Path, tied: bool = True) -> t.PreTrainedModel:
    torch.manual_seed(0)
    config = copy.deepcopy(LLAMA)
    config.tie_word_embeddings = tied
    model = t.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for i, param in enumerate(model.parameters()):
            param.mul_(1 + i % 3)  # tensors of one size that do not matter alike
    model.save_pretrained(folder)
    return model


def streamed_from(folder: Path) -> StreamedModel:
    checkpoint = Checkpoint.open(folder)
    model = build_meta_model(read_config(folder))
    sources = weight_sources(model, checkpoint.tensors)
    settle_ties(model, sources, lambda one, other: equal_tensors(checkpoint, one, other, checkpoint.dtype))
    return StreamedModel(model, sources, checkpoint, torch.float32, torch.device("cpu"))


def plan_of(streamed: StreamedModel, section: Gguf) -> GgufPlan:
    checkpoint = streamed.checkpoint
    return gguf_plan(section, checkpoint.config, checkpoint.tensors, importance=True, name="tiny")


def measured(
    folder: Path, dense: tuple[str, ...] = (), *, gptq: bool = False, headers: int = 0, **section: object
) -> tuple[GgufPlan, Allocation]:
    streamed, asked = streamed_from(folder), Gguf.model_validate(section)
    plan = plan_of(streamed, asked)
    return plan, measured_types(asked, plan, streamed, IDS, dense, Progress("off"), gptq=gptq, headers=headers)


def divergence(model: t.PreTrainedModel, changed: t.PreTrainedModel, ids_ST: Tensor = IDS) -> float:
    with torch.no_grad():
        log_p, log_q = (m(input_ids=ids_ST).logits.double().log_softmax(-1) for m in (model, changed))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize("tied", [True, False])
def test_a_harm_is_the_divergence_of_the_model_with_that_tensor_rounded(tied: bool, tmp_path: Path) -> None:
    model = save_llama(tmp_path, tied)
    streamed = streamed_from(tmp_path)
    plan = plan_of(streamed, Gguf())
    live = {n: s for n, s in streamed.sources.items() if n in dict(model.named_parameters())}
    parts = {name: TensorParts(found) for name, found in model_parts(plan.places, live).items()}
    candidates = {name: ["Q4_K", "Q6_K"] for name, shape in plan.shapes.items() if shape[-1] == 256 and len(shape) == 2}
    assert len(candidates) == 11 + (not tied)
    meter = OutputDivergence(model, IDS)
    harms = measure_harms(meter, parts, candidates, 5.5)
    assert meter.block == 2
    for name, by_type in harms.items():
        for type_, off in (("Q4_K", 1e-3), ("Q6_K", 1.5)):  # one is measured, the other one told by its error
            other = copy.deepcopy(model)
            weight = other.get_parameter(parts[name].parts[0].parameter)
            weight.data.copy_(rounded(weight.data, type_, None))
            assert by_type[type_] == pytest.approx(divergence(model, other), rel=off, abs=1e-7), (name, type_)
    meter.rewind()
    assert meter.measure() < 1e-9  # the model is as it was


def test_experts_are_rounded_together_each_by_what_it_reads() -> None:
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(EXPERTS, dtype=torch.float32).eval()
    shapes = {name: tuple(value.shape) for name, value in tiny_checkpoint(model).items()}
    parts = model_parts(places_of(model, shapes), weight_sources(model, shapes))
    assert {len(found) for name, found in parts.items() if "_exps" in name} == {4}
    before = copy.deepcopy(model.state_dict())
    importance = torch.rand(4, 64, generator=torch.Generator().manual_seed(0))
    up = "blk.1.ffn_up_exps.weight"
    experts = TensorParts(parts[up], importance)
    with with_types(model, [(experts, "Q4_0")]):
        inside = copy.deepcopy(model.state_dict())
    weight = "model.layers.1.mlp.experts.gate_up_proj"
    assert {name for name, value in inside.items() if not torch.equal(value, before[name])} == {weight}
    assert torch.equal(inside[weight][:, :32], before[weight][:, :32])
    for e in range(4):
        assert torch.equal(inside[weight][e, 32:], rounded(before[weight][e, 32:], "Q4_0", importance[e]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    meter = OutputDivergence(model, random_tokens(model, 2, 12))
    harms = measure_harms(meter, {up: experts}, {up: ["Q4_0", "Q8_0"]}, 4.0)
    assert 0 < harms[up]["Q8_0"] < harms[up]["Q4_0"]


def tiny_checkpoint(model: t.PreTrainedModel) -> dict[str, Tensor]:
    """The tensors as checkpoints have them: one for each expert and matrix."""
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        stem, _, leaf = name.rpartition(".")
        if leaf == "gate_up_proj":
            for e, both in enumerate(value):
                for part, half in zip(("gate", "up"), both.chunk(2), strict=True):
                    tensors[f"{stem}.{e}.{part}_proj.weight"] = half
        elif leaf == "down_proj" and value.dim() == 3:
            tensors |= {f"{stem}.{e}.down_proj.weight": one for e, one in enumerate(value)}
        else:
            tensors[name] = value
    return tensors


def places_of(model: t.PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Place]:
    return places(model.config.to_dict() | {"architectures": [type(model).__name__]}, shapes)


@pytest.mark.parametrize("bits", [4.8, 6.0])
def test_the_size_is_met_and_no_mix_that_fits_is_better(bits: float, tmp_path: Path) -> None:
    model = save_llama(tmp_path)
    plan, found = measured(tmp_path, mix={"bits_per_weight": bits})
    assert list(found.types) == list(plan.shapes)
    assert bits * 0.995 <= found.bits_per_weight <= bits
    assert found.nbytes == sum(bytes_of(type_, plan.shapes[name]) for name, type_ in found.types.items())
    fitting = [mix for mix in found.named if mix.nbytes <= found.nbytes]
    assert fitting
    assert found.expected <= min(mix.expected for mix in fitting)
    assert all(found.divergence <= mix.divergence for mix in found.named if mix.divergence is not None)
    assert found.divergence == pytest.approx(rounded_divergence(model, plan, found.types, tmp_path), rel=1e-3)
    assert len(set(found.types.values())) > 2


def rounded_divergence(model: t.PreTrainedModel, plan: GgufPlan, types: Mapping[str, str], folder: Path) -> float:
    """On a copy, each weight rounded by what reads it."""
    streamed, other = streamed_from(folder), copy.deepcopy(model)
    importance = gather(streamed, IDS, plan.places, Progress("off"))
    live = dict(other.named_parameters())
    for name, found in model_parts(plan.places, {n: s for n, s in streamed.sources.items() if n in live}).items():
        for part in found:
            if (view := part.view(other)).dim() == 2:
                view.copy_(rounded(view, types[name], torch.from_numpy(importance[name].importance())[0]))
    return divergence(model, other)


def test_harms_are_of_what_gptq_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_llama(tmp_path)
    monkeypatch.setattr("quantkit.quantization.gguf_measured.share_left", lambda factor: 0.1)
    asked = {"mix": {"bits_per_weight": 7}, "output": "f16"}  # the table is rounded whatever GPTQ does elsewhere
    (_, rounding), (_, found) = (measured(tmp_path, gptq=gptq, **asked) for gptq in (False, True))
    assert found.divergence == pytest.approx(0.1 * rounding.divergence, rel=0.3)
    assert found.expected == pytest.approx(0.1 * rounding.expected, rel=0.3)


def test_part_of_roundings_error_is_left() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 8, bias=False)
    before = linear.weight.detach().clone()
    off = rounded(before, "Q4_0", None) - before
    for left in (1.0, 0.25):
        with with_types(linear, [(TensorParts([WeightPart("weight")], left=left), "Q4_0")]):
            torch.testing.assert_close(linear.weight.detach() - before, off * left**0.5)
        assert torch.equal(linear.weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_are_restored_to_the_last_bit(dtype: torch.dtype) -> None:
    """Whatever dtype they were stored in: what is kept of them is no larger than that."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 8, bias=False)
    linear.weight.data = torch.randn(8, 64).mul(1e-3).to(dtype).float()
    before = linear.weight.detach().clone()
    with with_types(linear, [(TensorParts([WeightPart("weight")]), "Q4_0")]):
        assert not torch.equal(linear.weight, before)
    assert torch.equal(linear.weight, before)


def test_what_the_user_names_stays(tmp_path: Path) -> None:
    save_llama(tmp_path)
    section = {"mix": {"bits_per_weight": 7}, "tensor_types": {"FFN_up": "q8_0"}, "output": "q5_k"}
    plan, found = measured(tmp_path, ("model.layers.1.self_attn.o_proj.weight",), **section)
    assert found.types["token_embd.weight"] == "Q5_K"  # the head of this model
    assert {found.types[f"blk.{i}.ffn_up.weight"] for i in (0, 1)} == {"Q8_0"}
    assert found.types["blk.1.attn_output.weight"] == plan.types["blk.1.attn_output.weight"]
    assert {found.types[f"blk.{i}.attn_norm.weight"] for i in (0, 1)} == {"F32"}


def test_size_in_bytes_and_the_same_types_twice(tmp_path: Path) -> None:
    save_llama(tmp_path)
    plan, found = measured(tmp_path, mix={"size": "230kB"})
    assert 0.995 * 230_000 <= found.nbytes <= 230_000
    assert measured(tmp_path, mix={"size": 230_000}) == (plan, found)
    assert measured(tmp_path, mix={"size": 240_000}, headers=10_000) == (plan, found)


def test_a_size_below_the_smallest_types_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_llama(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("quantkit.quantization.gguf_measured.gather", None)
        with pytest.raises(
            UserError, match=r"too few for this model: .*\nhint: ask for at least \d\.\d+ bits"
        ) as error:
            measured(tmp_path, mix={"bits_per_weight": 2.5})
        least = float(str(error.value).split("at least ")[1].split()[0])
        with pytest.raises(
            UserError, match=r"(?s): 0 bytes for tensors beside 9,000 of keys and voc.*, a size of \d+,\d+"
        ):
            measured(tmp_path, mix={"size": 8_000}, headers=9_000)
    assert measured(tmp_path, mix={"bits_per_weight": least})[1].bits_per_weight <= least


def test_the_whole_model_is_the_model(tmp_path: Path) -> None:
    for tied in (True, False):
        model = save_llama(tmp_path / str(tied), tied)
        whole = whole_model(streamed_from(tmp_path / str(tied)))
        assert (whole.get_output_embeddings().weight is whole.get_input_embeddings().weight) == tied
        with torch.no_grad():
            assert torch.equal(whole(input_ids=IDS).logits, model(input_ids=IDS).logits)


HARMS = {"a": {"Q4_0": 2.0, "Q8_0": 1.0, "F16": 0.0}, "b": {"Q4_0": 4.0, "Q8_0": 1.5, "F16": 0.4}}
SHAPES = {"a": (32, 32), "b": (32, 32), "norm": (32,)}


class FalseTrial(Trial):
    """Says what it is told; everything else is worse."""

    def __init__(self, told: Mapping[tuple[str, str], float]) -> None:
        object.__setattr__(self, "told", told)
        object.__setattr__(self, "asked", [])

    def divergence(self, types: Mapping[str, str]) -> float:
        self.asked.append((types["a"], types["b"]))  # type: ignore[attr-defined]
        return self.told.get((types["a"], types["b"]), 9.0)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("told", "chosen"),
    [
        ({("Q4_0", "F16"): 2.0, ("Q8_0", "Q8_0"): 3.0}, ("Q4_0", "F16")),  # as expected
        ({("Q4_0", "F16"): 3.0, ("Q8_0", "Q8_0"): 2.0}, ("Q8_0", "Q8_0")),  # the mix measures better, no room above
    ],
)
def test_a_mix_that_measures_better_is_taken(told: dict, chosen: tuple[str, str]) -> None:
    table = HarmTable(SHAPES, {"norm": "F32"}, HARMS)
    budget = 128 + 576 + 2048
    named = {name: {"a": name, "b": name, "norm": "F32"} for name in ("Q4_0", "Q8_0", "F16")}
    trial = FalseTrial(told)
    found = gguf_allocation._verified(table, trial, named, budget)
    assert (found.types["a"], found.types["b"]) == chosen
    assert found.divergence == told[chosen]
    assert [mix.name for mix in found.named] == ["Q4_0", "Q8_0", "F16"]
    assert ("F16", "F16") not in trial.asked  # does not fit  # type: ignore[attr-defined]


def test_room_above_a_better_mix_is_filled() -> None:
    table = HarmTable(SHAPES, {"norm": "F32"}, HARMS)
    trial = FalseTrial({("F16", "Q4_0"): 2.0, ("F16", "Q8_0"): 1.9})
    mixes = {"mix": {"a": "F16", "b": "Q4_0", "norm": "F32"}}
    found = gguf_allocation._verified(table, trial, mixes, 128 + 1088 + 2048)
    assert (found.types, found.divergence) == ({"a": "F16", "b": "Q8_0", "norm": "F32"}, 1.9)


def test_harms_are_to_each_other_as_errors_are() -> None:
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(LLAMA, dtype=torch.float32).eval()
    tensor = TensorParts([WeightPart("model.layers.1.mlp.gate_proj.weight")])
    harms = gguf_allocation._tensor_harms(OutputDivergence(model, IDS), tensor, TYPES, 5.5)
    ratios = [harms[type_] / sampled_error(model, tensor, type_) for type_ in TYPES]
    assert ratios == pytest.approx([ratios[0]] * len(TYPES))
    model.get_parameter("model.layers.1.mlp.gate_proj.weight").data.zero_()
    assert set(gguf_allocation._tensor_harms(OutputDivergence(model, IDS), tensor, TYPES, 5.5).values()) == {0.0}


def test_given_types_are_those_no_mix_decides_on() -> None:
    shapes = {"token_embd.weight": (4, 64), "blk.0.attn_v.weight": (4, 64), "blk.0.attn_norm.weight": (64,)}
    norm = {"blk.0.attn_norm.weight": "F32"}
    assert given_types(shapes) == norm
    assert given_types(shapes, output="q8_0") == norm | {"token_embd.weight": "Q8_0"}
    assert given_types(shapes, {"attn_v": "q4_0"}) == norm | {"blk.0.attn_v.weight": "Q4_0"}
    assert given_types(shapes, {"attn_v": "q6_k"}, "f16") == norm | {
        "blk.0.attn_v.weight": "Q8_0",
        "token_embd.weight": "F16",
    }
