"""Every compressed-tensors layout against compressed-tensors itself, and a folder of every preset against transformers.

What transformers makes of quantized inputs is compressed-tensors' own arithmetic, which differs from the engines' in
known ways (grids/activations.py); so where inputs are quantized weights are compared, and logits where they are not.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization.lifecycle import initialize
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from quantkit.algorithms.rtn import rtn
from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.compressed_tensors import tensors as ct
from quantkit.grids import RangeSearch, make_grid
from quantkit.grids.dequantize import (
    dequantize,
)
from quantkit.quantization import pipeline
from quantkit.recipe import load as recipe
from quantkit.runtime.load import load
from quantkit.runtime.quant_linear import QuantLinear
from quantkit.types import PRESETS, ActivationRange, ActivationSpec, KVSpec, Scheme, TensorSpec
from tests.interop.tiny_llama import save_tiny_llama

pytestmark = pytest.mark.interop
pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
pytest.importorskip("accelerate", reason="transformers needs accelerate for quantized folders")

INT8, FP8 = TensorSpec(8, -1), TensorSpec(8, -1, element="float")
INT8_TENSOR, FP8_TENSOR = TensorSpec(8, -1, scale_rows=-1), TensorSpec(8, -1, element="float", scale_rows=-1)
INT8_STATIC, INT8_ASYM = ActivationSpec(8, dynamic=False), ActivationSpec(8, symmetric=False, dynamic=False)
SCHEMES = PRESETS | {
    "INT8 tensor, static": Scheme(INT8_TENSOR, INT8_STATIC),
    "INT8 tensor": Scheme(INT8_TENSOR, ActivationSpec(8)),
    "INT8 static asym": Scheme(INT8, INT8_ASYM),
    "INT8 asym token": Scheme(INT8, ActivationSpec(8, symmetric=False)),
    "FP8 weight-only channel": Scheme(FP8),
    "FP8 weight-only tensor": Scheme(FP8_TENSOR),
    "FP8 weight-only block": Scheme(PRESETS["FP8_BLOCK"].weights),
    "FP8 channel static": Scheme(FP8, ActivationSpec(8, element="float", dynamic=False)),
    "MXFP4A16": Scheme(PRESETS["MXFP4"].weights),
    "MXFP8A16": Scheme(PRESETS["MXFP8"].weights),
}
LAYOUTS = {
    "W4A16": "pack-quantized",
    "W8A8": "int-quantized",
    "INT8 tensor, static": "int-quantized",
    "FP8": "float-quantized",
    "FP8_DYNAMIC": "float-quantized",
    "FP8_BLOCK": "float-quantized",
    "FP8 weight-only channel": "naive-quantized",
    "NVFP4": "nvfp4-pack-quantized",
    "MXFP4": "mxfp4-pack-quantized",
    "MXFP8": "mxfp8-quantized",
}


def decompress(tensors: dict[str, Tensor], settings: dict[str, Any]) -> Tensor:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(settings)
    compressor = BaseCompressor.get_value_from_registry(settings["format"])
    return compressor.decompress(dict(tensors), config.config_groups["group_0"])["weight"]


@pytest.mark.parametrize("factor", [1.0, 1e-3, 300.0], ids="x{:g}".format)
@pytest.mark.parametrize("name", SCHEMES)
def test_same_floats(name: str, factor: float) -> None:
    """Blocks with ragged edges: 200 = 128 + 72 rows, 300 = 2 x 128 + 44 columns."""
    scheme = SCHEMES[name]
    torch.manual_seed(0)
    shape = (200, 300) if scheme.weights.scale_rows == 128 else (40, 256)
    w_NK = torch.randn(shape) * factor
    w_NK[:, 7] *= 5
    grid = make_grid(scheme.weights, torch.float32, RangeSearch(), signed=True)
    q = rtn(w_NK, grid)
    settings = ct.config({"a": scheme}, ["lm_head"], None)
    assert settings["format"] == LAYOUTS.get(name, settings["format"])
    theirs = decompress(ct.pack(q, scheme), settings)
    assert torch.equal(theirs.float(), dequantize(q).to(theirs.dtype).float())
    if scheme.weights.scale_format == "float":
        assert theirs.dtype == torch.float32
    assert ((theirs.float() - w_NK).norm() / w_NK.norm()).item() < 0.2


@pytest.mark.parametrize("name", SCHEMES)
def test_our_config_means_the_same_there(name: str) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    scheme = SCHEMES[name]
    group = QuantizationConfig.model_validate(ct.config({"a": scheme}, ["lm_head"])).config_groups["group_0"]
    weights, acts, spec = group.weights, group.input_activations, scheme.weights
    assert (weights.num_bits, weights.symmetric, weights.type) == (spec.bits, spec.symmetric, spec.element)
    strategy = {"e4m3": "tensor_group", "e8m0": "group"}.get(spec.scale_format) or (
        {-1: "tensor", 128: "block"}.get(spec.scale_rows) or ("channel" if spec.group_size == -1 else "group")
    )
    assert weights.strategy == strategy
    assert (acts is None) == (scheme.activations is None)
    if acts is not None and scheme.activations is not None:
        given = scheme.activations
        assert (acts.num_bits, acts.symmetric, acts.type) == (given.bits, given.symmetric, given.element)
        assert (acts.dynamic is False) == (not given.dynamic)


def test_mixed_config_is_valid_there() -> None:
    from compressed_tensors.quantization import QuantizationConfig

    schemes = {f"m.{i}.{name}": scheme for i, (name, scheme) in enumerate(PRESETS.items())}
    settings = ct.config(schemes, ["lm_head"], KVSpec(8, "float"))
    parsed = QuantizationConfig.model_validate(settings)
    assert len(parsed.config_groups) == len(set(PRESETS.values()))
    assert parsed.kv_cache_scheme.num_bits == 8
    assert settings["format"] == "mixed-precision"
    assert ct.read_config(settings, schemes) == schemes


# Whole folders


IDS = torch.arange(32).reshape(1, 32) * 13 % 512
PROJECTIONS = 14
CLOSE = {"FP8": 0.01, "FP8_DYNAMIC": 0.01, "FP8_BLOCK": 0.01, "W8A8": 0.05, "W4A8": 0.05}  # of logits


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    save_tiny_llama(folder)
    return folder


def quantized(source: Path, output: Path, **data: Any) -> Path:
    data = {"model": str(source), "calibration": {"data": "given as token ids"}} | data
    ids = torch.randint(0, 512, (2, 32), generator=torch.Generator().manual_seed(1))
    pipeline.quantize(recipe.from_data(data), output, calibration=ids, progress=False)
    return output


def theirs(folder: Path, dtype: torch.dtype, **options: Any) -> nn.Module:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    for what in ("missing", "unexpected", "mismatched"):
        assert not info[f"{what}_keys"], what
    return model.eval()


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def dense_weights(folder: Path) -> dict[str, Tensor]:
    """Our dequantized weights by module."""
    model = load(folder)
    return {name: module.weight for name, module in model.named_modules() if isinstance(module, QuantLinear)}


@pytest.mark.parametrize("name", PRESETS)
@torch.no_grad()
def test_transformers_loads_every_preset(source: Path, tmp_path: Path, name: str) -> None:
    from transformers import CompressedTensorsConfig

    folder = quantized(source, tmp_path / "out", scheme=name)
    options = {}
    if not PRESETS[name].weights.symmetric:  # transformers 5.23 with compressed-tensors 0.20 cannot load zero points
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    # transformers gives plain scales the dtype of the model: bfloat16 would round those of fp8 and int8
    dtype = torch.float32 if name in ("W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK") else torch.bfloat16
    model, ours = theirs(folder, dtype, **options), dense_weights(folder)
    assert len(ours) == PROJECTIONS
    found = weights_of(model, ours.keys())
    for module, weight_NK in ours.items():
        assert torch.equal(found[module].float(), weight_NK.to(found[module].dtype).float()), module
    expected, exact = (load(folder, dtype=width)(IDS).logits for width in (dtype, torch.float32))
    if PRESETS[name].activations is None:
        assert relative(model(IDS).logits, expected) <= 1.5 * relative(expected, exact)
    else:  # the same inputs, rounded by slightly other rules
        assert relative(model(IDS).logits, expected) < CLOSE.get(name, 0.6)


def weights_of(model: nn.Module, names: Any) -> dict[str, Tensor]:
    """The weights transformers' modules compute with, decompressed by compressed-tensors where they lie packed."""
    from compressed_tensors.compressors import BaseCompressor

    found = {}
    for name in names:
        module = model.get_submodule(name)
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None or getattr(module, "quantization_status", None) != "compressed":
            found[name] = module.weight
            continue
        tensors = dict(module.named_parameters()) | dict(module.named_buffers())
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        found[name] = compressor.decompress({k: v.data for k, v in tensors.items()}, scheme)["weight"]
    return found


