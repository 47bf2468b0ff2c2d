"""AWQ, GPTQ, FP8 and ModelOpt: worked examples bit by bit, pack and unpack as inverses, configurations, refusals."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.errors import UserError
from quantkit.formats import FORMATS, awq, format_name, fp8, gptq, modelopt
from quantkit.grids.dequantize import (
    dequantize,
    expand,
)
from quantkit.grids.elements import (
    FP8,
)
from quantkit.types import PRESETS, ActivationRange, ActivationSpec, KVSpec, QuantizedWeight, Scheme, TensorSpec

V1, V2, BLOCKS, TENSOR = gptq.V1, gptq.V2, fp8.BLOCKS, fp8.TENSOR
INT4, INT4_ASYM = Scheme(TensorSpec(4, 32)), Scheme(TensorSpec(4, 32, False))
TOKEN = Scheme(PRESETS["FP8"].weights, ActivationSpec(8, element="float"))


def words(*values: int) -> Tensor:
    return torch.tensor([v - (1 << 32) if v >> 31 else v for v in values], dtype=torch.int32)


def make(N: int, K: int, scheme: Scheme, dtype: torch.dtype = torch.float32, seed: int = 0) -> QuantizedWeight:
    """Random codes, scales and zero points (never 0: GPTQ's version 1 has none)."""
    draw, spec = torch.Generator().manual_seed(seed), scheme.weights
    G, whole, zero_NG = spec.groups(K), None, None
    codes_NK = torch.randint(0, spec.levels, (N, K), dtype=torch.uint8, generator=draw)
    stored = (0.5 + torch.rand(-(-N // spec.scale_rows) if spec.scale_rows > 0 else 1, G, generator=draw)) * 0.01
    if spec.element == "float":
        if spec.bits == 8:
            codes_NK[codes_NK & 127 == 127] = 0x38  # NaN
        if spec.scale_format == "e4m3":
            whole = 2.0**-12
            stored = (stored / 0.015 * 448).to(FP8).float() * whole
        elif spec.scale_format == "e8m0":
            stored = stored.log2().round().exp2()
    elif not spec.symmetric:
        zero_NG = torch.randint(1, spec.levels, (N, G), dtype=torch.uint8, generator=draw)
    calibrated = scheme.activations is not None and scheme.activations.calibrated
    given = ActivationRange(torch.rand((), generator=draw) + 0.5) if calibrated else None
    return QuantizedWeight(codes_NK, expand(stored.to(dtype), spec, N), zero_NG, spec, whole, given)


def assert_same(a: QuantizedWeight, b: QuantizedWeight) -> None:
    assert (a.spec, a.global_scale, a.scale_NG.dtype) == (b.spec, b.global_scale, b.scale_NG.dtype)
    assert torch.equal(a.codes_NK, b.codes_NK)
    assert torch.equal(a.scale_NG, b.scale_NG)
    assert (a.zero_NG is None) == (b.zero_NG is None)
    assert a.zero_NG is None or b.zero_NG is None or torch.equal(a.zero_NG, b.zero_NG)
    assert (a.input is None) == (b.input is None)
    assert a.input is None or b.input is None or torch.equal(a.input.scale, b.input.scale)


def round_trip(form: Any, q: QuantizedWeight, scheme: Scheme) -> dict[str, Tensor]:
    N, K = q.codes_NK.shape
    tensors = form.pack(q, scheme)
    announced = form.layout((N, K), scheme, q.scale_NG.dtype)
    assert {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()} == announced
    assert announced.keys() <= set(form.SUFFIXES)
    assert form.MARK in announced
    assert form.check_tensors(tensors, scheme) == (N, K)
    assert form.check_tensors({k: t.to("meta") for k, t in tensors.items()}, scheme) == (N, K)
    assert form.scale_dtype(scheme, torch.bfloat16) == q.scale_NG.dtype
    assert_same(form.unpack(tensors, scheme), q)
    return tensors


# Worked examples -----------------------------------------------------------------------------------------------------


def test_awq_word() -> None:
    q = QuantizedWeight(
        torch.arange(8, dtype=torch.uint8)[:, None].expand(8, 16).contiguous(),
        torch.ones(8, 1, dtype=torch.float16),
        torch.arange(8, dtype=torch.uint8)[:, None].contiguous(),
        TensorSpec(4, 16, False),
    )
    tensors = awq.pack(q)
    assert torch.equal(tensors["qweight"], words(*[0x75316420] * 16)[:, None])
    assert torch.equal(tensors["qzeros"], words(0x75316420)[:, None])


def test_awq_symmetric_zero_points_are_eight() -> None:
    assert torch.equal(awq.pack(make(8, 32, INT4, torch.float16))["qzeros"], words(0x88888888)[:, None])


@pytest.mark.parametrize(
    ("bits", "first", "second"),
    [
        (4, 0x77777777, 0x88888888),
        (8, 0x7F7F7F7F, 0x80808080),
        (2, 0x55555555, 0xAAAAAAAA),
        (3, 0xDB6DB6DB, 0x24924924),
    ],
)
def test_gptq_symmetric_zero_points(bits: int, first: int, second: int) -> None:
    q = make(32, 64, Scheme(TensorSpec(bits, 64)), torch.float16)
    assert V1.pack(q)["qzeros"][0, 0] == words(first)
    assert V2.pack(q)["qzeros"][0, 0] == words(second)


@pytest.mark.parametrize("form", [V1, V2], ids=["v1", "v2"])
def test_gptq_words_run_down_the_columns(form: Any) -> None:
    codes_NK = torch.zeros(32, 32, dtype=torch.uint8)
    codes_NK[5] = torch.arange(8).repeat(4)  # three bits: 0 .. 7 four times
    q = QuantizedWeight(codes_NK, torch.ones(32, 1, dtype=torch.float16), None, TensorSpec(3, -1))
    tensors = form.pack(q)
    assert torch.equal(tensors["qweight"][:, 5], words(0x88FAC688, 0xC688FAC6, 0xFAC688FA))
    assert not tensors["qweight"][:, 4].any()


def test_gptq_group_index() -> None:
    assert V1.pack(make(8, 64, Scheme(TensorSpec(4, 16)), torch.float16))["g_idx"].tolist() == [
        k // 16 for k in range(64)
    ]
    assert not V1.pack(make(8, 64, Scheme(TensorSpec(4, -1)), torch.float16))["g_idx"].any()


def test_nvfp4_bytes_and_global_scale() -> None:
    codes_NK = torch.tensor([[13, 13, 9, 11] * 4], dtype=torch.uint8)
    q = QuantizedWeight(codes_NK, torch.tensor([[1.5 * 2**-10]]), None, PRESETS["NVFP4A16"].weights, 2.0**-10)
    tensors = modelopt.pack(q)
    assert tensors["weight"][0, :2].tolist() == [0xDD, 0xB9]
    assert tensors["weight_scale"].view(torch.uint8).item() == 0x3C  # e4m3 1.5
    assert tensors["weight_scale_2"] == 2.0**-10  # a multiplier
    value = dequantize(modelopt.unpack(tensors, PRESETS["NVFP4A16"]))
    assert value[0, :4].tolist() == [-3 * 1.5 * 2**-10] * 2 + [-0.5 * 1.5 * 2**-10, -1.5 * 1.5 * 2**-10]


def test_fp8_blocks_multiply_and_are_cut_short() -> None:
    codes_NK = torch.full((130, 200), 0x38, dtype=torch.uint8)  # 1.0
    stored = torch.tensor([[2.0, 3.0], [5.0, 7.0]])
    spec = PRESETS["FP8_BLOCK"].weights
    tensors = BLOCKS.pack(QuantizedWeight(codes_NK, expand(stored, spec, 130), None, spec))
    assert torch.equal(tensors["weight_scale_inv"], stored)
    assert torch.equal(tensors["weight"].float(), torch.ones(130, 200))
    value = dequantize(BLOCKS.unpack(tensors, PRESETS["FP8_BLOCK"]))
    assert (value[127, 127], value[127, 128], value[128, 127], value[129, 199]) == (2, 3, 5, 7)


# Inverses ------------------------------------------------------------------------------------------------------------


@settings(max_examples=120, deadline=None)
@given(
    form=st.sampled_from([awq, V1, V2]),
    N=st.integers(1, 3),
    groups=st.integers(1, 4),
    size=st.sampled_from([-1, 16, 32, 64]),
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_integers_come_back(form, N, groups, size, bits, symmetric, seed) -> None:
    scheme = Scheme(TensorSpec(4 if form is awq else bits, size, symmetric))
    step = 8 if form is awq else 32
    q = make(N * step, groups * (64 if size == 64 else 32), scheme, torch.float16, seed)
    q = replace(q, scale_NG=q.scale_NG * torch.where(torch.rand(q.scale_NG.shape) < 0.5, -1, 1).half())
    round_trip(form, q, scheme)


@settings(max_examples=60, deadline=None)
@given(
    case=st.sampled_from(
        [(BLOCKS, "FP8_BLOCK"), (TENSOR, "FP8"), (TENSOR, None)]
        + [(modelopt, name) for name in ("FP8", "FP8_DYNAMIC", "NVFP4", "NVFP4A16")]
    ),
    N=st.integers(1, 300),
    K=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_floats_come_back(case, N, K, seed) -> None:
    form, name = case
    scheme = PRESETS[name] if name else TOKEN
    K *= 16 if scheme.weights.scale_format == "e4m3" else 11
    round_trip(form, make(N, K, scheme, seed=seed), scheme)


def test_foreign_global_scale_comes_back() -> None:
    scheme = PRESETS["NVFP4"]
    tensors = modelopt.pack(make(40, 96, scheme))
    tensors["weight_scale_2"] = torch.tensor(0.0123)  # no power of two
    tensors["weight_scale"] = torch.arange(240).reshape(40, 6).clamp(max=126).to(torch.uint8).view(FP8)
    again = modelopt.pack(modelopt.unpack(tensors, scheme))
    assert all(torch.equal(again[k].view(torch.uint8), tensors[k].view(torch.uint8)) for k in ("weight_scale",))
    assert torch.equal(again["weight_scale_2"], tensors["weight_scale_2"])


def test_numbers_stored_as_vectors_are_read() -> None:
    tensors = TENSOR.pack(q := make(8, 16, PRESETS["FP8"]))
    tensors = {k: t.reshape(1) if t.dim() == 0 else t for k, t in tensors.items()}
    assert_same(TENSOR.unpack(tensors, PRESETS["FP8"]), q)


def test_gptq_without_group_index_is_read() -> None:
    tensors = V2.pack(q := make(8, 64, INT4_ASYM, torch.float16))
    del tensors["g_idx"]
    assert_same(V2.unpack(tensors, INT4_ASYM), q)


def test_packing_leaves_the_weight_alone() -> None:
    for form, scheme in ((awq, INT4_ASYM), (V1, INT4_ASYM), (V1, Scheme(TensorSpec(8, 32)))):
        q = make(32, 64, scheme, torch.float16)
        before = q.codes_NK.clone(), q.scale_NG.clone()
        for tensor in form.pack(q).values():
            tensor.zero_()
        assert torch.equal(q.codes_NK, before[0])
        assert torch.equal(q.scale_NG, before[1])


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "shape", "scheme", "message"),
    [
        (awq, (8, 64), Scheme(TensorSpec(3, 32)), "4-bit integers .* not int3 sym g32"),
        (awq, (8, 64), PRESETS["NVFP4A16"], "4-bit integers .* not nvfp4"),
        (awq, (12, 64), INT4, "12 is not a multiple of 8"),
        (awq, (8, 48), INT4, "does not divide"),
        (awq, (8, 48), Scheme(TensorSpec(4, 24)), "group sizes -1, 16, 32, 64, 128, not 24"),
        (awq, (8, 128), PRESETS["W4A8"], "no quantized inputs"),
        (V1, (32, 64), Scheme(TensorSpec(5, 32)), "2, 3, 4 or 8 bits .* not int5"),
        (V1, (32, 64), PRESETS["FP8_DYNAMIC"], "no quantized inputs"),
        (V1, (32, 64), Scheme(PRESETS["FP8"].weights), "2, 3, 4 or 8 bits .* not fp8 tensor"),
        (V2, (32, 48), Scheme(TensorSpec(3, 16)), "48 in features of 3 bits"),
        (V2, (20, 64), INT4, "20 out features of 4 bits"),
        (V2, (32, 64), Scheme(TensorSpec(4, 8)), "group sizes"),
        (BLOCKS, (32, 64), PRESETS["FP8"], "fp8 holds fp8 128x128 blocks, input fp8 dynamic g128; not fp8 tensor"),
        (BLOCKS, (32, 64), Scheme(PRESETS["FP8_BLOCK"].weights), "not fp8 128x128 blocks"),
        (TENSOR, (32, 64), PRESETS["FP8_DYNAMIC"], "not fp8 channel"),
        (modelopt, (32, 64), PRESETS["FP8_BLOCK"], "modelopt holds .* not fp8 128x128"),
        (modelopt, (32, 64), PRESETS["MXFP4"], "not mxfp4"),
        (modelopt, (32, 40), PRESETS["NVFP4"], "does not divide"),
    ],
)
def test_layout_refuses(form: Any, shape: tuple[int, int], scheme: Scheme, message: str) -> None:
    with pytest.raises(UserError, match=message):
        form.layout(shape, scheme, form.scale_dtype(scheme, torch.bfloat16))


@pytest.mark.parametrize("form", [awq, V1, V2, BLOCKS, TENSOR, modelopt])
def test_scale_dtype_is_fixed(form: Any) -> None:
    scheme = INT4 if form in (awq, V1, V2) else PRESETS["FP8_BLOCK" if form is BLOCKS else "FP8"]
    wrong = torch.float32 if form in (awq, V1, V2) else torch.float16
    with pytest.raises(UserError, match=r"scales are float.*not torch.float"):
        form.layout((8, 64), scheme, wrong)
    with pytest.raises(UserError, match=r"scales are float.*not torch.float"):
        form.pack(make(8, 64, scheme, wrong))


@pytest.mark.parametrize("form", [awq, V1, V2])
@pytest.mark.parametrize(("value", "message"), [(float("inf"), "not a finite"), (0.0, "too small")])
def test_scales_float16_cannot_hold(form: Any, value: float, message: str) -> None:
    q = make(8, 64, INT4, torch.float16)
    q.scale_NG[3, 1] = value
    with pytest.raises(UserError, match=message):
        form.pack(q)


@pytest.mark.parametrize("form", [BLOCKS, TENSOR, modelopt])
def test_nan_scales(form: Any) -> None:
    q = make(8, 64, PRESETS["FP8_BLOCK" if form is BLOCKS else "FP8"])
    with pytest.raises(UserError, match="not a finite"):
        form.pack(replace(q, scale_NG=q.scale_NG * float("nan")))


def test_nvfp4_refuses_negative_scales() -> None:
    q = make(8, 64, PRESETS["NVFP4"])
    with pytest.raises(UserError, match="negative"):
        modelopt.pack(replace(q, scale_NG=-q.scale_NG))


def test_version_1_has_no_zero_point_0() -> None:
    q = make(8, 64, INT4_ASYM, torch.float16)
    assert q.zero_NG is not None
    q.zero_NG[2, 1] = 0
    with pytest.raises(UserError, match="gptq_v2 can"):
        V1.pack(q)
    round_trip(V2, q, INT4_ASYM)
    stored = V1.pack(make(8, 64, INT4_ASYM, torch.float16)) | {"qzeros": words(0xF1111111)[:, None].expand(2, 1)}
    with pytest.raises(UserError, match="16 or of 0"):
        V1.unpack(stored, INT4_ASYM)


def test_activation_order_is_refused() -> None:
    tensors = V2.pack(make(8, 64, INT4, torch.float16))
    tensors["g_idx"] = tensors["g_idx"].flip(0)
    with pytest.raises(UserError, match="activation order"):
        V2.unpack(tensors, INT4)


@pytest.mark.parametrize("form", [awq, V1, V2])
def test_symmetric_by_name_only(form: Any) -> None:
    tensors = form.pack(make(8, 64, INT4_ASYM, torch.float16))
    with pytest.raises(UserError, match="others than"):
        form.unpack(tensors, INT4)


@pytest.mark.parametrize(
    ("form", "scheme", "change", "message"),
    [
        (awq, INT4, {"scales": torch.ones(2, 9, dtype=torch.float16)}, r"scales is .*\[2, 9\], expected .*\[2, 8\]"),
        (awq, INT4, {"qweight": torch.zeros(64, 1, dtype=torch.int64)}, "qweight is torch.int64"),
        (awq, INT4, {"extra": torch.zeros(1)}, "there are extra"),
        (V1, INT4, {"qzeros": None}, "needs the tensors"),
        (V1, INT4, {"qweight": torch.zeros(8, dtype=torch.int32)}, "expected a matrix"),
        (TENSOR, PRESETS["FP8"], {"weight_scale": torch.ones(2)}, r"weight_scale is .*\[2\], expected .*\[\]"),
        (TENSOR, PRESETS["FP8"], {"input_scale": None}, "needs the tensors"),
        (modelopt, PRESETS["NVFP4"], {"weight_scale": torch.ones(8, 4)}, "expected torch.float8_e4m3fn"),
        (modelopt, PRESETS["NVFP4A16"], {"input_scale": torch.ones(())}, "needs the tensors"),
    ],
)
def test_tensors_that_do_not_fit(form: Any, scheme: Scheme, change: dict, message: str) -> None:
    dtype = torch.float16 if form in (awq, V1) else torch.float32
    tensors = form.pack(make(8, 64, scheme, dtype)) | change
    with pytest.raises(UserError, match=message):
        form.unpack({k: t for k, t in tensors.items() if t is not None}, scheme)


# Configurations ------------------------------------------------------------------------------------------------------

NAMES = [f"model.layers.{i}.{part}" for i in (1, 11) for part in ("self_attn.q_proj", "mlp.up_proj")]
HOLDS = {
    "awq": [INT4, INT4_ASYM, Scheme(TensorSpec(4, -1))],
    "gptq": [INT4, INT4_ASYM, Scheme(TensorSpec(3, -1))],
    "gptq_v2": [INT4, INT4_ASYM, Scheme(TensorSpec(8, 128))],
    "fp8": [PRESETS["FP8_BLOCK"]],
    "fp8_tensor": [PRESETS["FP8"], TOKEN],
    "modelopt": [PRESETS[name] for name in ("FP8", "FP8_DYNAMIC", "NVFP4", "NVFP4A16")],
}
CASES = [(name, scheme) for name, schemes in HOLDS.items() for scheme in schemes]


@pytest.mark.parametrize(("name", "scheme"), CASES, ids=str)
def test_config_comes_back(name: str, scheme: Scheme) -> None:
    form, ignored = FORMATS[name], ["lm_head", "model.layers.1.mlp.gate_proj"]
    schemes = dict.fromkeys(NAMES, scheme)
    qc = json.loads(json.dumps(form.config(schemes, ignored, None)))
    assert format_name(qc) == name
    assert form.read_config(qc, NAMES) == schemes
    assert form.read_config(qc, ["model.layers.1.mlp.gate_proj"]) == {}
    assert form.read_kv(qc) is None
    for extra in form.files(qc).values():
        assert json.loads(json.dumps(extra)) == extra


@pytest.mark.parametrize("name", HOLDS)
def test_config_refusals(name: str) -> None:
    form, schemes = FORMATS[name], dict.fromkeys(NAMES, HOLDS[name][0])
    with pytest.raises(UserError, match="no module is quantized"):
        form.config({}, [], None)
    with pytest.raises(UserError, match="both quantized and ignored"):
        form.config(schemes, [NAMES[0]], None)
    with pytest.raises(UserError, match="KV cache"):
        form.config(schemes, [], KVSpec(8, "int"))
    if not name.startswith("gptq"):
        with pytest.raises(UserError, match=r"contains model\.layers\.1\.mlp\.up"):
            form.config(schemes, ["model.layers.1.mlp.up"], None)
        with pytest.raises(UserError, match="one scheme for all"):
            form.config(schemes | {"a": PRESETS["MXFP4"]}, [], None)


def test_gptq_rules_for_modules_that_differ() -> None:
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.gate_proj")
    names = [f"model.layers.{i}.{part}" for i in range(3) for part in parts]
    schemes = {name: INT4 if "attn" in name else INT4_ASYM for name in names if ".1.mlp" not in name}
    ignored = [name for name in names if ".1.mlp" in name] + ["lm_head"]
    qc = V2.config(schemes, ignored, None)
    assert (qc["bits"], qc["sym"], qc["lm_head"]) == (4, True, False)
    assert V2.read_config(qc, names) == schemes
    rules = {k: v for k, v in qc["dynamic"].items() if re.match(k[2:], "model.layers.1.mlp.gate_up_proj")}
    assert list(rules) == [r"-:^model\.layers\.1\.mlp\.gate_up_proj$"]  # vLLM's name of the two together
    assert not any(re.match(k[2:], "model.layers.0.self_attn.qkv_proj") for k in qc["dynamic"])
    assert V2.files(qc) == {"quantize_config.json": qc}


def test_gptq_names_what_is_quantized_in_every_block() -> None:
    quantized = [f"model.layers.{i}.mlp.{part}" for i in (0, 1) for part in ("up_proj", "experts.3.gate_proj")]
    even = V1.config(dict.fromkeys(quantized, INT4), ["lm_head", "model.layers.1.mlp.down_proj"], None)
    assert even["modules_in_block_to_quantize"] == [["mlp.experts.3.gate_proj", "mlp.up_proj"]]
    for dense in (["lm_head"], ["model.layers.2.mlp.up_proj"]):  # all of a block; not the same in all blocks
        assert "modules_in_block_to_quantize" not in V1.config(dict.fromkeys(quantized, INT4), dense, None)


def test_modelopt_files_and_kv_cache() -> None:
    schemes, kv = dict.fromkeys(NAMES, PRESETS["NVFP4"]), KVSpec(8, "float")
    qc = modelopt.config(schemes, ["lm_head"], kv)
    assert modelopt.read_kv(qc) == kv
    older = modelopt.files(qc)["hf_quant_config.json"]
    assert older["producer"]["name"] == "modelopt"
    assert older["quantization"] == {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": "FP8",
        "exclude_modules": ["lm_head"],
        "group_size": 16,
    }
    assert modelopt.read_config(older, [*NAMES, "lm_head"]) == schemes
    assert modelopt.read_kv(older) == kv


@pytest.mark.parametrize(
    ("name", "qc", "message"),
    [
        ("awq", {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, "'gemv' cannot be read"),
        ("awq", {"quant_method": "awq", "bits": 8, "group_size": 128}, "bits 8"),
        ("awq", {"quant_method": "gptq"}, "is not awq"),
        ("gptq", {"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"}, "'marlin'"),
        ("gptq", {"quant_method": "gptq", "group_size": 128}, "bits None"),
        ("gptq", {"quant_method": "gptq", "bits": 4, "dynamic": {"-:(": {}}}, "not a regular expression"),
        ("fp8", {"quant_method": "fp8", "weight_block_size": [64, 64]}, r"\[64, 64\]"),
        ("fp8", {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "static"}, "'static'"),
        ("fp8", {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}, "'ue8m0'"),
        ("fp8_tensor", {"quant_method": "fp8", "ignored_layers": "lm_head"}, "not a list"),
        ("modelopt", {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, "'W4A16_AWQ' cannot be read"),
        ("modelopt", {"quantization": {"quant_algo": "NVFP4", "group_size": 32}}, "group_size 32"),
    ],
)
def test_foreign_configs(name: str, qc: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        FORMATS[name].read_config(qc, ["a"])


def test_patterns_of_others_are_understood() -> None:
    qc = {"quantization": {"quant_algo": "FP8", "exclude_modules": ["*lm_head*", "model.layers.0"]}}
    names = ["lm_head", "model.layers.0.mlp.up_proj", "model.layers.10.mlp.up_proj"]
    assert list(modelopt.read_config(qc, names)) == names[2:]
    qc = {"quant_method": "awq", "bits": 4, "group_size": 32, "modules_to_not_convert": ["visual"]}
    assert list(awq.read_config(qc, ["visual.a", "model.b"])) == ["model.b"]
