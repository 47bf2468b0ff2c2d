"""Every scheme from the recipe to the logits: a folder is quantized, loaded, and held against a dense model whose
weights are those of the file and whose linears' inputs are rounded by hooks.
"""

import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, DynamicCache, LlamaModel

from quantkit.cache_spec import CacheSpec
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import RunError, UserError
from quantkit.formats import FORMATS
from quantkit.formats.compressed_tensors import tensors as ct
from quantkit.formats.quantized_folder import QuantizedFolder
from quantkit.grids.activations import fake_quantize
from quantkit.grids.dequantize import dequantize
from quantkit.inspection.folder import inspect_checkpoint
from quantkit.quantization import pipeline
from quantkit.quantization.calibration.kv_channels import ChannelCache
from quantkit.recipe import load as recipe
from quantkit.runtime.load import cache_ranges, load
from quantkit.runtime.quant_linear import QuantLinear
from quantkit.runtime.quantized_cache import QuantizedCache
from quantkit.types import PRESETS, ActivationRange, KVSpec, QuantizedWeight
from tests.killed_run import killed_at
from tests.tiny_models import random_tokens, tiny_model

INT8, INT4 = KVSpec(8, "int", "token"), KVSpec(4, "int", "token")
INT4_BEST = KVSpec(4, "int", "token", symmetric=False, group_size=16, packed=True, channels=True)
FUSED = [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]
STATIC_INT8 = {"type": "int8", "dynamic": False}
CALIBRATION = {"data": "given as token ids"}
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes that groups of 128 divide; norms of random weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=64,
        initializer_range=0.09,
    )
    model = transformers.LlamaForCausalLM(config)
    for name, param in model.named_parameters():
        if "norm" in name:
            param.data += 0.3 * torch.randn_like(param)
        if "k_proj" in name or "up_proj" in name:  # larger than those fused with them
            param.data *= 4
        if "q_proj" in name:
            param.data /= 4
    folder = tmp_path_factory.mktemp("models") / "llama"
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 96, (6, 32), generator=torch.Generator().manual_seed(1))


def quantize(model: Path, folder: Path, ids: Tensor | None, **data: Any) -> dict[str, Any]:
    data = {"model": str(model)} | data
    if ids is not None:
        data["calibration"] = CALIBRATION
    return pipeline.quantize(recipe.from_data(data), folder, calibration=ids, progress=False)


def quantized(folder: Path) -> dict[str, tuple[QuantizedWeight, Any]]:
    """What lies in a folder by module, and its scheme."""
    checkpoint = Checkpoint.open(folder)
    settings = checkpoint.config["quantization_config"]
    modules = [name.removesuffix(".weight_scale") for name in checkpoint.tensors if name.endswith(".weight_scale")]
    found = {}
    for name, scheme in ct.read_config(settings, modules).items():
        tensors = {t.removeprefix(f"{name}."): checkpoint.read(t) for t in checkpoint.tensors if t.startswith(name)}
        found[name] = ct.unpack(tensors, scheme), scheme
    return found


def reference(folder: Path, source: Path) -> nn.Module:
    """The source model in float32 with the file's weights, norms included, and rounded inputs."""
    checkpoint = Checkpoint.open(folder)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    for name, param in model.named_parameters():
        if name in checkpoint.tensors and checkpoint.tensors[name].dtype == torch.bfloat16:
            param.data.copy_(checkpoint.read(name))

    def rounding(scheme: Any, input_range: ActivationRange | None) -> Callable[..., tuple[Tensor]]:
        return lambda _, args: (fake_quantize(args[0], scheme.activations, input_range),)

    for name, (q, scheme) in quantized(folder).items():
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        if integers(scheme):  # sums of codes, each scaled once: no weight is rounded to the scale's dtype
            q = replace(q, scale_NG=q.scale_NG.double())
            exact_NK = dequantize(q)
            module.forward = lambda x, w_NK=exact_NK: (x.double() @ w_NK.T).float()  # type: ignore[method-assign]
        module.weight.data.copy_(dequantize(q))
        if scheme.activations is not None:
            module.register_forward_pre_hook(rounding(scheme, stored_range(checkpoint, name, scheme)))
    return model


