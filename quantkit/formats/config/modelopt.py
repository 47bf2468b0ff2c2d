"""ModelOpt's quantization_config and hf_quant_config.json, and which tensors belong to them; no torch."""

from collections.abc import Iterable, Mapping
from typing import Any

from quantkit.errors import UserError
from quantkit.formats import common
from quantkit.types import PRESETS, KVSpec, Scheme

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


def stored(shape: tuple[int, int], scheme: Scheme, scale_tag: str | None) -> common.Stored:
    """Suffix -> (dtype, shape) of the tensors of a weight (N, K) with such scales; UserError if it cannot be held."""
    (N, K), number = shape, ("F32", ())
    _algorithm(scheme)
    if scale_tag != "F32":
        raise UserError(f"modelopt scales are float32, not {common.dtype_name(scale_tag)}")
    tensors: common.Stored
    if scheme.weights.scale_format == "e4m3":
        tensors = {"weight": ("U8", (N, K // 2)), "weight_scale": ("F8_E4M3", (N, scheme.weights.groups(K)))}
        tensors["weight_scale_2"] = number
    else:
        scale = () if scheme.weights.scale_rows == -1 else (N,)
        tensors = {"weight": ("F8_E4M3", (N, K)), "weight_scale": ("F32", scale)}
    if has_input_scale(scheme):
        tensors["input_scale"] = number
    return tensors


def shape_of(tensors: common.Headers, scheme: Scheme) -> tuple[int, int]:
    """(N, K) of a module, from its headers; UserError where one of them does not fit the scheme."""
    names = {"weight", "weight_scale"} | ({"weight_scale_2"} if scheme.weights.scale_format == "e4m3" else set())
    common.require(tensors, names | ({"input_scale"} if has_input_scale(scheme) else set()), scheme)
    N, columns = common.matrix(tensors, "weight")
    shape = (N, columns * 2 if scheme.weights.bits == 4 else columns)
    common.check_shapes(tensors, stored(shape, scheme, "F32"), shape, scheme)
    return shape


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


def has_input_scale(scheme: Scheme) -> bool:
    return scheme.activations is not None and scheme.activations.calibrated
