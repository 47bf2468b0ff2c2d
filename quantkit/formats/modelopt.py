"""NVIDIA ModelOpt's layout of 8- and 4-bit floats (github.com/NVIDIA/Model-Optimizer), which TensorRT-LLM reads.

By quant_algo, the tensors of a module:
FP8                        weight float8_e4m3fn [N, K], weight_scale [], input_scale []
FP8_PER_CHANNEL_PER_TOKEN  weight float8_e4m3fn [N, K], weight_scale [N]
NVFP4                      weight uint8 [N, K / 2], weight_scale float8_e4m3fn [N, K / 16], weight_scale_2 [],
                           input_scale []
W4A16_NVFP4                the same without input_scale

Scales are float32 but for NVFP4's of groups. All multiply: weight_scale_2, the global scale, is the reciprocal of what
compressed-tensors stores. The even one of two e2m1 elements takes the low half of a byte. Scales of an FP8 KV cache are
self_attn.k_proj.k_scale and self_attn.v_proj.v_scale, float32.

The configuration lies in config.json and once more, in an older form, in hf_quant_config.json.

Shapes: N = out features, K = in features.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import UserError
from quantkit.formats import common
from quantkit.grids.dequantize import (
    collapse,
    expand,
)
from quantkit.grids.elements import (
    FP8,
)
from quantkit.types import PRESETS, ActivationRange, KVSpec, QuantizedWeight, Scheme

MARK = "weight_scale"
SUFFIXES = ("weight", "weight_scale", "weight_scale_2", "input_scale")
SIGNED_SCALES = False  # floats have a sign of their own, and kernels for NVFP4 drop that of a scale
KV_NAMES = ("k_proj.k_scale", "v_proj.v_scale")
ALGORITHMS = {
    "FP8": PRESETS["FP8"],
    "FP8_PER_CHANNEL_PER_TOKEN": PRESETS["FP8_DYNAMIC"],
    "NVFP4": PRESETS["NVFP4"],
    "W4A16_NVFP4": PRESETS["NVFP4A16"],
}
FP8_KV = KVSpec(8, "float")
PRODUCER = {"name": "modelopt", "version": "0.47.0"}  # the version whose layout this is: readers look for the name


def scale_dtype(scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
    """float32, whatever the weight was stored as."""
    return torch.float32


def layout(shape: tuple[int, int], scheme: Scheme, scale_dtype: torch.dtype) -> common.Layout:
    """Suffix -> (dtype, shape) of what `pack` makes of a weight of shape (N, K); UserError if it cannot hold it."""
    (N, K), number = shape, (torch.float32, ())
    _algorithm(scheme)
    if scale_dtype != torch.float32:
        raise UserError(f"modelopt scales are float32, not {scale_dtype}")
    tensors: common.Layout
    if scheme.weights.scale_format == "e4m3":
        tensors = {"weight": (torch.uint8, (N, K // 2)), "weight_scale": (FP8, (N, scheme.weights.groups(K)))}
        tensors["weight_scale_2"] = number
    else:
        scale = () if scheme.weights.scale_rows == -1 else (N,)
        tensors = {"weight": (FP8, (N, K)), "weight_scale": (torch.float32, scale)}
    if _has_input_scale(scheme):
        tensors["input_scale"] = number
    return tensors


def pack(q: QuantizedWeight, scheme: Scheme | None = None) -> dict[str, Tensor]:
    """The module's tensors by suffix, as `layout` announces them; the weight alone tells which."""
    if q.scale_NG.dtype != torch.float32:
        raise UserError(f"modelopt scales are float32, not {q.scale_NG.dtype}")
    if q.global_scale is not None:
        tensors = _pack_nvfp4(q, q.global_scale)
    else:
        common.check_scales(q, "modelopt")
        tensors = {
            "weight": q.codes_NK.view(FP8),
            "weight_scale": collapse(q.scale_NG, q.spec).reshape(() if q.spec.scale_rows == -1 else (-1,)),
        }
    if q.input is not None:
        tensors["input_scale"] = q.input.scale.reshape(()).float()
    return tensors


def check_tensors(tensors: Mapping[str, Tensor], scheme: Scheme) -> tuple[int, int]:
    """(N, K) of a module's tensors; UserError where one of them does not fit the scheme."""
    names = {"weight", "weight_scale"} | ({"weight_scale_2"} if scheme.weights.scale_format == "e4m3" else set())
    common.require(tensors, names | ({"input_scale"} if _has_input_scale(scheme) else set()), scheme)
    N, columns = common.matrix(tensors, "weight")
    shape = (N, columns * 2 if scheme.weights.bits == 4 else columns)
    common.check_shapes(tensors, layout(shape, scheme, torch.float32), shape, scheme)
    return shape


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
    """The inverse of `pack`; UserError where a tensor does not fit the scheme."""
    (N, K), spec = check_tensors(tensors, scheme), scheme.weights
    given = ActivationRange(tensors["input_scale"].reshape(())) if _has_input_scale(scheme) else None
    if spec.scale_format != "e4m3":
        scale_NG = expand(tensors["weight_scale"].reshape(-1, 1), spec, N)
        return QuantizedWeight(tensors["weight"].view(torch.uint8), scale_NG, None, spec, input=given)
    pairs_NP, whole = tensors["weight"], tensors["weight_scale_2"].reshape(())
    codes_NK = torch.stack((pairs_NP & 15, pairs_NP >> 4), dim=-1).reshape(N, K)
    scale_NG = tensors["weight_scale"].float() * whole
    return QuantizedWeight(codes_NK, scale_NG, None, spec, global_scale=float(whole), input=given)


