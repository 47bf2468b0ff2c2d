"""`quantkit plan`: estimated sizes against real runs, memory against runs that were measured, the verdict."""

import json
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import DeepseekV3Config, LlamaConfig

from quantkit.cache_spec import CacheSpec
from quantkit.errors import UserError
from quantkit.planner.estimate import (
    estimate,
)
from quantkit.planner.model_inventory import kv_bytes, take_inventory
from quantkit.planner.this_machine import Machine, measure
from quantkit.quantization.pipeline import quantize
from quantkit.recipe.load import from_data
from quantkit.recipe.recipe import Recipe
from quantkit.report.console import render_plan, size_text
from quantkit.report.plan import Plan
from quantkit.types import KVSpec
from tests.tiny_models import tiny_model
from tests.tools.plan_memory import compare

GIB = 1 << 30
MACHINE = Machine(2, 22 * GIB, 55 * GIB, 100e9, 1e9, GIB // 3)
LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
LLAMA_405B = LLAMA_8B | {
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
}
FILE = Path(__file__).parents[2] / "examples/tiny-llama/calibration.txt"
TEXT = {"data": str(FILE), "samples": 16, "seq_len": 256}


def config_folder(tmp_path: Path, config: dict[str, Any]) -> Path:
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def gptq(**options: Any) -> Recipe:
    return from_data({"calibration": TEXT, "weights": {"algorithm": {"gptq": options}}})


MINMAX = {"weights": {"algorithm": {"rtn": {"range": "minmax"}}}}


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "mixtral"])
@pytest.mark.parametrize(
    "weights", [{"group_size": 8}, {"bits": 8, "group_size": "channel", "symmetric": True}], ids=["g8", "channel"]
)
def test_sizes_are_those_of_a_real_run(tmp_path: Path, name: str, weights: dict[str, Any]) -> None:
    source = tmp_path / "in"
    tiny_model(name).bfloat16().save_pretrained(source)
    recipe = from_data({"model": str(source), "weights": weights})
    report = quantize(recipe, tmp_path / "out", device="cpu", progress=False)
    seen = estimate(recipe, source, machine=MACHINE)
    alone = estimate(recipe, config_folder(tmp_path / "alone", json.loads((source / "config.json").read_text())))
    assert seen.weights_seen
    assert not alone.weights_seen
    assert seen.linears == alone.linears == len(report.linears)
    assert seen.bytes_before == report.bytes_before
    assert seen.bytes_after == report.bytes_after
    assert alone.bytes_after == pytest.approx(report.bytes_after, rel=0.01)
    assert seen.bits_per_weight == pytest.approx(report.bits_per_weight, rel=0.001)


@pytest.mark.parametrize(
    ("recipe", "measured"),
    [
        (from_data(MINMAX), 1.3),
        (gptq(refit=False), 3.9),
        (gptq(sweeps=2), 5.1),
    ],
    ids=["minmax", "plain", "refit"],
)
def test_memory_of_runs_that_were_measured(tmp_path: Path, recipe: Recipe, measured: float) -> None:
    """A Llama of 8B layer sizes, 16 x 256 tokens: figures of the README, in GiB."""
    found = estimate(recipe, config_folder(tmp_path, LLAMA_8B), machine=MACHINE)
    assert found.peak_memory_bytes / GIB == pytest.approx(measured, rel=0.15)
    assert found.fits
    assert sum(found.memory.values()) == found.peak_memory_bytes


def test_parameters_and_sizes_by_hand(tmp_path: Path) -> None:
    found = estimate(from_data(MINMAX), config_folder(tmp_path, LLAMA_8B), machine=MACHINE)
    block = 2 * 4096**2 + 2 * 1024 * 4096 + 3 * 4096 * 14336
    assert found.params == {
        "embeddings": 128256 * 4096,
        "head": 128256 * 4096,
        "norms and biases": 65 * 4096,
        "linears": 32 * block,
    }
    assert found.bytes_before == 2 * 8030261248
    codes_and_scales = 32 * block * 4.125 / 8
    dense = 2 * (2 * 128256 * 4096 + 65 * 4096)
    assert found.bytes_after == codes_and_scales + dense + 7 * 32 * 16  # two int64 for the shape of each linear
    assert found.bits_per_weight == 4.125
    assert found.schemes == {"int4 sym g128": 224}


def test_refuses_what_is_far_too_large_and_names_the_knob(tmp_path: Path) -> None:
    found = estimate(gptq(), config_folder(tmp_path, LLAMA_405B), machine=MACHINE)
    assert not found.fits
    assert [problem.split(":")[0] for problem in found.problems] == ["memory", "disk"]
    memory, disk = found.advice
    assert memory.startswith("memory: set weights.algorithm: {rtn: {range: minmax}} with transforms: [] and no calibr")
    assert disk.startswith("disk: free 1")
    tiny = replace(MACHINE, free_memory=4 * GIB, free_disk=999 * GIB)
    (only,) = estimate(from_data(MINMAX), config_folder(tmp_path, LLAMA_405B), machine=tiny).advice
    assert only.startswith("memory: no setting needs less than 1")


