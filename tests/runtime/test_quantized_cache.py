"""The simulated cache in models of many architectures, its rounding and its scales."""

import copy
import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, LlamaConfig, LlamaModel, StaticCache, cache_utils

from quantkit.cache_spec import CacheSpec
from quantkit.errors import RunError, UserError
from quantkit.grids.activations import (
    KVRange,
    quantize_kv,
)
from quantkit.model.streamed_model import BlockCall
from quantkit.quantization.calibration.kv_scales import (
    LayerSeen,
    ObservingCache,
    attention_path,
    check_seen,
    choose_kv_scales,
)
from quantkit.runtime.quantized_cache import (
    QuantizedCache,
    round_entries,
)
from quantkit.types import KVSpec
from tests import tiny_models

FP8, FP8_HEAD = KVSpec(8, "float"), KVSpec(8, "float", "head")
INT8_STATIC = KVSpec(8, "int", "head")
INT8, INT4 = KVSpec(8, "int", "token"), KVSpec(4, "int", "token", group_size=4)
INT4_ASYM = KVSpec(4, "int", "token", symmetric=False, group_size=8)
FP8_TOKEN = KVSpec(8, "float", "token")
CHANNELS = KVSpec(4, "int", "token", symmetric=False, group_size=8, packed=True, channels=True)
# what this transformers calls the argument
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
CONFIG = LlamaConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, head_dim=16)
OWNERS = {
    "llama": "self_attn",
    "qwen3": "self_attn",
    "gemma3": "self_attn",
    "gpt2": "attn",
    "phi3": "self_attn",
    "gpt_neox": "attention",
    "falcon": "self_attention",
    "falcon_new": "self_attention",
    "opt": "self_attn",
    "olmo2": "self_attn",
    "mixtral": "self_attn",
}


def logits(model: Any, tokens: Tensor, cache: Any = None) -> Tensor:
    with torch.no_grad():
        return model(tokens, **{CACHE: cache}, use_cache=cache is not None).logits


def states(*, loud: tuple[float, ...] = (1.0, 20.0), T: int = 40, seed: int = 0) -> Tensor:
    """[2, H, T, 16], each head as much larger as told."""
    x_BHTD = torch.randn(2, len(loud), T, 16, generator=torch.Generator().manual_seed(seed))
    return x_BHTD * torch.tensor(loud)[:, None, None]


def seen_of(keys_BHTD: Tensor, values_BHTD: Tensor) -> LayerSeen:
    seen: dict[int, LayerSeen] = {}
    ObservingCache(seen).update(keys_BHTD, values_BHTD, 0)
    return seen[0]


