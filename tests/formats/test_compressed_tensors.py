"""The format: worked examples bit by bit, pack and unpack as inverses, and the configuration both ways."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.errors import UserError
from quantkit.formats import FORMATS
from quantkit.formats.bitstream import pack_words, unpack_words
from quantkit.formats.compressed_tensors import tensors as ct
from quantkit.types import QuantizedWeight, Scheme, TensorSpec


def words(*values: int) -> Tensor:
    return torch.tensor([v - (1 << 32) if v >> 31 else v for v in values], dtype=torch.int32)


def naive_pack(codes_RK: Tensor, bits: int) -> Tensor:
    """By the definition: one Python integer per row."""
    rows = []
    for row in codes_RK.tolist():
        stream = sum(code << (i * bits) for i, code in enumerate(row))
        rows.append(words(*((stream >> at) & 0xFFFFFFFF for at in range(0, len(row) * bits, 32))))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("bits", "signed", "expected"),
    [
        (4, [-8, -7, -6, -5, -4, 0, 3, 7], [0xFB843210]),
        (4, [-8, -7, -6, -5, -4, 0, 3, 7], [-75222512 & 0xFFFFFFFF]),
        (8, [-128, -1, 0, 127], [0xFF807F00]),
        (3, list(range(-4, 4)) * 4, [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
        (4, [7], [0x0000000F]),
    ],
)
def test_worked_examples(bits: int, signed: list[int], expected: list[int]) -> None:
    codes = (torch.tensor([signed]) + (1 << (bits - 1))).to(torch.uint8)
    assert torch.equal(pack_words(codes, bits), words(*expected)[None])
    assert torch.equal(unpack_words(words(*expected)[None], bits, len(signed)), codes)


def test_worked_zero_point() -> None:
    zero_NG = torch.arange(8, dtype=torch.uint8)[:, None]  # signed -8 .. -1
    q = QuantizedWeight(torch.zeros(8, 4, dtype=torch.uint8), torch.ones(8, 1), zero_NG, TensorSpec(4, -1, False))
    assert torch.equal(ct.pack(q)["weight_zero_point"], words(0x76543210)[:, None])


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("K", [1, 7, 8, 31, 32, 33, 96, 200], ids="K{}".format)
def test_bit_stream_is_the_naive_one(bits: int, K: int) -> None:
    codes_RK = torch.randint(0, 1 << bits, (3, K), dtype=torch.uint8, generator=torch.Generator().manual_seed(K))
    packed_RW = pack_words(codes_RK, bits)
    assert torch.equal(packed_RW, naive_pack(codes_RK, bits))
    assert torch.equal(unpack_words(packed_RW, bits, K), codes_RK)


def test_chunks_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.formats.bitstream.CHUNK", 64)
    for bits in range(2, 9):
        codes_RK = torch.randint(0, 1 << bits, (5, 72), dtype=torch.uint8)
        assert torch.equal(pack_words(codes_RK, bits), naive_pack(codes_RK, bits))
        assert torch.equal(unpack_words(naive_pack(codes_RK, bits), bits, 72), codes_RK)


def random_weight(N: int, K: int, spec: TensorSpec, scale_dtype: torch.dtype, seed: int = 0) -> QuantizedWeight:
    draw = torch.Generator().manual_seed(seed)
    G = spec.groups(K)
    codes_NK = torch.randint(0, spec.levels, (N, K), dtype=torch.uint8, generator=draw)
    scale_NG = torch.randn(N, G, generator=draw).to(scale_dtype)
    zero_NG = None if spec.symmetric else torch.randint(0, spec.levels, (N, G), dtype=torch.uint8, generator=draw)
    return QuantizedWeight(codes_NK, scale_NG, zero_NG, spec)


@settings(max_examples=150, deadline=None)
@given(
    N=st.integers(1, 40),
    group=st.integers(1, 37),
    groups=st.integers(1, 5),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    channel=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 99),
)
def test_unpack_of_pack(N, group, groups, bits, symmetric, channel, dtype, seed) -> None:
    spec = TensorSpec(bits, -1 if channel else group, symmetric)
    q = random_weight(N, group * groups, spec, dtype, seed)
    tensors = ct.pack(q)
    announced = ct.layout((N, group * groups), Scheme(spec), dtype)
    assert {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()} == announced
    assert all(t.is_contiguous() for t in tensors.values())
    back = ct.unpack(tensors, Scheme(spec))
    assert back.spec == spec
    assert torch.equal(back.codes_NK, q.codes_NK)
    assert torch.equal(back.scale_NG, q.scale_NG)
    assert symmetric or torch.equal(back.zero_NG, q.zero_NG)


def test_packing_leaves_the_weight_alone() -> None:
    q = random_weight(8, 64, TensorSpec(8, 32, True), torch.float32)
    before = q.codes_NK.clone()
    ct.pack(q)["weight_packed"].zero_()
    assert torch.equal(q.codes_NK, before)


def test_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(UserError, match="does not divide"):
        ct.layout((4, 100), Scheme(TensorSpec(4, 64, True)), torch.float32)
    with pytest.raises(UserError, match="float64"):
        ct.layout((4, 64), Scheme(TensorSpec(4, 64, True)), torch.float64)
    with pytest.raises(UserError, match="float64"):
        ct.pack(random_weight(4, 64, TensorSpec(4, 64, True), torch.float64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_scale": torch.ones(8, 3)}, "weight_scale"),
        ({"weight_packed": torch.zeros(8, 9, dtype=torch.int32)}, "weight_packed"),
        ({"weight_packed": torch.zeros(8, 8)}, "weight_packed"),
        ({"weight_zero_point": torch.zeros(8, 2, dtype=torch.int32)}, "weight_zero_point"),
        ({"weight_zero_point": None}, "needs the tensors"),
        ({"weight_shape": torch.tensor([8, 65])}, "does not divide"),
        ({"weight_shape": torch.tensor([8, -64])}, "weight_shape"),
        ({"weight_shape": torch.tensor([8])}, "weight_shape"),
        ({"weight_scale": torch.ones(8, 2, dtype=torch.int32)}, "scales are"),
    ],
)
def test_corrupt_tensors(change: dict, message: str) -> None:
    spec = TensorSpec(4, 32, False)
    tensors = ct.pack(random_weight(8, 64, spec, torch.float32)) | change
    with pytest.raises(UserError, match=message):
        ct.unpack({k: t for k, t in tensors.items() if t is not None}, Scheme(spec))


NAMES = [f"model.layers.{i}.{leaf}" for i in range(12) for leaf in ("self_attn.q_proj", "mlp.down_proj")]
W4, W8 = Scheme(TensorSpec(4, 128, True)), Scheme(TensorSpec(8, -1, False))


def test_config_of_one_spec() -> None:
    config = FORMATS["compressed-tensors"].config(dict.fromkeys(NAMES, W4), ["lm_head"])
    assert config == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "version": "0.17.0",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 128,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }
    assert ct.read_config(config, [*NAMES, "lm_head"]) == dict.fromkeys(NAMES, W4)


def test_channel_has_no_group_size() -> None:
    weights = ct.config({"a": W8}, [])["config_groups"]["group_0"]["weights"]
    assert weights == {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "channel", "dynamic": False}


def targets(config: dict) -> list[list[str]]:
    return [group["targets"] for group in config["config_groups"].values()]


def test_config_collapses_layers_that_agree() -> None:
    specs = {name: W8 if "down" in name else W4 for name in NAMES}
    config = ct.config(specs, ["lm_head"])
    assert targets(config) == [
        [r"re:model\.layers\.\d+\.self_attn\.q_proj$"],
        [r"re:model\.layers\.\d+\.mlp\.down_proj$"],
    ]
    assert ct.read_config(config, [*NAMES, "lm_head"]) == specs


def test_config_names_layers_that_differ() -> None:
    specs = dict.fromkeys(NAMES, W4) | {"model.layers.10.mlp.down_proj": W8, "model.layers.2.mlp.down_proj": W8}
    ignored = ["lm_head", "model.layers.11.self_attn.q_proj"]
    del specs[ignored[1]]
    config = ct.config(dict(reversed(specs.items())), reversed(ignored))
    assert config == ct.config(specs, ignored)
    assert config["ignore"] == ignored
    four, eight = targets(config)
    assert eight == ["model.layers.2.mlp.down_proj", "model.layers.10.mlp.down_proj"]
    assert not any(target.startswith("re:") for target in four)
    assert ct.read_config(config, [*NAMES, "lm_head"]) == specs


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([None, W4, W8, Scheme(TensorSpec(3, 32, True))]), min_size=len(NAMES), max_size=len(NAMES))
)
def test_read_config_of_config(choice: list[Scheme | None]) -> None:
    specs = {name: spec for name, spec in zip(NAMES, choice, strict=True) if spec is not None}
    ignored = ["lm_head", *(name for name in NAMES if name not in specs)]
    if specs:
        config = ct.config(specs, ignored)
        assert ct.read_config(config, [*NAMES, "lm_head"]) == specs
        ct.check(config, [f"{name}.weight_scale" for name in specs], [*NAMES, "lm_head"])


def test_config_refuses_nonsense() -> None:
    with pytest.raises(UserError, match="nothing"):
        ct.config({}, ["lm_head"])
    with pytest.raises(UserError, match="both"):
        ct.config({"a": W4}, ["a"])


def group(**changes: object) -> dict:
    config = ct.config({"a": W4}, ["lm_head"])
    weights = config["config_groups"]["group_0"]["weights"]
    for key, value in changes.items():
        place = weights if key in ("num_bits", "type", "strategy", "actorder", "group_size", "dynamic") else config
        place = config["config_groups"]["group_0"] if key in ("targets", "input_activations", "weights") else place
        place[key] = value
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "gptq"}, "gptq"),
        ({"quantization_status": None}, "quantization_status"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({"transform_config": {"a": 1}}, "transform_config"),
        ({"type": "float"}, "float"),
        ({"actorder": "group"}, "activation order"),
        ({"strategy": "tensor"}, "only together with int8 inputs"),
        ({"group_size": None}, "group_size"),
        ({"num_bits": "4"}, "num_bits"),
        ({"num_bits": 16}, "bits must be"),
        ({"dynamic": True}, "dynamic weights"),
        ({"input_activations": {"num_bits": 4}}, "no layout"),
        ({"weights": None}, "no weights"),
        ({"targets": "Linear"}, "targets"),
        ({"targets": ["re:("]}, "regular expression"),
        ({"ignore": ["re:("]}, "regular expression"),
    ],
    ids=str,
)
def test_read_config_refuses(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ct.read_config(group(**changes), ["a"])


def test_read_config_refuses_another_format() -> None:
    config = group()
    config["config_groups"]["group_0"]["format"] = "int-quantized"
    with pytest.raises(UserError, match="int-quantized"):
        ct.read_config(config, ["a"])


def test_read_config_of_other_writers() -> None:
    config = group(actorder="dynamic weights")
    config["config_groups"]["group_0"]["weights"] |= {"observer": "mse", "observer_kwargs": {}, "block_structure": None}
    config |= {"ignore": ["re:.*head"], "sparsity_config": {"format": "dense"}}
    del config["config_groups"]["group_0"]["format"]
    assert ct.read_config(config, ["a", "lm_head"]) == {"a": W4}


def test_check() -> None:
    config = ct.config({"a": W4, "b": W4}, ["lm_head"])
    stored, linears = ["a.weight_scale", "b.weight_scale", "lm_head.weight"], ["a", "b", "lm_head"]
    ct.check(config, stored, linears)
    with pytest.raises(UserError, match="lm_head is stored as plain weights"):
        ct.check(config | {"ignore": []}, stored, linears)
    with pytest.raises(UserError, match="b is stored packed"):
        ct.check(config | {"ignore": ["b", "lm_head"]}, stored, linears)
    with pytest.raises(UserError, match="quantization_status"):
        ct.check({k: v for k, v in config.items() if k != "quantization_status"}, stored, linears)
