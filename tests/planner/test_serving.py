"""`quantkit plan --gpu`: figures made by hand, what config.json says of a model, mistakes, and verify's own verdict."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    BloomConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen3NextConfig,
)

from quantkit.api import verify
from quantkit.errors import UserError
from quantkit.planner import candidate_schemes, serving
from quantkit.planner.candidate_schemes import Sample, one_expert, shipped
from quantkit.planner.devices import DEVICES
from quantkit.planner.model_inventory import take_inventory
from quantkit.planner.roofline import REGIMES
from quantkit.planner.served_model import ServedModel, StoredWeights, served_model
from quantkit.planner.serving import fitted, plan_serving
from quantkit.planner.traffic import Traffic, config_folder
from quantkit.quantization.pipeline import quantize
from quantkit.recipe.load import load
from quantkit.recipe.names import BEST
from quantkit.report.serving_plan import SchemeServing, ServingPlan

LLAMA = Path(__file__).parent / "configs" / "llama-3-8b.json"


def folder_of(tmp_path: Path, config: dict[str, Any] | Path = LLAMA, **changes: Any) -> Path:
    data = json.loads(config.read_text()) if isinstance(config, Path) else config
    (tmp_path / "config.json").write_text(json.dumps(data | changes))
    return tmp_path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(llama: Path) -> ServedModel:
    return served_model(take_inventory(llama))


@pytest.fixture(scope="module")
def plan(llama: Path) -> ServingPlan:
    return plan_serving(llama, "h100", Traffic(price=2.5))


@pytest.fixture
def few_schemes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the advice alone, where others would only take time."""
    names = ("W4A16", "W8A16", "W8A8", "FP8_DYNAMIC")
    monkeypatch.setattr(candidate_schemes, "BEST", {name: BEST[name] for name in names})


def row(plan: ServingPlan, name: str) -> SchemeServing:
    return next(each for each in plan.schemes if each.scheme == name)


def model_of(tmp_path: Path, config: Any, **changes: Any) -> ServedModel:
    return served_model(take_inventory(folder_of(tmp_path, config.to_dict() | changes)))