def config(schemes: Mapping[str, Scheme], ignored: Iterable[str], kv: KVSpec | None) -> dict[str, Any]:
    """quantization_config for config.json; UserError for mixed schemes, another KV cache than FP8, confusable names."""
    ignored = sorted(set(ignored), key=common.natural)
    scheme = common.sole_scheme(schemes, "modelopt")
    common.refuse_both(schemes, ignored)
    common.refuse_substrings(schemes, ignored, "modelopt")
    if kv not in (None, FP8_KV):
        raise UserError(f"modelopt has FP8 scales per tensor for the KV cache, not {kv}; compressed-tensors has")
    numbers: dict[str, Any] = {"num_bits": scheme.weights.bits, "type": "float", "dynamic": False}
    if scheme.weights.scale_format == "e4m3":
        numbers["group_size"] = scheme.weights.group_size
    group = {"weights": numbers, "targets": ["Linear"]}
    if scheme.activations is not None:
        dynamic = scheme == PRESETS["FP8_DYNAMIC"]
        group["input_activations"] = numbers | {"dynamic": dynamic} | ({"strategy": "token"} if dynamic else {})
        group["weights"] = numbers | ({"strategy": "channel"} if dynamic else {})
    qc: dict[str, Any] = {
        "quant_method": "modelopt",
        "quant_algo": _algorithm(scheme),
        "config_groups": {"group_0": group},
        "ignore": ignored,
        "producer": PRODUCER,
    }
    if kv is not None:
        qc["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "dynamic": False}
    return qc


def files(quantization_config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """hf_quant_config.json, the form from before config.json told it."""
    qc = quantization_config
    older: dict[str, Any] = {
        "quant_algo": qc["quant_algo"],
        "kv_cache_quant_algo": "FP8" if qc.get("kv_cache_scheme") else None,
        "exclude_modules": qc["ignore"],
    }
    if ALGORITHMS[qc["quant_algo"]].weights.scale_format == "e4m3":
        older["group_size"] = ALGORITHMS[qc["quant_algo"]].weights.group_size
    return {"hf_quant_config.json": {"producer": qc["producer"], "quantization": older}}


def read_config(quantization_config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Scheme]:
    """Which of the modules are stored quantized, and how, from either form; UserError for other algorithms."""
    qc = _inner(quantization_config)
    algorithm = qc.get("quant_algo")
    if algorithm not in ALGORITHMS:
        raise UserError(f"modelopt's quant_algo {algorithm!r} cannot be read, only {', '.join(ALGORITHMS)}")
    size = qc.get("group_size")
    if size and ALGORITHMS[algorithm].weights.scale_format == "e4m3" and size != 16:
        raise UserError(f"modelopt {algorithm} with group_size {size!r} cannot be read, only 16")
    dense = common.names_of(qc, "ignore", "exclude_modules")
    return {name: ALGORITHMS[algorithm] for name in modules if not common.listed(name, dense)}


def read_kv(quantization_config: Mapping[str, Any]) -> KVSpec | None:
    """The KV cache's format; UserError for another than FP8."""
    qc = _inner(quantization_config)
    inline, older = qc.get("kv_cache_scheme"), qc.get("kv_cache_quant_algo")
    if not inline and not older:
        return None
    if inline and (inline.get("num_bits"), inline.get("type"), inline.get("dynamic", False)) != (8, "float", False):
        raise UserError(f"kv_cache_scheme {inline!r} cannot be read, only 8-bit floats")
    if older not in (None, "FP8"):
        raise UserError(f"kv_cache_quant_algo {older!r} cannot be read, only FP8")
    return FP8_KV


def _inner(quantization_config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = quantization_config.get("quantization", quantization_config)
    if not isinstance(inner, Mapping):
        raise UserError("hf_quant_config.json: quantization is not an object")
    return inner


def _algorithm(scheme: Scheme) -> str:
    for name, own in ALGORITHMS.items():
        if own == scheme:
            return name
    raise UserError(f"modelopt holds {'; '.join(map(str, ALGORITHMS.values()))}; not {scheme}")


def _has_input_scale(scheme: Scheme) -> bool:
    return scheme.activations is not None and scheme.activations.calibrated


def _pack_nvfp4(q: QuantizedWeight, global_scale: float) -> dict[str, Tensor]:
    if not q.scale_NG.isfinite().all() or not 0 < global_scale < float("inf"):
        raise UserError("a scale is not a finite number; modelopt cannot hold it")
    if (q.scale_NG < 0).any():
        raise UserError("a group scale is negative, and kernels for NVFP4 drop its sign")
    whole = torch.tensor(global_scale, dtype=torch.float32)
    return {
        "weight": q.codes_NK[:, 0::2] | q.codes_NK[:, 1::2] << 4,
        "weight_scale": (q.scale_NG / whole).to(FP8),
        "weight_scale_2": whole,
    }