def stored_range(checkpoint: Checkpoint, name: str, scheme: Any) -> ActivationRange | None:
    """The static range of a linear's inputs as its tensors say it."""
    if not scheme.activations.calibrated:
        return None
    if scheme.activations.scale_format == "e4m3":
        return ActivationRange(1 / checkpoint.read(f"{name}.input_global_scale")[0])
    zero = None if scheme.activations.symmetric else int(checkpoint.read(f"{name}.input_zero_point")) + 128
    return ActivationRange(checkpoint.read(f"{name}.input_scale")[0], zero)


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor, **options: Any) -> Tensor:
    return model(ids, **options).logits


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def integers(scheme: Any) -> bool:
    """Whether engines, and our kernels, multiply integers by integers."""
    inputs = scheme.activations
    return inputs is not None and (inputs.element, scheme.weights.element) == ("int", "int") and inputs.symmetric


def layer_error(ours: nn.Module, theirs: nn.Module, tokens: Tensor) -> float:
    """The largest error of a quantized linear against its counterpart on the very same inputs, at 1 token and at all.

    Not that of logits: an input that rounds the other way moves all later tokens.
    """
    seen: dict[str, Tensor] = {}
    for name, module in ours.named_modules():
        if isinstance(module, QuantLinear):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0]))
    logits(ours, tokens)
    errors = [
        relative(ours.get_submodule(name)(part), theirs.get_submodule(name)(part))
        for name, x in seen.items()
        for part in (x, x[:1, :1])
    ]
    assert len(errors) == 28
    return max(errors)


CASES: dict[str, dict[str, Any]] = {name: {"scheme": name} for name in PRESETS} | {
    "W8A8 static": {"scheme": "W8A8", "activations": STATIC_INT8},
    "W8A8 static asym": {"scheme": "W8A8", "activations": STATIC_INT8 | {"symmetric": False}},
    "W8A8 asym": {"scheme": "W8A8", "activations": {"symmetric": False}},
    "W8A8 tensor": {"scheme": "W8A8", "weights": {"group_size": "tensor"}},
    "FP8A16 block": {"weights": {"type": "fp8", "group_size": "block"}},
    "FP8A16 tensor": {"weights": {"type": "fp8", "group_size": "tensor"}},
    "FP8 channel static": {"weights": {"type": "fp8"}, "activations": {"type": "fp8", "dynamic": False}},
    "MXFP4A16": {"weights": {"type": "mxfp4"}},
    "MXFP8A16": {"weights": {"type": "mxfp8"}},
}


@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
@pytest.mark.parametrize("case", CASES)
def test_every_scheme_end_to_end(llama: Path, ids: Tensor, tmp_path: Path, case: str, algorithm: str) -> None:
    data = CASES[case]
    report = quantize(
        llama, tmp_path / "out", ids, **data | {"weights": data.get("weights", {}) | {"algorithm": algorithm}}
    )
    assert len(report.linears) == 14
    if data.keys() == {"scheme"}:
        found = quantized(tmp_path / "out")
        assert {scheme for _, scheme in found.values()} == {PRESETS[case]}
    tokens = random_tokens(AutoModelForCausalLM.from_pretrained(llama), 3, 20, seed=5)
    model, dense = load(tmp_path / "out", dtype=torch.float32), reference(tmp_path / "out", llama)
    ours = logits(model, tokens)
    assert relative(ours, logits(dense, tokens)) < 0.05
    assert layer_error(model, dense, tokens) < 1e-5
    exact = logits(AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32), tokens)
    four = "4" in case or case == "W8A8 tensor"
    assert 1e-4 < relative(ours, exact) < (0.8 if four else 0.3)
    for record in report.linears:
        assert 0 < record.error < (0.02 if four else 0.001), record
        if algorithm == "gptq":
            assert record.gptq is not None
            assert record.error <= record.gptq.rounding * 1.02, record