@pytest.mark.parametrize("name", list(OWNERS))
def test_identity_and_observation_leave_the_model_alone(name: str) -> None:
    """A whole forward without a cache, the same through ours, and generate with ours and with transformers' own."""
    model = tiny_models.tiny_model(name)
    tokens = tiny_models.random_tokens(model, 2, 20)
    plain = logits(model, tokens)
    seen: dict[int, LayerSeen] = {}
    for config in (None, model.config):
        assert torch.equal(logits(model, tokens, ObservingCache(seen, config)), plain)
    check_seen(seen, range(2), name)
    assert all(histogram.total > 0 for layer in seen.values() for part in layer for histogram in part)

    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = model.generate(tokens[:, :8], **options)
    for config in (None, model.config):
        found = model.generate(tokens[:, :8], **{CACHE: ObservingCache({}, config)}, **options)
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", list(OWNERS))
def test_owner_of_the_cache(name: str) -> None:
    model = tiny_models.tiny_model(name)
    block, args, kwargs = tiny_models.block_inputs(model, 1, use_cache=True)
    call = BlockCall(args[1:], kwargs) if args else BlockCall((), kwargs)
    place = call.cache_place()
    assert place is not None
    assert call.with_cache(place, DynamicCache()).cache_place() == place
    hidden = args[0] if args else kwargs.pop("hidden_states")
    assert attention_path(block, lambda cache: call.with_cache(place, cache).run(block, hidden)) == OWNERS[name]
    hooked = [m for m in block.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooked


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon_new", "gemma3"])
def test_rounded_model_equals_rounding_by_hand(name: str) -> None:
    """Token by token, by generate and in one forward the same entries are rounded, each once."""
    model = tiny_models.tiny_model(name)
    tokens = tiny_models.random_tokens(model, 2, 12)
    seen: dict[int, LayerSeen] = {}
    plain = logits(model, tokens, ObservingCache(seen))
    ranges = {layer: choose_kv_scales(part, FP8_HEAD) for layer, part in seen.items()}
    for spec in (FP8_HEAD, INT4):
        whole = QuantizedCache(spec, ranges)
        rounded = logits(model, tokens, whole)
        stepwise = QuantizedCache(spec, ranges)
        parts = [logits(model, tokens[:, t : t + 1], stepwise) for t in range(12)]
        torch.testing.assert_close(torch.cat(parts, 1), rounded, rtol=1e-3, atol=1e-3)
        error = (rounded - plain).norm() / plain.norm()
        assert 1e-3 < error < (0.1 if spec is FP8_HEAD else 0.5)
        for layer, scales in ranges.items():
            for stored, scale in zip((whole.layers[layer].keys, whole.layers[layer].values), scales, strict=True):
                again = quantize_kv(stored, spec, scale if spec is FP8_HEAD else None)
                torch.testing.assert_close(again, stored, rtol=1e-5, atol=1e-7)  # on its grid already


def test_fp8_by_hand() -> None:
    x = torch.tensor([17.0, -1000.0, 0.3, 500.0]).reshape(1, 1, 1, 4)
    assert quantize_kv(x, FP8, torch.tensor(1.0)).flatten().tolist() == pytest.approx([16, -448, 0.3125, 448])
    assert quantize_kv(x, FP8, torch.tensor(2.0)).flatten().tolist() == pytest.approx([16, -896, 0.3125, 512])
    x_BHTD = states()
    scale_H = torch.tensor([0.01, 0.2])
    rounded = quantize_kv(x_BHTD, FP8_HEAD, scale_H)
    for h in range(2):
        steps = (x_BHTD[:, h] / scale_H[h]).clamp(-448, 448).to(torch.float8_e4m3fn).float()
        assert torch.equal(rounded[:, h], steps * scale_H[h])
    bf16 = quantize_kv(x_BHTD.bfloat16(), FP8_HEAD, scale_H)
    assert bf16.dtype == torch.bfloat16
    with pytest.raises(UserError, match=r"2 scales.* for 3 heads"):
        quantize_kv(states(loud=(1.0, 1.0, 1.0)), FP8_HEAD, scale_H)


@pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="older transformers have no fp8 cache")
def test_fp8_equals_transformers_own_cache() -> None:
    """Its fp8 layer takes the scale from the first states it sees; later ones are rounded with that scale."""
    first, later = states(T=8), states(T=8, seed=1) * 0.7
    theirs = cache_utils.Fp8QuantizedLayer()
    theirs.update(first, first)
    keys, _ = theirs.update(later, later)
    scale = choose_kv_scales(seen_of(first, first), FP8).k_scale
    assert torch.equal(keys, quantize_kv(torch.cat([first, later], 2), FP8, scale))


@pytest.mark.parametrize("spec", [INT8, INT4, INT4_ASYM, KVSpec(8, "int", "token", group_size=5)], ids=str)
def test_each_token_has_its_own_scales(spec: KVSpec) -> None:
    """Every group against float64 arithmetic; a token's rounding does not depend on any other."""
    x_BHTD = states()
    rounded = quantize_kv(x_BHTD, spec)
    assert torch.equal(rounded[:, :, 7:9], quantize_kv(x_BHTD[:, :, 7:9], spec))
    size = 16 if spec.group_size == -1 else spec.group_size
    levels = 2**spec.bits
    for start in range(0, 16, size):
        group = x_BHTD[..., start : start + size].double()
        if spec.symmetric:
            step = group.abs().amax(-1, keepdim=True) / (levels / 2 - 1)
            wanted = (group / step).round() * step
        else:
            low = group.amin(-1, keepdim=True)
            step = (group.amax(-1, keepdim=True) - low) / (levels - 1)
            zero = (-low / step).round()
            wanted = (((group / step).round() + zero).clamp(0, levels - 1) - zero) * step
        got = rounded[..., start : start + size].double()
        assert ((got - wanted).abs() < 1e-4 * step).double().mean() > 0.999  # but for ties
        assert ((got - group).abs() <= (1 + 1e-4) * step).all()


@pytest.mark.parametrize("spec", [FP8, FP8_HEAD, INT8_STATIC], ids=str)
def test_absmax_scales(spec: KVSpec) -> None:
    keys, values = states(), states(seed=1) * 3
    top = 448 if spec.element == "float" else 127
    for scale, x_BHTD in zip(choose_kv_scales(seen_of(keys, values), spec), (keys, values), strict=True):
        amax_H = x_BHTD.abs().amax((0, 2, 3))
        expected = (amax_H if spec.per == "head" else amax_H.amax()) / top
        assert scale.dtype == torch.float32
        assert scale.shape == expected.shape
        torch.testing.assert_close(scale, expected)


def test_batches_add_up() -> None:
    keys, values = states(T=64), states(T=64, seed=1)
    seen: dict[int, LayerSeen] = {}
    for part in range(4):
        ObservingCache(seen).update(keys[:, :, part::4], values[:, :, part::4], 3)
    for method in ("absmax", "percentile", "mse"):
        for spec in (FP8, FP8_HEAD):
            parts, whole = (choose_kv_scales(s, spec, method) for s in (seen[3], seen_of(keys, values)))
            assert all(torch.equal(a, b) for a, b in zip(parts, whole, strict=True))


