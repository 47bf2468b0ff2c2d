"""`quantkit auto` on tiny models: harms against whole runs, the exact choice, sizes in bytes, the recipe, refusals."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from hypothesis import given, settings
from hypothesis import strategies as st

import quantkit
from quantkit.errors import UserError
from quantkit.progress import Progress
from quantkit.quantization import pipeline
from quantkit.quantization.allocation import run
from quantkit.quantization.allocation.choice import Budget, choose
from quantkit.quantization.allocation.context import FLOOR, SHARES, ContextRuns
from quantkit.quantization.allocation.harms import HarmMeter
from quantkit.quantization.allocation.recipe_text import recipe_of
from quantkit.quantization.allocation.units import Option, Unit
from quantkit.recipe.candidates import DENSE, base_recipe, candidates
from quantkit.recipe.load import load
from quantkit.recipe.recipe import Recipe
from quantkit.sizes import SizeLimit

BUNDLED = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama"
SECTION = {"data": str(BUNDLED / "calibration.txt"), "samples": 12, "seq_len": 32}
SHAPE: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FEW = "W3A16:g32,W4A16:g64,W8A16:channel"


def save(config: t.PretrainedConfig, folder: Path) -> Path:
    """A random model whose linears do not matter alike, with the bundled model's tokenizer."""
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for i, param in enumerate(model.parameters()):
            param.mul_(1 + 3 * (i % 3))
    model.to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(t.LlamaConfig(**SHAPE), tmp_path_factory.mktemp("model") / "llama")


def prepared(model: Path, output: Path, names: str = FEW, engine: str | None = None, tp: int = 1) -> run.PreparedModel:
    base = base_recipe(str(model), SECTION, engine, tp)
    with Progress(False) as bar:
        return run.prepare(base, candidates(names.split(",")), output, bar)


def recipe(model: run.PreparedModel, options: Mapping[str, Option]) -> Recipe:
    """The recipe that is written for a choice."""
    return recipe_of(run.recipe_for(model, run.Choice(options, {}, 0.0), model.budget(SizeLimit("8.5bpw", 8.5))))