@pytest.mark.parametrize("scheme", ["FP8", "NVFP4", "W8A8 static"])
@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
def test_what_engines_fuse_is_common(llama: Path, ids: Tensor, tmp_path: Path, scheme: str, algorithm: str) -> None:
    quantize(llama, tmp_path / "out", ids, **CASES[scheme] | {"weights": {"algorithm": algorithm}})
    checkpoint = Checkpoint.open(tmp_path / "out")
    suffixes = {
        "FP8": ("input_scale", "weight_scale"),
        "NVFP4": ("input_global_scale", "weight_global_scale"),
        "W8A8 static": ("input_scale",),
    }[scheme]
    for suffix in suffixes:
        by_name = {name: checkpoint.read(name) for name in checkpoint.tensors if name.endswith(f".{suffix}")}
        assert len(by_name) == 14
        assert all(value.shape == (1,) and value.dtype == torch.float32 for value in by_name.values())
        for layer in ("0.", "1."):
            for members in FUSED:
                values = {
                    v.item() for n, v in by_name.items() if f"layers.{layer}" in n and n.split(".")[-2] in members
                }
                assert len(values) == 1, (suffix, members)
        assert len({value.item() for value in by_name.values()}) >= (8 if scheme != "NVFP4" else 2)
    source = Checkpoint.open(llama)
    for name, (q, _) in quantized(tmp_path / "out").items():  # and wide enough for the largest of those that share it
        w_NK = source.read(f"{name}.weight").float()
        assert relative(dequantize(q), w_NK) < (0.3 if algorithm == "gptq" else 0.12), name


@pytest.mark.parametrize("observer", ["minmax", "percentile", "entropy", "mse"])
def test_static_ranges_are_those_of_the_inputs(llama: Path, ids: Tensor, tmp_path: Path, observer: str) -> None:
    """With `propagate: original`, they come from the original model's own inputs."""
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    top: dict[str, float] = {}

    def watch(name: str) -> Callable[..., None]:
        return lambda _, args: top.__setitem__(name, args[0].abs().max().item())

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(watch(name))
    logits(model, ids)
    activations = {"type": "fp8", "dynamic": False, "observer": observer}
    quantize(llama, tmp_path / "out", ids, scheme="FP8", activations=activations, propagate="original")
    for name, (q, _) in quantized(tmp_path / "out").items():
        assert q.input is not None
        found = q.input.scale.item() * 448
        if observer == "minmax":
            assert found == pytest.approx(top[name], rel=1e-5)
        else:
            assert 0.3 * top[name] < found <= top[name] * 1.001


def test_mixed_schemes_in_one_folder(llama: Path, ids: Tensor, tmp_path: Path) -> None:
    overrides = [
        {"match": "re:.*self_attn", "scheme": "FP8_DYNAMIC"},
        {"match": "re:.*layers.1.mlp.down_proj", "scheme": "NVFP4"},
    ]
    quantize(llama, tmp_path / "out", ids, scheme="W4A16", overrides=overrides)
    schemes = {name: scheme for name, (_, scheme) in quantized(tmp_path / "out").items()}
    for name, scheme in schemes.items():
        special = "NVFP4" if name.endswith("1.mlp.down_proj") else "W4A16"
        assert scheme == PRESETS["FP8_DYNAMIC" if "self_attn" in name else special], name
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["format"] == "mixed-precision"
    assert len(settings["config_groups"]) == 3
    model, dense = load(tmp_path / "out", dtype=torch.float32), reference(tmp_path / "out", llama)
    assert layer_error(model, dense, ids) < 1e-5


def test_experts_with_static_inputs(tmp_path: Path) -> None:
    """Experts that no token reaches get the range of their siblings."""
    model = tiny_model("qwen3_moe").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    tokens = random_tokens(model, 1, 1).repeat(1, 8)  # so little that some experts see none
    report = quantize(tmp_path / "model", tmp_path / "out", tokens, scheme="FP8")
    assert any("no calibration token" in warning for warning in report.warnings)
    assert torch.isfinite(logits(load(tmp_path / "out"), tokens)).all()
    tops: dict[str, dict[str, float]] = {"gate_proj": {}, "down_proj": {}}
    for name, (q, _) in quantized(tmp_path / "out").items():
        assert q.input is not None
        if name.startswith("model.layers.1.mlp.experts") and name.endswith(tuple(tops)):
            tops[name.rpartition(".")[2]][name] = q.input.scale.item()
    unreached = [warning.partition(":")[0] for warning in report.warnings if "no calibration token" in warning]
    for kind, by_name in tops.items():
        reached = [scale for name, scale in by_name.items() if name not in unreached]
        for name in unreached:
            assert by_name.get(name, max(reached)) == max(reached), kind


# The cache