def test_clipping_helps_where_an_outlier_is_not_worth_it() -> None:
    """One token of a head 40 times too large: mse loses no more over all, percentile much less on the rest."""
    keys = states(loud=(1.0, 1.0), T=4000)
    keys[0, 0, 5, 3] = 40.0
    seen = seen_of(keys, keys)
    errors = {}
    for method in ("absmax", "percentile", "mse"):
        k_scale, _ = choose_kv_scales(seen, INT8_STATIC, method, 99.9)
        rounded = quantize_kv(keys, INT8_STATIC, k_scale)
        errors[method] = (rounded - keys)[:, 0].square().sum().item(), (rounded - keys)[1, 0].square().sum().item()
    assert errors["mse"][0] <= 1.01 * errors["absmax"][0]
    assert errors["percentile"][1] < 0.05 * errors["absmax"][1]


def test_missing_pieces() -> None:
    with pytest.raises(UserError, match="layer 4 has no scales"):
        QuantizedCache(FP8, {0: KVRange(torch.tensor(1.0), torch.tensor(1.0))}).update(states(), states(), 4)
    with pytest.raises(UserError, match=r"tiny: the attention of layers 1, 3 keeps no keys"):
        check_seen({0: None, 2: None}, range(4), "tiny")
    check_seen({0: None, 1: None}, range(2), "tiny")
    with pytest.raises(RunError, match="NaN or Inf"):
        ObservingCache({}).update(states() * math.nan, states(), 0)

    with pytest.raises(UserError, match="Linear: no module keeps"):
        attention_path(nn.Linear(2, 2), lambda cache: None)
    assert BlockCall((1, None), {"use_cache": True}).cache_place() is None


@pytest.mark.parametrize("place", [1, "cache", "layer_past", "any_name"])
def test_the_cache_is_what_is_one(place: int | str) -> None:
    """Whatever the argument is called, and wherever it stands."""
    given, other = DynamicCache(), DynamicCache()
    call = BlockCall((1, given, 2), {"x": 3}) if place == 1 else BlockCall((1,), {"x": 3, place: given})
    assert call.cache_place() == place
    moved = call.with_cache(place, other)
    assert (moved.args[1] if place == 1 else moved.kwargs[place]) is other
    assert (len(moved.args), moved.kwargs["x"]) == (len(call.args), 3)


@pytest.mark.parametrize(
    "make", [DynamicCache, lambda: StaticCache(config=CONFIG, max_cache_len=16)], ids=["dynamic", "static"]
)
def test_any_cache_rounds_once_it_is_told_to(make: Any) -> None:
    """And a copy rounds for itself; asking twice is asking once."""
    keys, values = states(T=8), states(T=8, seed=1)
    ranges = {0: KVRange(torch.tensor(0.1), torch.tensor(0.2))}
    cache: Cache = make()
    round_entries(cache, FP8, ranges)
    round_entries(cache, FP8, {})
    twin = copy.deepcopy(cache)
    found, _ = cache.update(keys, values, 0)
    assert torch.equal(found[:, :, :8], quantize_kv(keys, FP8, ranges[0].k_scale))
    assert twin.get_seq_length() == 0
    assert cache.get_seq_length() == 8


@pytest.mark.parametrize(
    "spec",
    [CacheSpec(INT8, INT4), CacheSpec(INT4, None), CacheSpec(None, FP8_TOKEN), CacheSpec(CHANNELS, INT8)],
    ids=str,
)
def test_keys_and_values_each_their_own(spec: CacheSpec) -> None:
    keys, values = states(T=8), states(T=8, seed=1)
    constants = torch.stack([torch.linspace(-1, 1, 32).view(2, 16), torch.linspace(1, 2, 32).view(2, 16)])
    cache = QuantizedCache(spec, {0: KVRange(constants if spec.calibrated else None, None)})
    found = cache.update(keys, values, 0)
    for x, side, read in zip((keys, values), (spec.keys, spec.values), found, strict=True):
        wanted = x if side is None else quantize_kv(x, side, constants if side.channels else None)
        assert torch.equal(read, wanted)
        assert torch.equal(read, x) == (side is None)


def test_fp8_per_token_in_float64() -> None:
    x_BHTD = states()
    amax = x_BHTD.double().abs().amax(-1, keepdim=True)
    wanted = (x_BHTD.double() / (amax / 448)).float().to(torch.float8_e4m3fn).double() * (amax / 448)
    assert ((quantize_kv(x_BHTD, FP8_TOKEN).double() - wanted).abs() < 1e-5 * amax).double().mean() > 0.999