@torch.no_grad()
def test_transformers_reads_static_ranges(source: Path, tmp_path: Path) -> None:
    folder = quantized(source, tmp_path / "out", scheme="FP8")
    model, ours = theirs(folder, torch.float32), load(folder)
    for name, module in ours.named_modules():
        if isinstance(module, QuantLinear):
            q = module.quantized()
            assert isinstance(q.input, ActivationRange)
            assert model.get_submodule(name).input_scale.reshape([]) == q.input.scale


@torch.no_grad()
def test_transformers_loads_mixed_schemes(source: Path, tmp_path: Path) -> None:
    overrides = [{"match": "re:.*self_attn", "scheme": "FP8_DYNAMIC"}]
    folder = quantized(source, tmp_path / "out", scheme="W4A16", overrides=overrides)
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert {group["format"] for group in settings["config_groups"].values()} == {"pack-quantized", "float-quantized"}
    model, ours = theirs(folder, torch.bfloat16), dense_weights(folder)
    found = weights_of(model, ours.keys())
    for name, w_NK in ours.items():
        rounded = 2**-7 if "self_attn" in name else 0  # of the fp8 scales, to bfloat16
        torch.testing.assert_close(found[name].float(), w_NK.to(found[name].dtype).float(), rtol=rounded, atol=0)