def ones(runs: ContextRuns, *_: Any) -> dict[str, float]:
    return {unit.name: 1.0 for unit in runs.units}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Harms count as they are measured alone, without the whole runs that correct them."""
    monkeypatch.setattr(run, "shares_left", ones)


def auto(model: Path, output: Path, size: str, **more: Any) -> Any:
    given = {"candidates": FEW, "calibration": SECTION, "progress": "off"} | more
    return quantkit.auto(model, size, output, **given)


def stored_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def tensors(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize(("unit", "candidate"), [
    ("model.layers.0.self_attn.qkv_proj", "W3A16:g32"),
    ("model.layers.1.mlp.down_proj", "W3A16:g32"),
    ("model.layers.1.mlp.gate_up_proj", "FP8"),  # static ranges of inputs
])  # fmt: skip
def test_a_harm_is_the_divergence_of_a_run_that_quantizes_this_unit_alone(
    model: Path, tmp_path: Path, unit: str, candidate: str
) -> None:
    ready = prepared(model, tmp_path / "out", candidate)
    with Progress(False) as bar:
        harm = run.measured_harms(ready, run.open_journal(ready, tmp_path / "out"), bar)[unit][candidate]
    chosen = {one.name: next(o for o in one.options if o.candidate == (candidate if one.name == unit else DENSE))
              for one in ready.units}  # fmt: skip
    alone = recipe(ready, chosen)
    found = pipeline.quantize(alone, tmp_path / "alone", progress=False).held_out
    assert found is not None
    assert harm > 1e-5
    assert harm == pytest.approx(found.kl, rel=2e-3)


COST = st.tuples(st.integers(1, 40), st.floats(0, 10))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(COST, min_size=1, max_size=4), min_size=1, max_size=5), st.integers(1, 200), st.booleans())
def test_no_other_choice_is_better(costs: list[list[tuple[int, float]]], room: int, bits: bool) -> None:
    units = [
        Unit(f"u{i}", 0, (), 8, tuple(Option(f"c{j}", (), size, 3 * size) for j, (size, _) in enumerate(row)), {})
        for i, row in enumerate(costs)
    ]
    harms = {f"u{i}": {f"c{j}": harm for j, (_, harm) in enumerate(row)} for i, row in enumerate(costs)}
    limit = SizeLimit("", bits_per_weight=1.0) if bits else SizeLimit("", nbytes=1)
    budget = Budget(limit, room, 8 * len(units), 0)
    sums = [(sum(s for s, _ in picks) * (1 if bits else 3), sum(h for _, h in picks)) for picks in product(*costs)]
    fitting = [harm for size, harm in sums if size <= room]
    if not fitting:
        with pytest.raises(UserError):
            choose(units, harms, budget)
        return
    chosen = choose(units, harms, budget)
    assert sum(budget.cost(option) for option in chosen.values()) <= room
    total = sum(harms[name][option.candidate] for name, option in chosen.items())
    assert total <= min(fitting) * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.usefixtures("alone")
def test_the_files_are_no_larger_than_asked_and_hardly_smaller(model: Path, tmp_path: Path, share: float) -> None:
    least = 2 * 4096 * 64 * 2  # the embedding and the head, which stay
    size = int(least + share * (stored_bytes(model) - least))
    made = auto(model, tmp_path / "out", f"{size}")
    assert made.nbytes == stored_bytes(tmp_path / "out") <= size
    assert made.nbytes > size - 16_000  # one linear of this model more or less
    assert 0.5 < made.ratio < 2
    report = json.loads((tmp_path / "out" / "quantkit-report.json").read_text())
    assert made.measured_kl == report["held_out"]["kl"]
    assert not (tmp_path / "out.harms").exists()


@pytest.mark.usefixtures("alone")
def test_the_recipe_makes_the_same_bytes_again(model: Path, tmp_path: Path) -> None:
    made = auto(model, tmp_path / "out", "4.6bpw")
    assert made.bits_per_weight <= 4.6
    recipe = load(tmp_path / "out" / "recipe.yaml")
    report = pipeline.quantize(recipe, tmp_path / "again", progress=False)
    assert tensors(tmp_path / "again") == tensors(tmp_path / "out")
    assert report.bits_per_weight == pytest.approx(made.bits_per_weight)
    assert len({record.scheme for record in report.linears}) > 1, "a choice that is uniform tests nothing"
    assert quantkit.verify(tmp_path / "out").verdict == "loads"


def test_siblings_move_together_and_refused_candidates_say_why(model: Path, tmp_path: Path) -> None:
    ready = prepared(model, tmp_path / "out", "W4A16:g32,W4A16:g128", engine="vllm", tp=2)
    assert [len(unit.members) for unit in ready.units] == [3, 1, 2, 1] * 2
    for unit in ready.units:
        assert [option.candidate for option in unit.options] == ["W4A16:g32", DENSE]
        assert "128" in unit.refused["W4A16:g128"]
    alone = prepared(model, tmp_path / "out", "W4A16:g64", engine="vllm", tp=1).units[-1]
    split = prepared(model, tmp_path / "out", "W4A16:g64,W4A16:g32", engine="vllm", tp=4).units[-1]
    assert alone.options[0].candidate == "W4A16:g64"  # down_proj: 128 inputs, 32 for each of 4 devices
    assert split.options[0].candidate == "W4A16:g32"
    assert "64" in split.refused["W4A16:g64"]
    assert all(len(unit.members) == 1 for unit in prepared(model, tmp_path / "out", engine="transformers").units)


@pytest.mark.usefixtures("alone")
def test_an_engine_loads_what_was_made_for_it(model: Path, tmp_path: Path) -> None:
    auto(model, tmp_path / "out", "6bpw", candidates="W4A16,W8A16,W3A16,FP8_DYNAMIC", engine="vllm", tp=2)
    assert quantkit.verify(tmp_path / "out", "vllm", tp=2).verdict == "loads"


@pytest.mark.usefixtures("alone")
def test_all_experts_of_a_layer_are_one_unit(tmp_path: Path) -> None:
    config = t.Qwen3MoeConfig(**SHAPE, moe_intermediate_size=64, num_experts=2, num_experts_per_tok=1)
    model = save(config, tmp_path / "moe")
    made = auto(model, tmp_path / "out", "6bpw", candidates="W4A16:g32,W8A16:channel")
    units = json.loads((tmp_path / "out" / "quantkit-auto.json").read_text())["units"]
    assert len(units["model.layers.0.mlp.experts"]["linears"]) == 2 * 3
    recipe = load(tmp_path / "out" / "recipe.yaml")
    bits = {"W4A16:g32": 4, "W8A16:channel": 8}
    for unit in units.values():
        found = [recipe.weights_for(name, "Linear") for name in unit["linears"]]
        assert [None if w is None else w.bits for w in found] == [bits.get(unit["candidate"])] * len(found)
    assert made.measured_kl > 0


@pytest.mark.usefixtures("alone")
def test_a_killed_run_goes_on_with_the_harms_it_has(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto(model, tmp_path / "whole", "4.6bpw")
    real, measured = HarmMeter.measure, list[int]()

    def dies(self: HarmMeter, units: Sequence[Unit], note: Any) -> Any:
        if self.meter.block == 1 and 1 not in measured:
            measured.append(1)
            raise KeyboardInterrupt
        measured.append(self.meter.block)
        return real(self, units, note)

    monkeypatch.setattr(HarmMeter, "measure", dies)
    with pytest.raises(KeyboardInterrupt):
        auto(model, tmp_path / "out", "4.6bpw")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="candidates"):
        auto(model, tmp_path / "out", "4.6bpw", candidates="W4A16")
    auto(model, tmp_path / "out", "4.6bpw")
    assert measured == [0, 1, 1]
    for name in ("recipe.yaml", "quantkit-auto.json", "model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_a_run_leaves_of_harms(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed among the whole runs that tell it, and gone on with those that were done."""
    real, done = ContextRuns.divergence, list[float]()

    def dies(self: ContextRuns, chosen: Mapping[str, Option]) -> float:
        if len(done) == 3:
            done.append(0.0)
            raise KeyboardInterrupt
        done.append(real(self, chosen))
        return done[-1]

    monkeypatch.setattr(ContextRuns, "divergence", dies)
    with pytest.raises(KeyboardInterrupt):
        auto(model, tmp_path / "out", "3.8bpw")
    calls, quantize = list[Path](), pipeline.quantize

    def counted(recipe: Recipe, output: Path, **more: Any) -> Any:
        calls.append(output)
        return quantize(recipe, output, **more)

    monkeypatch.setattr(pipeline, "quantize", counted)
    made = auto(model, tmp_path / "out", "3.8bpw")
    known = done[:3]
    assert done[4:7] == known
    assert len(calls) == len(done[4:]) - 3 + 1  # the last is the result
    units = json.loads((tmp_path / "out" / "quantkit-auto.json").read_text())["units"]
    left = {name: unit["share_left"] * unit["kl"][unit["candidate"]] for name, unit in units.items()}
    assert sum(left.values()) == pytest.approx(made.predicted_kl)
    assert all(SHARES[0] <= unit["share_left"] <= SHARES[1] for unit in units.values())
    first = units["model.layers.0.self_attn.qkv_proj"]
    assert any(
        first["share_left"] == pytest.approx(min(max((known[1] - known[0]) / alone, SHARES[0]), SHARES[1]))
        for alone in first["kl"].values()
        if alone > FLOOR * known[0]
    )
    assert 0.6 < made.ratio < 1.6