def test_mildest_knobs_first(tmp_path: Path) -> None:
    folder = config_folder(tmp_path, LLAMA_8B)
    recipe = from_data({"calibration": TEXT | {"samples": 128}, "weights": {"algorithm": "gptq"}})
    full = estimate(recipe, folder, machine=MACHINE)
    short = replace(MACHINE, free_memory=int(full.peak_memory_bytes) - 1)
    found = estimate(recipe, folder, machine=short)
    assert found.advice[0] == "memory: set calibration.samples: 64"
    assert len(found.advice) == 3
    scarce = replace(MACHINE, free_disk=4 * GIB)
    eight = from_data({"weights": {"bits": 8, "group_size": "channel"}})
    advice = estimate(eight, folder, machine=replace(scarce, free_disk=6 * GIB)).advice
    assert advice[0] == "disk: set weights: {type: int, bits: 4, group_size: 128}"
    assert estimate(eight, folder, machine=replace(scarce, free_disk=GIB)).advice[0].startswith("disk: free 8.0 GB")


def test_large_states_go_to_the_disk(tmp_path: Path) -> None:
    folder = config_folder(tmp_path, LLAMA_8B)
    recipe = from_data({"calibration": TEXT | {"samples": 1024}, "weights": {"algorithm": "gptq"}})
    found = estimate(recipe, folder, machine=MACHINE)
    tokens = 1024 * 256
    states = 4 * tokens * (4096 * 2 + 3 * 4096 + 14336)  # two streams; inputs of qkv, o, gate and up, down
    assert found.disk_bytes - found.bytes_after == states
    assert found.memory["calibration states"] == 0


def test_time_grows_with_text_and_with_what_is_done(tmp_path: Path) -> None:
    folder = config_folder(tmp_path, LLAMA_8B)

    def spent(recipe: Recipe) -> dict[str, float]:
        return estimate(recipe, folder, machine=MACHINE).seconds

    more = from_data({"calibration": TEXT | {"samples": 32}, "weights": {"algorithm": {"gptq": {"refit": False}}}})
    plain, longer, refit = spent(gptq(refit=False)), spent(more), spent(gptq(sweeps=2))
    assert set(spent(from_data(MINMAX))) == {"reading and writing", "ranges and rounding"}
    assert longer["running the blocks"] == pytest.approx(2 * plain["running the blocks"])
    assert longer["statistics"] == pytest.approx(2 * plain["statistics"])
    assert longer["algorithms"] == pytest.approx(plain["algorithms"])
    assert refit["running the blocks"] == pytest.approx(2 * plain["running the blocks"], rel=0.1)  # held-out text once
    assert refit["algorithms"] > 3 * plain["algorithms"]


def test_cache_bytes_by_hand() -> None:
    llama: Any = LlamaConfig(num_hidden_layers=32, num_key_value_heads=8, hidden_size=4096, num_attention_heads=32)
    plain = 32 * 2 * 8 * 128
    assert kv_bytes(llama, None, torch.bfloat16) == 2 * plain
    assert kv_bytes(llama, KVSpec(8, "float"), torch.bfloat16) == plain
    assert kv_bytes(llama, KVSpec(4, "int", "token", group_size=32), torch.bfloat16) == plain / 2 + plain / 32 * 2
    assert kv_bytes(llama, KVSpec(8, "int", "token", symmetric=False), torch.bfloat16) == plain + plain / 128 * 3
    pair = CacheSpec(KVSpec(8, "int", "token"), KVSpec(4, "int", "token", False, 32, packed=True))
    assert kv_bytes(llama, pair, torch.bfloat16) == plain / 2 * (8 + 16 / 128 + 4.5) / 8
    assert kv_bytes(llama, CacheSpec(None, KVSpec(8, "float")), torch.bfloat16) == plain / 2 * 3
    latent: Any = DeepseekV3Config(num_hidden_layers=3, kv_lora_rank=512, qk_rope_head_dim=64)
    assert kv_bytes(latent, None, torch.bfloat16) == 3 * (512 + 64) * 2


@pytest.mark.parametrize(
    ("data", "expected"),
    [({"kv_cache": "fp8", "calibration": TEXT}, (65536, "fp8 tensor")), ({}, (131072, "as computed"))],
    ids=["fp8", "none"],
)
def test_cache_of_a_recipe(tmp_path: Path, data: dict[str, Any], expected: tuple[float, str]) -> None:
    found = estimate(from_data(data), config_folder(tmp_path, LLAMA_8B), machine=MACHINE)
    assert (found.kv_bytes_per_token, found.kv_cache) == expected