@pytest.mark.parametrize("per", ["tensor", "head"])
def test_fp8_cache(llama: Path, ids: Tensor, tmp_path: Path, per: str) -> None:
    kv_cache = "fp8" if per == "tensor" else {"type": "fp8", "per": "head"}
    report = quantize(llama, tmp_path / "out", ids, scheme="W4A16", kv_cache=kv_cache)
    assert report.kv_cache == f"fp8 {per}"
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["kv_cache_scheme"]["strategy"] == {"tensor": "tensor", "head": "attn_head"}[per]
    dense = reference(tmp_path / "out", llama)
    with torch.no_grad():
        made = dense(ids, use_cache=True)
    exact, cache = made.logits, next(value for value in made.values() if isinstance(value, Cache))
    checkpoint = Checkpoint.open(tmp_path / "out")
    for index, layer in enumerate(cache.layers):
        for name, states_BHTD in (("k_scale", layer.keys), ("v_scale", layer.values)):
            stored = checkpoint.read(f"model.layers.{index}.self_attn.{name}")
            assert stored.dtype == torch.float32
            assert stored.shape == ((2, 1, 1) if per == "head" else (1,))
            assert states_BHTD is not None
            top = states_BHTD.abs().amax((0, 2, 3)) if per == "head" else states_BHTD.abs().max()
            torch.testing.assert_close(stored.reshape(top.shape) * 448, top, rtol=1e-5, atol=0)
    moved = relative(logits(load(tmp_path / "out", dtype=torch.float32), ids), exact)
    assert 1e-3 < moved < 0.1