def test_overrides_keep_inputs_of_other_candidates_as_they_are(model: Path, tmp_path: Path) -> None:
    ready = prepared(model, tmp_path / "out", "FP8_DYNAMIC,W4A16:g32")
    chosen = {unit.name: unit.options[i % 3] for i, unit in enumerate(ready.units)}
    mixed = recipe(ready, chosen)
    for unit in ready.units:
        for name in unit.members:
            weights, inputs = mixed.weights_for(name, "Linear"), mixed.activations_for(name, "Linear")
            candidate = chosen[unit.name].candidate
            assert (weights is None) == (candidate == DENSE)
            if weights is not None:
                assert (weights.type, inputs is None) == (
                    ("fp8", False) if candidate == "FP8_DYNAMIC" else ("int", True)
                )
                assert weights.algorithm == ("rtn" if candidate == "FP8_DYNAMIC" else "gptq")


@pytest.mark.parametrize(("size", "message"), [
    ("2bpw", "smallest is 3.5bpw"),
    ("100", r"smallest is [\d,]+ bytes"),
    ("16bpw", "16bpw as it is stored"),
    ("5GB", "bytes as it is stored"),
    ("4.5", "less|smallest"),
    ("4.5 bits", "is no size"),
    ("0bpw", "is no size"),
    ("-3MB", "is no size"),
])  # fmt: skip
def test_sizes_that_cannot_be(model: Path, tmp_path: Path, size: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        auto(model, tmp_path / "out", size)
    assert not list(tmp_path.iterdir())


def test_the_smallest_size_that_is_named_can_be_asked_for(model: Path, tmp_path: Path) -> None:
    ready = prepared(model, tmp_path / "out")
    for limit in (SizeLimit("1bpw", 1.0), SizeLimit("1", nbytes=1)):
        with pytest.raises(UserError) as refused:
            ready.budget(limit)
        least = str(refused.value).split("smallest is ")[1].split("\n")[0]
        number = float(least.removesuffix("bpw")) if "bpw" in least else int(least.split()[0].replace(",", ""))
        ready.budget(replace(limit, **{"bits_per_weight" if "bpw" in least else "nbytes": number}))


@pytest.mark.parametrize(("more", "message"), [
    ({"candidates": "W4A61"}, "did you mean `W4A16`"),
    ({"candidates": "FP8_DINAMIC"}, "did you mean `FP8_DYNAMIC`"),
    ({"candidates": ""}, "no candidate named"),
    ({"candidates": "W4A16:g0"}, "no group size"),
    ({"candidates": "FP8_DYNAMIC:g32"}, "group size of their own"),
    ({"candidates": "W4A16:g32", "engine": "tensorrt-llm"}, "no linear can become any of them that tensorrt-llm loads"),
    ({"candidates": "W4A16:g48"}, "no linear can become any"),
    ({"engine": "llama.cpp"}, "GGUF"),
    ({"calibration": SECTION | {"data": "absent.txt"}}, "absent.txt"),
    ({"tp": 0, "engine": "vllm"}, "tp"),
    ({"tp": 2}, "no engine is named"),
])  # fmt: skip
def test_other_mistakes(model: Path, tmp_path: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        auto(model, tmp_path / "out", "6bpw", **more)
    assert not list(tmp_path.iterdir())


def test_an_output_that_exists_is_left_alone(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists"):
        auto(model, tmp_path / "out", "4.6bpw")
    (tmp_path / "new.harms").mkdir()
    (tmp_path / "new.harms" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"new\.harms"):
        auto(model, tmp_path / "new", "4.6bpw")
    assert (tmp_path / "new.harms" / "mine.txt").read_text() == "mine"