def test_llama_3_8b_on_an_h100(plan: ServingPlan) -> None:
    assert plan.parameters == plan.active_parameters == 8030261248
    assert plan.kv["bf16"].bytes_per_token == 131072
    assert plan.kv["bf16"].bytes_by_context["4096"] == 512 * 2**20
    assert plan.kv["fp8"].bytes_per_token == 65536
    assert int(plan.device.ridge["bf16"]) == 295
    assert plan.intensity["decode"] == pytest.approx(1, rel=1e-3)
    assert plan.intensity["prefill"] == pytest.approx(1024, rel=0.08)  # the output matrix is asked for one token
    base = row(plan, "bf16")
    assert base.weight_bytes == 2 * 8030261248
    read = base.weight_bytes - 2 * 128256 * 4096 + 131072 * (1024 + 128)
    assert base.token_seconds == pytest.approx(read / 3.35e12)
    room = 0.9 * 80 * 2**30 - base.weight_bytes
    assert base.max_concurrency == {
        "bf16": int(room // 2**30),
        "fp8": int(room // 2**29),
        "int8": int(room // (66560 * 8192)),
    }
    assert (base.prefill.regime, base.decode.regime) == ("compute", "memory bandwidth")


def test_schemes_of_llama_3_8b(plan: ServingPlan) -> None:
    base, fp8, w4 = (row(plan, name) for name in ("bf16", "FP8_DYNAMIC", "W4A16"))
    assert base.ttft_seconds / fp8.ttft_seconds == pytest.approx(1.8, abs=0.05)
    assert w4.ttft_seconds == base.ttft_seconds
    assert base.token_seconds / fp8.token_seconds == pytest.approx(1.86, abs=0.02)  # the output matrix stays in 16 bits
    assert w4.weight_bytes == 5700595200
    assert w4.bits == 4.125
    assert plan.take is not None
    assert (plan.take.scheme, plan.take.recipe, plan.fits) == ("FP8_DYNAMIC", "fp8-dynamic", True)


def test_cost(plan: ServingPlan) -> None:
    base = row(plan, "bf16")
    assert base.tokens_per_second == pytest.approx(256 / (base.ttft_seconds + 256 * base.token_seconds))
    assert base.cost_per_million_output_tokens is not None
    assert base.cost_per_million_output_tokens == pytest.approx(2.5 / 3600 / base.tokens_per_second * 1e6)
    assert base.cost_per_million_tokens == pytest.approx(base.cost_per_million_output_tokens / 5)


def test_json_has_one_shape(plan: ServingPlan, llama: Path) -> None:
    other = plan_serving(llama, "rtx4090", Traffic(tp=2, profile="batch")).to_json()
    first = json.loads(json.dumps(plan.to_json()))
    assert first["schema"] == 1
    assert first.keys() == other.keys()
    assert first["schemes"][0].keys() == first["take"].keys() == other["schemes"][0].keys()
    assert first["all_reduce"] is None
    assert other["all_reduce"]["count"] == 64
    assert first["device"]["source"].startswith("https://")


def test_the_keys_of_the_json_are_frozen(plan: ServingPlan) -> None:
    found = plan.to_json()
    assert sorted(found) == sorted(
        [
            *("schema", "model", "model_type", "device", "engine", "tp", "pp", "profile", "context", "concurrency"),
            *("prompt", "output", "price", "parameters", "active_parameters", "weights", "kv", "intensity"),
            *("all_reduce", "schemes", "take", "take_why", "advice", "impossible", "unknown", "assumptions", "fits"),
        ]
    ), "a changed shape is a new SCHEMA"
    assert sorted(found["schemes"][0]) == sorted(
        [
            *("scheme", "recipe", "kv_cache", "bits", "weight_bytes", "weight_bytes_per_device", "weights_fit", "fits"),
            *("max_concurrency", "prefill", "decode", "ttft_seconds", "token_seconds", "request_seconds"),
            *("decode_tokens_per_second", "tokens_per_second", "cost_per_million_output_tokens"),
            *("cost_per_million_tokens", "refused", "warnings"),
        ]
    )
    regimes = {each[phase]["regime"] for each in found["schemes"] for phase in ("prefill", "decode")}
    assert regimes <= set(REGIMES)


def test_what_this_model_cannot_have(tmp_path: Path) -> None:
    found = plan_serving(folder_of(tmp_path, LLAMA, hidden_size=96 * 32, head_dim=96), "h100", Traffic(tp=2))
    assert found.impossible == {}
    narrow = folder_of(tmp_path, LLAMA, hidden_size=144, intermediate_size=144, head_dim=36, num_attention_heads=4,
                       num_key_value_heads=4, num_hidden_layers=1, vocab_size=96)  # fmt: skip
    found = plan_serving(narrow, "h100", Traffic())
    assert "group_size 128" in found.impossible["W4A16"]
    assert "W4A16" not in {each.scheme for each in found.schemes}


@pytest.mark.parametrize("engine", ["vllm", "tensorrt-llm"])
def test_an_fp8_cache_beside_bf16(llama: Path, engine: str) -> None:
    """Where no 8-bit scheme is multiplied, the cache is still the engine's own."""
    found = plan_serving(llama, "l4", Traffic(concurrency=10), engine=engine)
    assert found.take is not None
    assert found.take.kv_cache == ("fp8" if found.take.max_concurrency["bf16"] < 10 else "bf16")


def test_a_cpu_keeps_caches_in_int8(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = replace(DEVICES["a100"], name="cpu", memory=24 << 30)
    monkeypatch.setattr(serving, "device_named", lambda _: cpu)
    found = plan_serving(llama, "cpu", Traffic(concurrency=20))
    assert found.take is not None
    assert (found.take.scheme, found.take.kv_cache) == ("W8A8", "int8")


@pytest.mark.usefixtures("few_schemes")
def test_tensor_parallelism_of_a_70b_model(tmp_path: Path) -> None:
    large: dict[str, Any] = {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    }
    folder = folder_of(tmp_path, LLAMA, **large)
    found = plan_serving(folder, "h100", Traffic(tp=2))
    assert found.all_reduce is not None
    assert found.all_reduce.count == 160
    assert found.all_reduce.bytes_per_token == 2.5 * 2**20
    assert found.all_reduce.decode_seconds == pytest.approx(320e-6, rel=0.02)
    alone = plan_serving(folder, "h100", Traffic())
    base = row(alone, "bf16")
    assert base.weight_bytes == pytest.approx(140e9, rel=0.01)
    assert not base.weights_fit
    assert (base.prefill.regime, base.decode.regime) == ("capacity", "capacity")
    assert base.token_seconds == pytest.approx(42e-3, rel=0.02)
    assert alone.take is not None
    assert (alone.take.scheme, alone.advice[0].rule) == ("W8A16", "weights")


@pytest.mark.usefixtures("few_schemes")
def test_caches_that_do_not_fit(llama: Path) -> None:
    found = plan_serving(llama, "h100", Traffic(concurrency=100))
    assert row(found, "bf16").decode.regime == "capacity"
    assert found.take is not None
    assert (found.take.scheme, found.take.kv_cache, found.fits) == ("FP8_DYNAMIC", "fp8", True)
    assert not plan_serving(llama, "h100", Traffic(concurrency=1000)).fits


@pytest.mark.usefixtures("few_schemes")
def test_prompts_of_others_are_the_scheduler(llama: Path) -> None:
    found = plan_serving(llama, "h100", Traffic(concurrency=16, prompt=4000, output=16))
    assert row(found, "bf16").decode.regime == "scheduler"


@pytest.mark.usefixtures("few_schemes")
@pytest.mark.parametrize(
    ("gpu", "profile", "taken"),
    [
        ("h100", "interactive", "W4A16"),
        ("h100", None, "FP8_DYNAMIC"),
        ("a100", None, "W8A8"),
        ("mi300x", None, "FP8_DYNAMIC"),
        ("b200", "interactive", "W4A16"),
    ],
)
def test_advice_by_profile_and_hardware(llama: Path, gpu: str, profile: str | None, taken: str) -> None:
    found = plan_serving(llama, gpu, Traffic(profile=profile))
    assert found.take is not None
    assert found.take.scheme == taken


@pytest.mark.usefixtures("few_schemes")
def test_batches_of_prompts_take_fp8(llama: Path) -> None:
    found = plan_serving(llama, "h100", Traffic(profile="batch", concurrency=64, prompt=2048, output=128))
    assert found.take is not None
    assert (found.take.scheme, found.advice[0].rule) == ("FP8_DYNAMIC", "prefill")


@pytest.mark.usefixtures("few_schemes")
def test_a_pipeline_halves_weights_and_no_links(llama: Path) -> None:
    one, two = plan_serving(llama, "h100", Traffic()), plan_serving(llama, "h100", Traffic(pp=2, concurrency=2))
    assert row(two, "bf16").weight_bytes_per_device == row(one, "bf16").weight_bytes / 2
    assert two.all_reduce is None
    assert row(two, "bf16").token_seconds == pytest.approx(row(one, "bf16").token_seconds, rel=0.01)
    assert row(two, "bf16").decode_tokens_per_second == pytest.approx(
        2 * row(one, "bf16").decode_tokens_per_second, rel=0.01
    )


def test_experts_count_by_what_a_token_passes_through(tmp_path: Path) -> None:
    found = model_of(tmp_path, MixtralConfig())
    assert found.params == pytest.approx(46.7e9, rel=0.01)
    assert found.active == pytest.approx(12.9e9, rel=0.01)
    assert found.touched(1) == 0.25
    assert found.touched(64) == pytest.approx(1, abs=1e-6)
    whole = StoredWeights(2 * found.params, 2 * found.experts)
    assert found.read_bytes(whole, 1) == pytest.approx(2 * (found.active - found.embedding), rel=1e-6)
    assert found.read_bytes(whole, 1000) == pytest.approx(2 * (found.params - found.embedding), rel=1e-6)


@pytest.mark.parametrize("scheme", ["W4A16", "FP8_DYNAMIC"])
def test_one_expert_stands_for_all(tmp_path: Path, scheme: str) -> None:
    config = MixtralConfig(num_hidden_layers=2, hidden_size=256, intermediate_size=512, num_local_experts=6)
    folder = folder_of(tmp_path, config.to_dict() | {"dtype": "bfloat16"})
    whole = take_inventory(folder)
    few = one_expert(whole)
    assert few.copies == 6
    assert len(few.inventory.matrices) == 2 * (4 + 3)
    arguments = (config.to_dict(), "vllm", DEVICES["h100"], 1)
    found = shipped(scheme, BEST[scheme], few, *arguments)
    assert found == shipped(scheme, BEST[scheme], Sample(whole), *arguments)
    assert found.stored is not None
    assert found.stored.expert_quantized == whole.params["experts"]


def test_latent_attention_caches_one_vector_on_every_device(tmp_path: Path) -> None:
    config = DeepseekV3Config(num_hidden_layers=4, first_k_dense_replace=3, n_routed_experts=8, n_group=1, topk_group=1)
    found = model_of(tmp_path, config)
    assert found.token_bytes["bf16"] == 4 * (512 + 64) * 2
    assert found.cache_share(4) == 1
    assert found.cache_share(4, 2) == 0.5


def test_windows_bound_the_cache(tmp_path: Path) -> None:
    found = model_of(tmp_path, MistralConfig(sliding_window=4096))
    assert found.cache_bytes(32768) == found.cache_bytes(4096) == 4096 * found.token_bytes["bf16"]
    (tmp_path / "gemma").mkdir()
    small: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 256}
    mixed = model_of(tmp_path / "gemma", Gemma3TextConfig(num_hidden_layers=12, sliding_window=512, **small))
    assert mixed.windows.count(None) == 2
    assert mixed.kept(4096) == 2 * 4096 + 10 * 512


def test_grouped_heads_are_copied_where_there_are_more_devices(tmp_path: Path) -> None:
    found = model_of(tmp_path, LlamaConfig(num_attention_heads=32, num_key_value_heads=2, num_hidden_layers=1))
    assert (found.cache_share(2), found.cache_share(8)) == (0.5, 0.5)


def test_one_head_of_keys_for_all_queries(tmp_path: Path) -> None:
    found = model_of(tmp_path, FalconConfig(hidden_size=256, num_attention_heads=4, num_hidden_layers=3, vocab_size=96))
    assert found.kv_heads == 1
    assert found.token_bytes["bf16"] == 3 * 2 * 64 * 2


def test_what_config_json_does_not_say(tmp_path: Path) -> None:
    found = model_of(tmp_path, BloomConfig(hidden_size=64, n_layer=1, n_head=4, vocab_size=96))
    assert found.longest is None
    assert "longest context" in found.unknown[0]
    (tmp_path / "mamba").mkdir()
    states = model_of(tmp_path / "mamba", MambaConfig(num_hidden_layers=2, hidden_size=64, vocab_size=96))
    assert (states.cache_bytes(4096), states.experts) == (0, 0)
    assert "the 2 layers without a cache" in states.unknown[0]
    (tmp_path / "next").mkdir()
    mixed = model_of(tmp_path / "next", Qwen3NextConfig(num_hidden_layers=4, num_experts=4, vocab_size=96))
    assert (mixed.layers, len(mixed.windows)) == (4, 1)
    assert "the 3 layers without a cache" in mixed.unknown[0]


def mistakes() -> list[Any]:
    return [
        (Traffic(tp=3), "--tp 3 does not divide the model's attention: 32 heads and 8 of cached keys"),
        (Traffic(tp=64), "--tp 64 does not divide"),
        (Traffic(context=8193), "--context 8193: .* takes 8192 tokens"),
        (Traffic(context=131072), "--context 131072"),
        (Traffic(prompt=8000, output=400), "--prompt 8000 and --output 400 are 8400 tokens"),
        (Traffic(context=512, prompt=512), "more than the context of 512"),
        (Traffic(context=-1), "--context is -1"),
        (Traffic(concurrency=0), "--concurrency is 0"),
        (Traffic(prompt=-5), "--prompt is -5"),
        (Traffic(output=0), "--output is 0"),
        (Traffic(tp=-2), "--tp is -2"),
        (Traffic(pp=0), "--pp is 0"),
        (Traffic(pp=33), "--pp 33: the model has 32 layers"),
        (Traffic(price=-2.5), "--price is -2.5"),
        (Traffic(price=float("nan")), "--price is nan"),
        (Traffic(profile="chat"), "unknown profile 'chat'"),
    ]


@pytest.mark.parametrize(("traffic", "message"), mistakes())
def test_mistakes(model: ServedModel, traffic: Traffic, message: str) -> None:
    with pytest.raises(UserError, match=message) as found:
        fitted(traffic, model, "llama")
    assert "\nhint: " in str(found.value)


def test_a_recipe_is_a_row_of_its_own(llama: Path) -> None:
    found = plan_serving(llama, "h100", Traffic(), recipe=load("gptq-w4a16-g32", model=str(llama)))
    assert row(found, "recipe").bits == pytest.approx(4.5)


def test_a_config_by_itself() -> None:
    with config_folder(str(LLAMA)) as folder:
        assert json.loads((Path(folder) / "config.json").read_text())["hidden_size"] == 4096
    assert not Path(folder).exists()
    with config_folder("org/name") as same:
        assert same == "org/name"


@pytest.mark.parametrize("scheme", ["W4A16", "W8A16", "W8A8", "FP8_DYNAMIC"])
def test_what_is_advised_passes_verify(tmp_path: Path, scheme: str) -> None:
    """The planner's verdict from config.json is that of `verify` on the folder that the recipe makes."""
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        head_dim=32,
    )
    source = tmp_path / "model"
    LlamaForCausalLM(config).bfloat16().save_pretrained(source)
    sets = ["calibration=null", "transforms=[]", "weights.algorithm=rtn", "output.engine=vllm"]
    quantize(load(None, sets, str(source), scheme=scheme), tmp_path / "out", device="cpu", progress=False)
    for gpu in ("h100", "a100", "mi300x", "cpu"):
        verdict = verify(tmp_path / "out", engine="vllm", hardware=gpu)
        inventory = take_inventory(source)
        device = DEVICES.get(gpu) or replace(DEVICES["h100"], name=gpu)
        found = shipped(scheme, BEST[scheme], Sample(inventory), inventory.config.to_dict(), "vllm", device, 1)
        assert (found.refused is None) == (verdict.verdict == "loads"), (gpu, found.refused, verdict.findings)