@pytest.mark.parametrize("made", ["none", "no cache", "ours", "static"])
def test_every_forward_and_generate_round_the_cache(llama: Path, ids: Tensor, tmp_path: Path, made: str) -> None:
    """Scales far too small clamp keys and values to almost nothing: nobody can miss whether they were used."""
    quantize(llama, tmp_path / "out", ids, scheme="W4A16", kv_cache="fp8")
    usual = load(tmp_path / "out", dtype=torch.float32)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    save_file({name: t * 1e-4 if name.endswith("_scale") else t for name, t in tensors.items() if t.numel()}, file)
    model = load(tmp_path / "out", dtype=torch.float32)
    prompt = ids[:2, :8]

    kept: dict[str, Any] = {"none": {}, "no cache": {"use_cache": False}}.get(made, {})
    whole = logits(model, prompt, **kept)
    assert relative(whole, logits(usual, prompt)) > 0.3
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if made == "ours":
        options[CACHE] = DynamicCache(config=model.config)
    if made == "static":
        options["cache_implementation"] = "static"
    found = model.generate(prompt, **options, **kept)
    expected = prompt
    for _ in range(6):  # greedy, the whole text at each step
        expected = torch.cat([expected, logits(model, expected)[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, expected)
    assert not torch.equal(found, usual.generate(prompt, **options | ({CACHE: None} if made == "ours" else {}), **kept))


def test_a_block_without_a_cache_is_no_silent_success(llama: Path, ids: Tensor, tmp_path: Path) -> None:
    quantize(llama, tmp_path / "out", ids, scheme="W4A16", kv_cache="int8")
    model = load(tmp_path / "out", dtype=torch.float32)
    block = model.model.layers[0]
    with pytest.raises(RunError, match="called without a cache"):
        block(torch.zeros(1, 2, model.config.hidden_size))


def test_integer_caches(llama: Path, ids: Tensor, tmp_path: Path) -> None:
    moved = {}
    for kind in ("int8", "int4"):
        out = tmp_path / kind
        quantize(llama, out, None, scheme="W4A16", kv_cache=kind)
        assert not [name for name in Checkpoint.open(out).tensors if "k_scale" in name]
        exact = logits(reference(out, llama), ids)
        moved[kind] = relative(logits(load(out, dtype=torch.float32), ids), exact)
    grouped = {"type": "int4", "group_size": 8, "symmetric": False}
    quantize(llama, tmp_path / "grouped", None, scheme="W4A16", kv_cache=grouped)
    moved["grouped"] = relative(logits(load(tmp_path / "grouped", dtype=torch.float32), ids), exact)
    assert 1e-4 < moved["int8"] < 0.05 < moved["int4"] < 0.5
    assert moved["int8"] < moved["grouped"] < moved["int4"]


BEST = {"type": "int4", "symmetric": False, "group_size": 16, "packed": True, "channels": True}


@pytest.mark.parametrize(
    ("cache", "stored", "tensors"),
    [
        ({"keys": "int8", "values": "int4"}, CacheSpec(INT8, INT4), set()),
        ({"keys": "int4", "values": None}, CacheSpec(INT4, None), set()),
        ({"keys": "fp8", "values": "int4"}, CacheSpec(KVSpec(8, "float", "token"), INT4), set()),
        (BEST, CacheSpec(INT4_BEST, INT4_BEST), {"k_channels", "v_channels"}),
        ({"keys": BEST, "values": "int4"}, CacheSpec(INT4_BEST, INT4), {"k_channels"}),
        ({"keys": "fp8", "values": "fp8"}, None, {"k_scale", "v_scale"}),
    ],
    ids=["8/4", "4/-", "fp8/4", "channels", "channels of keys", "fp8/fp8"],
)
def test_keys_and_values_of_their_own(
    llama: Path, ids: Tensor, tmp_path: Path, cache: Any, stored: CacheSpec | None, tensors: set[str]
) -> None:
    """What is written is read as it was meant, and the loaded model computes what rounding by hand does."""
    report = quantize(llama, tmp_path / "out", ids, scheme="W4A16", kv_cache=cache)
    folder = QuantizedFolder.open(tmp_path / "out")
    assert (folder.own_cache, folder.kv) == (stored, None if stored else KVSpec(8, "float"))
    assert report.kv_cache == str(folder.cache) == inspect_checkpoint(tmp_path / "out")["kv_cache"]
    leaves = [name.rpartition(".")[2] for name in folder.checkpoint.tensors if "self_attn" in name]
    assert {leaf: leaves.count(leaf) for leaf in tensors} == dict.fromkeys(tensors, 2)
    assert not {"k_channels", "v_channels", "k_scale", "v_scale"} & set(leaves) - tensors

    assert folder.cache is not None
    ranges = cache_ranges(folder, folder.cache)
    dense = reference(tmp_path / "out", llama)
    with torch.no_grad():
        wanted = dense(ids, **{CACHE: QuantizedCache(folder.cache, ranges)}, use_cache=True).logits
    found = logits(load(tmp_path / "out", dtype=torch.float32), ids)
    assert relative(found, wanted) < 1e-5
    assert relative(found, logits(dense, ids)) > 1e-3


def test_constants_of_channels_are_those_of_the_text(llama: Path, ids: Tensor, tmp_path: Path) -> None:
    """As the quantized weights make keys and values."""
    quantize(llama, tmp_path / "out", ids, scheme="W4A16", kv_cache=BEST)
    seen: dict[int, Any] = {}
    with torch.no_grad():
        reference(tmp_path / "out", llama)(ids, **{CACHE: ChannelCache(seen)}, use_cache=True)
    checkpoint = Checkpoint.open(tmp_path / "out")
    for layer, (keys, values) in seen.items():
        for letter, moments in (("k", keys), ("v", values)):
            stored = checkpoint.read(f"model.layers.{layer}.self_attn.{letter}_channels")
            assert stored.shape == (2, 2, 32)
            if layer == 0:  # later ones see inputs that were rounded to the cache
                torch.testing.assert_close(stored, moments.constants(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("cache", "warned"), [(BEST, True), ({"keys": "int8", "values": BEST}, False)])
def test_constants_of_keys_are_for_the_positions_of_the_text(
    llama: Path, ids: Tensor, tmp_path: Path, cache: Any, warned: bool
) -> None:
    report = quantize(llama, tmp_path / "out", ids, scheme="W4A16", kv_cache=cache)
    said = [line for line in report.warnings if "constants of key channels" in line]
    assert len(said) == warned
    assert all(f"positions up to {ids.shape[1]}, the model has 64" in line for line in said)


def test_channels_are_for_no_engine(llama: Path, ids: Tensor, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vllm would not load(?s:.*)k_channels.*without channels in kv_cache"):
        quantize(llama, tmp_path / "out", ids, scheme="W4A16", kv_cache=BEST, output={"engine": "vllm"})
    assert list(tmp_path.iterdir()) == []
    report = quantize(llama, tmp_path / "out", None, scheme="W4A16", kv_cache={"keys": "int8", "values": "int4"},
                      output={"engine": "vllm"})  # fmt: skip
    assert any("does not read a keys int8 token, values int4 token cache" in line for line in report.warnings)


# The same bytes


RUNS: dict[str, dict[str, Any]] = {
    "static fp8 with a cache": {"scheme": "FP8", "kv_cache": "fp8"},
    "nvfp4 by gptq": {"scheme": "NVFP4", "weights": {"algorithm": "gptq"}},
    "smoothquant": {"scheme": "W8A8", "activations": STATIC_INT8, "transforms": ["smoothquant"]},
    "rotation": {"scheme": "W4A8", "transforms": ["rotation"], "weights": {"algorithm": "gptq"}},
    "rotation, awq and a cache": {"scheme": "W4A16", "transforms": ["rotation", "awq"], "kv_cache": "fp8"},
    "channels": {"scheme": "W4A16", "kv_cache": {"keys": BEST, "values": "int8"}},
}


def digest(folder: Path) -> dict[str, str]:
    files = (path for path in folder.iterdir() if path.name != "quantkit-report.json")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("case", RUNS)
def test_again_and_after_a_kill_the_same_bytes(llama: Path, ids: Tensor, tmp_path: Path, case: str) -> None:
    for name in ("one", "two"):
        quantize(llama, tmp_path / name, ids, **RUNS[case])
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    with killed_at(1):
        quantize(llama, tmp_path / "out", ids, **RUNS[case])
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").exists()
    quantize(llama, tmp_path / "out", ids, **RUNS[case])
    assert digest(tmp_path / "out") == digest(tmp_path / "one")


# Refusals: one message, nothing written


REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "awq, W8A8": ({"scheme": "W8A8", "output": {"format": "awq"}}, ("output.format awq", "compressed-tensors")),
    "awq, FP8": ({"scheme": "FP8_DYNAMIC", "output": {"format": "awq"}}, ("output.format awq", "compressed-tensors")),
    "gptq, NVFP4": (
        {"scheme": "NVFP4", "output": {"format": "gptq"}},
        ("format gptq", "compressed-tensors", "modelopt"),
    ),
    "gptq, W4A8": ({"scheme": "W4A8", "output": {"format": "gptq"}}, ("output.format gptq", "compressed-tensors")),
    "fp8, int4": (
        {"scheme": "W4A16", "output": {"format": "fp8"}},
        ("output.format fp8", "compressed-tensors", "gptq"),
    ),
    "fp8, FP8": ({"scheme": "FP8", "output": {"format": "fp8"}}, ("output.format fp8", "fp8_tensor")),
    "fp8_tensor, blocks": ({"scheme": "FP8_BLOCK", "output": {"format": "fp8_tensor"}}, ("fp8_tensor", " fp8 ")),
    "modelopt, MXFP4": ({"scheme": "MXFP4", "output": {"format": "modelopt"}}, ("modelopt", "compressed-tensors")),
    "int8 asym with int8": (
        {"scheme": "W8A8", "weights": {"symmetric": False}},
        ("int8", "zero point", "no format can hold it"),
    ),
    "int4 with fp8 static": (
        {"weights": {"bits": 4, "group_size": 128}, "activations": {"type": "fp8", "dynamic": False}},
        ("no format can hold it",),
    ),
    "nvfp4 with int8": ({"scheme": "NVFP4A16", "activations": {"type": "int8"}}, ("inputs",)),
    "mixed in awq": (
        {
            "scheme": "W4A16_ASYM",
            "overrides": [{"match": "re:.*down_proj", "weights": {"group_size": 64}}],
            "output": {"format": "awq"},
        },
        ("awq", "one scheme"),
    ),
    "mixed in fp8": (
        {
            "scheme": "FP8_BLOCK",
            "overrides": [{"match": "re:.*down_proj", "activations": None}],
            "output": {"format": "fp8"},
        },
        ("fp8",),
    ),
    "a cache of heads in modelopt": (
        {"scheme": "FP8", "kv_cache": {"type": "fp8", "per": "head"}, "output": {"format": "modelopt"}},
        ("modelopt", "compressed-tensors"),
    ),
    "a cache in awq": ({"scheme": "W4A16_ASYM", "kv_cache": "fp8", "output": {"format": "awq"}}, ("cache", "modelopt")),
    "updated ranges, act_order": (
        {"scheme": "MXFP4", "weights": {"algorithm": {"gptq": {"ranges": "updated"}}}},
        ("act_order: false",),
    ),
    "updated ranges, blocks": (
        {"scheme": "FP8_BLOCK", "weights": {"algorithm": {"gptq": {"ranges": "updated", "act_order": False}}}},
        ("scale for each row", "128x128"),
    ),
    "a cache in gptq": ({"scheme": "W4A16", "kv_cache": "fp8", "output": {"format": "gptq"}}, ("cache", "modelopt")),
    "rotation after smoothquant": (
        {"scheme": "W4A16", "transforms": ["smoothquant", "rotation"]},
        ("rotation", "first"),
    ),
    "fp8 of 4 bits": ({"weights": {"type": "fp8", "bits": 4}}, ("fp8", "bits 8")),
    "nvfp4 in groups of 32": ({"weights": {"type": "nvfp4", "group_size": 32}}, ("nvfp4", "16")),
    "static cache of integers": ({"scheme": "W4A16", "kv_cache": {"type": "int8", "per": "head"}}, ("per token",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(llama: Path, ids: Tensor, tmp_path: Path, case: str) -> None:
    data, words = REFUSED[case]
    with pytest.raises(UserError) as failure:
        quantize(llama, tmp_path / "out", ids, **data)
    message = str(failure.value)
    for word in words:
        assert word in message, message
    assert len(message.splitlines()) == 1, message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "data",
    [
        {"scheme": "FP8"},
        {"scheme": "NVFP4"},
        {"scheme": "W8A8", "activations": {"dynamic": False}},
        {"scheme": "W4A16", "overrides": [{"match": "re:.*down_proj", "scheme": "FP8"}]},
        {"scheme": "W4A16", "kv_cache": "fp8"},
        {"scheme": "W8A8", "transforms": ["smoothquant"]},
        {"weights": {"type": "nvfp4", "algorithm": "gptq"}},
    ],
    ids=str,
)
def test_needs_calibration(llama: Path, tmp_path: Path, data: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"needs? calibration text: add a section") as failure:
        quantize(llama, tmp_path / "out", None, **data, calibration=None)
    assert len(str(failure.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4", "MXFP8"])
def test_needs_no_calibration(llama: Path, ids: Tensor, tmp_path: Path, scheme: str) -> None:
    quantize(llama, tmp_path / "out", None, scheme=scheme)
    model, dense = load(tmp_path / "out", torch.float32), reference(tmp_path / "out", llama)
    assert layer_error(model, dense, ids) < 1e-5


@pytest.mark.parametrize("on_misfit", ["error", "channel", "smaller-group", "skip"])
def test_groups_of_small_floats_are_what_they_are(tmp_path: Path, on_misfit: str) -> None:
    """48 columns make no groups of 32, and there are no others."""
    config = transformers.LlamaConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=96,
        head_dim=8,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    for scheme in ("MXFP4", "MXFP8"):
        data = {"scheme": scheme, "weights": {"on_misfit": on_misfit}}
        if on_misfit == "skip":
            report = quantize(tmp_path / "model", tmp_path / scheme, None, **data)
            names = {line.name.rpartition(".")[2] for line in report.linears}
            assert names == {"o_proj", "down_proj"}
        else:
            with pytest.raises(UserError, match=r"always have 32 columns.*48.*on_misfit: skip"):
                quantize(tmp_path / "model", tmp_path / scheme, None, **data)
            assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_rotation_refuses_what_it_cannot_turn(tmp_path: Path, ids: Tensor) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="rotation"):
        quantize(tmp_path / "model", tmp_path / "out", ids, weights={"group_size": 16}, transforms=["rotation"])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_cache_of_a_model_without_one(tmp_path: Path) -> None:
    """A state-space model has a state instead of keys and values."""
    config = transformers.MambaConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=8, intermediate_size=64
    )
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokens = torch.randint(3, 96, (2, 16))
    with pytest.raises(UserError, match=r"kv_cache"):
        quantize(tmp_path / "model", tmp_path / "out", tokens, weights={"group_size": "channel"}, kv_cache="fp8")
    with pytest.raises(UserError, match=r"kv_cache"):
        quantize(tmp_path / "model", tmp_path / "out", None, weights={"group_size": "channel"}, kv_cache="int8")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("scheme", ["FP8", "NVFP4", "MXFP4"])
def test_weights_that_are_not_finite(llama: Path, ids: Tensor, tmp_path: Path, scheme: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    model.save_pretrained(tmp_path / "model")
    with pytest.raises((UserError, RunError), match=r"layers\.1\.mlp\.up_proj.*NaN"):
        quantize(tmp_path / "model", tmp_path / "out", ids, scheme=scheme)
    assert not (tmp_path / "out").exists()


def test_inputs_that_overflow(llama: Path, ids: Tensor, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.model.layers[0].self_attn.v_proj.weight.data[:] = 3e38
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(RunError, match=r"layers\.0\.self_attn.*(NaN|Inf|not finite|overflow)"):
        quantize(tmp_path / "model", tmp_path / "out", ids, scheme="FP8")
    assert not (tmp_path / "out").exists()


def test_every_format_reads_what_it_wrote(llama: Path, ids: Tensor, tmp_path: Path) -> None:
    """The other formats give the logits of compressed-tensors wherever both hold the scheme with the same scales."""
    for scheme, format_ in (("W4A16_ASYM", "awq"), ("FP8_BLOCK", "fp8"), ("FP8", "fp8_tensor"), ("NVFP4", "modelopt")):
        for name in (format_, "compressed-tensors"):
            quantize(llama, tmp_path / f"{scheme}-{name}", ids, scheme=scheme, output={"format": name})
        ours, expected = (
            logits(load(tmp_path / f"{scheme}-{name}", dtype=torch.float32), ids)
            for name in (format_, "compressed-tensors")
        )
        assert relative(ours, expected) < (0.3 if format_ == "awq" else 1e-6), scheme  # awq has its scales in float16
    assert {"gptq", "gptq_v2"} < FORMATS.keys()


def test_inputs_of_fused_experts_are_rounded_too(tmp_path: Path) -> None:
    """transformers runs experts from one parameter: rounding by hand at each expert gives the same logits."""
    folder = tmp_path / "model"
    tiny_model("qwen3_moe").to(torch.bfloat16).save_pretrained(folder)
    ids = torch.arange(24).reshape(1, -1) % 40
    settings = {"model": str(folder), "scheme": "FP8_DYNAMIC", "weights": {"algorithm": {"rtn": {"range": "minmax"}}}}
    pipeline.quantize(recipe.from_data(settings), tmp_path / "q", progress=False)
    model = load(tmp_path / "q", torch.float32)
    plain = load(tmp_path / "q", torch.float32)
    seen = 0
    for module in plain.modules():
        if "forward" in vars(module) and any(param.dim() == 3 for param in module.parameters(recurse=False)):
            del module.forward  # without the rounding of its inputs

    class Rounded(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            nonlocal seen
            if func is torch.nn.functional.linear and args[1].data_ptr() in experts:
                seen += 1
                args = (fake_quantize(args[0], PRESETS["FP8_DYNAMIC"].activations), *args[1:])
            return func(*args, **(kwargs or {}))

    experts = {
        matrix.data_ptr() for name, param in plain.named_parameters() if param.dim() == 3 for matrix in param.unbind()
    }
    with torch.no_grad():
        without = plain(ids).logits
        with Rounded():
            wanted = plain(ids).logits
        got = model(ids).logits
    assert seen
    assert torch.equal(got, wanted)
    assert not torch.equal(got, without)


def test_weights_of_fused_experts_are_rounded_by_definition(tmp_path: Path) -> None:
    """In float32: those of W4A8 are code * scale, those of W4A16 that in their scales' bfloat16."""
    folder = tmp_path / "model"
    tiny_model("qwen3_moe").to(torch.bfloat16).save_pretrained(folder)
    for name in ("W4A16", "W4A8"):
        rtn = {"algorithm": {"rtn": {"range": "minmax"}}, "group_size": 8}
        settings = {"model": str(folder), "scheme": name, "weights": rtn}
        pipeline.quantize(recipe.from_data(settings), tmp_path / name, progress=False)
        found = {
            module: (q, scheme) for module, (q, scheme) in quantized(tmp_path / name).items() if ".experts." in module
        }
        assert found
        model = load(tmp_path / name, torch.float32)
        for module, (q, scheme) in found.items():
            assert q.scale_NG.dtype == torch.bfloat16
            wide = dequantize(replace(q, scale_NG=q.scale_NG.float()))
            wanted = wide if scheme.activations is not None else wide.bfloat16().float()
            path, _, tail = module.partition(".experts.")
            index, projection = tail.split(".")
            experts = model.get_submodule(f"{path}.experts")
            if projection == "down_proj":
                got = experts.down_proj[int(index)]
            else:
                got = experts.gate_up_proj[int(index)].chunk(2)[projection == "up_proj"]
            assert torch.equal(got, wanted), module