def test_linears_of_one_input_are_one_group(tmp_path: Path) -> None:
    inventory = take_inventory(config_folder(tmp_path, LLAMA_8B | {"num_hidden_layers": 1}))
    groups: dict[str, list[str]] = {}
    for matrix in inventory.matrices:
        groups.setdefault(matrix.group, []).append(matrix.name.rpartition(".")[2])
    assert list(groups.values()) == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


def test_rotation_unties_the_head(tmp_path: Path) -> None:
    folder = config_folder(tmp_path, LLAMA_8B | {"tie_word_embeddings": True})
    plain = estimate(from_data({}), folder, machine=MACHINE)
    turned = estimate(from_data({"transforms": ["rotation"]}), folder, machine=MACHINE)
    assert turned.bytes_after - plain.bytes_after == 128256 * 4096 * 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"weights": {"group_size": 96}}, "group_size 96 does not divide the input features of 224 of 224 linears"),
        ({"ignore": ["re:.*q_prj"]}, "matches no linear"),
        ({"ignore": ["re:.*"]}, "no linear is left"),
    ],
)
def test_refuses_what_quantize_refuses(tmp_path: Path, data: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        estimate(from_data(data), config_folder(tmp_path, LLAMA_8B), machine=MACHINE)


def test_refuses_an_unknown_architecture(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read this model's config\.json"):
        estimate(from_data({}), config_folder(tmp_path, {"model_type": "nonesuch"}), machine=MACHINE)


def test_measures_this_machine(tmp_path: Path) -> None:
    machine = measure(tmp_path)
    assert machine.cores >= 1
    assert machine.free_memory > 1 << 26
    assert 1e8 < machine.flops < 1e15
    assert machine.disk_rate > 1e5
    assert not list(tmp_path.iterdir())


def test_shown_with_the_verdict_last(tmp_path: Path) -> None:
    folder, out = config_folder(tmp_path, LLAMA_405B), StringIO()
    render_plan(estimate(gptq(), folder, machine=MACHINE), Console(file=out, width=160))
    text = out.getvalue()
    assert "405.85B parameters" in text
    assert "882 x int4 sym g128; sizes from config.json alone" in text
    assert text.index("peak memory") < text.index("it does not fit") < text.index("memory: set weights.algorithm")


SHORT = TEXT | {"seq_len": 32}
SAME: dict[str, dict[str, Any]] = {
    "ranges and order": {
        "weights": {"algorithm": {"gptq": {"ranges": "updated", "act_order": True}}},
        "calibration": TEXT,
    },
    "a misfit of small floats": {"scheme": "MXFP4", "calibration": SHORT},
    "a misfit of groups": {"weights": {"bits": 4, "group_size": 128}},
    "the format": {"weights": {"bits": 3, "group_size": 16}, "output": {"format": "awq"}},
    "the format's cache": {
        "weights": {"group_size": 16},
        "kv_cache": "fp8",
        "calibration": TEXT,
        "output": {"format": "gptq"},
    },
    "the engine": {"weights": {"bits": 8, "group_size": 16}, "output": {"format": "gptq", "engine": "vllm", "tp": 3}},
    "no effect": {"weights": {"group_size": 16}, "overrides": [{"match": "nothing", "weights": {"bits": 8}}]},
    "no text": {"weights": {"group_size": 16, "algorithm": "gptq"}, "calibration": SHORT | {"data": "./nope.txt"}},
}


@pytest.mark.parametrize("case", SAME)
def test_what_one_refuses_the_other_refuses_in_the_same_words(tmp_path: Path, case: str) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    model.resize_token_embeddings(4096, mean_resizing=False)  # the tokenizer's
    model.save_pretrained(tmp_path / "m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "m" / name).write_bytes((FILE.parent / name).read_bytes())
    data = {"output": {"engine": None}} | SAME[case] | {"model": str(tmp_path / "m")}
    data["output"] = {"engine": None} | data["output"]
    words = []
    for run in (
        lambda recipe: quantize(recipe, tmp_path / "out", progress=False),
        lambda recipe: estimate(recipe, tmp_path / "m", machine=MACHINE),
    ):
        with pytest.raises(UserError) as failure:
            run(from_data(data))
        words.append(str(failure.value))
    assert words[0] == words[1]
    assert not (tmp_path / "out.partial").exists()


def test_sizes_by_type_of_a_gguf(tmp_path: Path) -> None:
    """Of a named mix those of the types; of a measured one what is known before: its size, and what has a type."""
    folder = config_folder(tmp_path, LLAMA_8B)
    weights = 8030261248

    def planned(**section: Any) -> Plan:
        return estimate(from_data({"calibration": TEXT, "gguf": section}), folder, machine=MACHINE)

    named = planned(mix="Q4_K_M")
    assert named.types is not None
    assert {name: count for name, (count, _) in named.types.items()} == {"Q4_K": 193, "Q6_K": 33, "F32": 65}
    assert sum(held for _, held in named.types.values()) == named.bytes_after
    assert named.bytes_after == pytest.approx(4.92e9, rel=0.01)  # as the world knows the file
    found = planned(mix={"bits_per_weight": 4.5}, output="q6_k")
    assert found.types is not None
    assert {name: count for name, (count, _) in found.types.items()} == {"by measured harm": 225, "Q6_K": 1, "F32": 65}
    assert sum(held for _, held in found.types.values()) == found.bytes_after == int(4.5 * weights / 8)
    assert found.schemes == {"by measured harm": 224}
    assert found.bits_per_weight == pytest.approx(4.5)
    assert planned(mix={"size": "5GB"}).bytes_after == 5 * 10**9
    with pytest.raises(UserError, match="too few"):
        planned(mix={"size": "1GB"})


def test_measuring_types_takes_the_whole_model(tmp_path: Path) -> None:
    """In float32 and once more as stored; where that is too much, a named mix is the way."""
    recipe = from_data({"calibration": TEXT, "weights": {"algorithm": "gptq"}, "gguf": {"mix": {"size": "5GB"}}})
    found = estimate(recipe, config_folder(tmp_path, LLAMA_8B), machine=MACHINE)
    assert found.memory["the whole model, and as stored"] == 6 * 8030261248
    assert found.memory["its output, to measure types by"] > 4 * 2048 * 128256
    assert found.seconds["measuring types"] > found.seconds["algorithms"]
    assert found.advice[0] == "memory: set gguf.mix: Q4_K_M"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fp8-dynamic", "rtn-w4a16", "gptq-w4a16", "awq", "fp8-kv"])
def test_memory_is_what_a_run_takes(recipe: str) -> None:
    """In processes of their own: `python tests/tools/plan_memory.py` prints the table."""
    row = compare(recipe, str(FILE.parent), str(FILE), samples=64, seq_len=256)
    assert 0.85 < row.ratio < 1.15, row


def test_what_is_left_to_auto_is_settled_and_shown(tmp_path: Path) -> None:
    recipe = from_data({"calibration": {"data": "general"}, "weights": {"algorithm": "gptq"}})
    small = estimate(recipe, config_folder(tmp_path, LLAMA_8B | {"max_position_embeddings": 1024}), machine=MACHINE)
    assert small.calibration is not None
    assert small.calibration.seq_len == 1024
    text = {"data": str(FILE), "samples": "auto", "seq_len": 64}
    few = estimate(from_data({"calibration": text}), config_folder(tmp_path, LLAMA_8B), machine=MACHINE)
    assert few.calibration is not None
    assert 0.5 < few.calibration.tokens / (FILE.stat().st_size / 3.5) <= 1  # 32 per feature would be 458,752 tokens
    out = StringIO()
    render_plan(few, Console(file=out, width=120))
    assert f"{few.calibration.samples} x 64 = {few.calibration.tokens:,} tokens" in out.getvalue()


def test_no_size_is_shown_as_nothing(tmp_path: Path) -> None:
    """A tiny model's sizes are KB and MB; the one formatter never says 0.00 of a larger unit."""
    tiny_model("llama").bfloat16().save_pretrained(tmp_path / "m")
    out = StringIO()
    render_plan(estimate(from_data({"weights": {"group_size": 8}}), tmp_path / "m"), Console(file=out, width=160))
    assert not re.search(r"\b0(\.0+)? (B|KB|MB|GB|TB)\b|GiB", out.getvalue())
    assert " KB of " in out.getvalue()
    sizes = {0: "0 B", 999: "999 B", 999.7: "1 KB", 4537000: "4.54 MB", 999_600_000: "1 GB", 2.5e13: "25 TB"}
    assert {size: size_text(size) for size in sizes} == sizes


def test_json_has_what_python_has(tmp_path: Path) -> None:
    found = estimate(gptq(), config_folder(tmp_path, LLAMA_8B), machine=MACHINE)
    data = json.loads(json.dumps(found.to_json()))
    for name in ("bytes_after", "peak_memory_bytes", "seconds_total", "fits", "memory", "linears", "schemes"):
        assert data[name] == getattr(found, name), name
    assert data["calibration"] == {"samples": 16, "seq_len": 256, "tokens": 4096}