@pytest.mark.parametrize("per", ["tensor", "head"])
@torch.no_grad()
def test_transformers_finds_the_scales_of_the_cache(source: Path, tmp_path: Path, per: str) -> None:
    """And rounds keys and values with them as we do."""
    recognised = getattr(initialize, "is_cached_attention_module", initialize.is_attention_module)
    if not recognised(LlamaAttention(LlamaConfig(), 0)):
        pytest.skip("this compressed-tensors does not recognise the attention of this transformers")
    folder = quantized(source, tmp_path / "out", scheme="FP8_DYNAMIC", kv_cache={"type": "fp8", "per": per})
    model, ours = theirs(folder, torch.float32), load(folder, dtype=torch.float32)
    checkpoint = Checkpoint.open(folder)
    scales = [name for name in checkpoint.tensors if name.endswith(("k_scale", "v_scale"))]
    assert len(scales) == 4
    for name in scales:
        stored = checkpoint.read(name)
        assert torch.equal(model.get_parameter(name).reshape(stored.shape), stored)
        assert stored.shape == ((2, 1, 1) if per == "head" else (1,))
    plain = load(quantized(source, tmp_path / "plain", scheme="FP8_DYNAMIC"), dtype=torch.float32)
    moved = relative(plain(IDS).logits, ours(IDS).logits)
    assert relative(model(IDS).logits, ours(IDS).logits) < 0.1 * moved
