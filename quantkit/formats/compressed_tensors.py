"""compressed-tensors `pack-quantized`: integer weights of 2 to 8 bits (github.com/vllm-project/compressed-tensors).

Per module: weight_packed int32 [N, ceil(K * bits / 32)], weight_scale [N, G], weight_shape int64 [2] = (N, K), and for
asymmetric grids weight_zero_point int32 [ceil(N * bits / 32), G]. The format speaks of signed codes and zero points but
stores both with 2**(bits - 1) added: the very unsigned numbers of a QuantizedWeight. Codes are packed along a row, zero
points along a column, both as in `bitstream`.

Only config fields known to compressed-tensors 0.17 are written. That version's own unpacking still takes words of 3,
5, 6 or 7 bits for padded; from 0.18 on, and in vLLM's kernels, they are the dense stream written here.

Shapes: N = out features, K = in features, G = groups of a row.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import UserError
from quantkit.formats.bitstream import pack_words, unpack_words, words_for
from quantkit.types import QuantizedWeight, TensorSpec

SIGNED_SCALES = True  # a negative scale is multiplied like any other by every reader that was tried
SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NAME = "pack-quantized"
SUFFIXES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


def layout(
    shape: tuple[int, int], spec: TensorSpec, scale_dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Suffix -> (dtype, shape) of what `pack` makes of a weight of shape (N, K); UserError if it cannot hold it."""
    N, K = shape
    G = spec.groups(K)
    if scale_dtype not in SCALE_DTYPES:
        raise UserError(f"compressed-tensors scales are bfloat16, float16 or float32, not {scale_dtype}")
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "weight_packed": (torch.int32, (N, words_for(K, spec.bits))),
        "weight_scale": (scale_dtype, (N, G)),
        "weight_shape": (torch.int64, (2,)),
    }
    if not spec.symmetric:
        tensors["weight_zero_point"] = (torch.int32, (words_for(N, spec.bits), G))
    return tensors


def pack(q: QuantizedWeight) -> dict[str, Tensor]:
    """The module's tensors by suffix, as `layout` announces them."""
    if q.scale_NG.dtype not in SCALE_DTYPES:
        raise UserError(f"compressed-tensors scales are bfloat16, float16 or float32, not {q.scale_NG.dtype}")
    tensors = {
        "weight_packed": pack_words(q.codes_NK, q.spec.bits),
        "weight_scale": q.scale_NG.contiguous(),
        "weight_shape": torch.tensor(q.codes_NK.shape, dtype=torch.int64),
    }
    if q.zero_NG is not None:
        tensors["weight_zero_point"] = pack_words(q.zero_NG.T, q.spec.bits).T.contiguous()
    return tensors


def unpack(tensors: Mapping[str, Tensor], spec: TensorSpec) -> QuantizedWeight:
    """The inverse of `pack`; UserError naming the tensor whose dtype or shape does not fit the spec."""
    N, K = check_tensors(tensors, spec)
    zero_NG = None
    if not spec.symmetric:
        zero_NG = unpack_words(tensors["weight_zero_point"].T, spec.bits, N).T.contiguous()
    codes_NK = unpack_words(tensors["weight_packed"], spec.bits, K)
    return QuantizedWeight(codes_NK, tensors["weight_scale"], zero_NG, spec)


def check_tensors(tensors: Mapping[str, Tensor], spec: TensorSpec) -> tuple[int, int]:
    """(N, K) of a module's packed tensors; UserError where one of them does not fit the spec."""
    expected_names = set(SUFFIXES if not spec.symmetric else SUFFIXES[:3])
    if tensors.keys() != expected_names:
        found = ", ".join(sorted(tensors)) or "none"
        raise UserError(f"{spec} needs the tensors {', '.join(sorted(expected_names))}; there are {found}")
    shape = tensors["weight_shape"]
    if shape.numel() != 2 or shape.is_floating_point() or int(shape.min()) < 1:
        raise UserError(f"weight_shape holds {shape.tolist()}, expected out and in features")
    N, K = shape.flatten().tolist()
    for suffix, (dtype, expected) in layout((N, K), spec, tensors["weight_scale"].dtype).items():
        found = tensors[suffix]
        if suffix != "weight_shape" and (tuple(found.shape), found.dtype) != (expected, dtype):
            raise UserError(
                f"{suffix} is {found.dtype} {list(found.shape)}, expected {dtype} {list(expected)} "
                f"for a weight of {N} x {K} in {spec}"
            )
    return N, K


def config(specs: Mapping[str, TensorSpec], ignored: Iterable[str]) -> dict[str, Any]:
    """quantization_config for config.json.

    specs maps every quantized module's checkpoint name to its format; ignored names every linear that stays as it is
    (the head too: transformers would otherwise replace it by an empty quantized one).
    """
    ignored = set(ignored)
    if not specs:
        raise UserError("no module is quantized: there is nothing to describe")
    if both := sorted(specs.keys() & ignored):
        raise UserError(f"{both[0]} is both quantized and ignored")
    groups = {}
    distinct = sorted(set(specs.values()), key=lambda spec: (spec.bits, spec.group_size, spec.symmetric))
    for i, spec in enumerate(distinct):
        targets = ["Linear"] if len(distinct) == 1 else _targets(spec, specs, ignored)
        groups[f"group_{i}"] = {
            "targets": targets,
            "weights": _weights(spec),
            "input_activations": None,
            "output_activations": None,
            "format": NAME,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": NAME,
        "quantization_status": "compressed",  # without it transformers builds dense layers with random weights
        "version": "0.17.0",
        "config_groups": groups,
        "ignore": sorted(ignored, key=_natural),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def read_config(quantization_config: Mapping[str, Any], module_names: Iterable[str]) -> dict[str, TensorSpec]:
    """Which of the named linears are stored quantized, and how; UserError for anything but integer weights.

    An exact target wins over a pattern and a pattern over the class name, as in compressed-tensors.
    """
    qc = quantization_config
    if qc.get("quant_method") != "compressed-tensors":
        raise UserError(f"quant_method {qc.get('quant_method')!r} is not compressed-tensors")
    if qc.get("quantization_status") not in ("compressed", "frozen"):
        raise UserError("quantization_status is not 'compressed': readers would take the weights for dense ones")
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if qc.get(key) and qc[key] != {"format": "dense"}:
            raise UserError(f"{key} is set, and only plain quantized weights can be read")
    exact: dict[str, TensorSpec] = {}
    patterns: list[tuple[re.Pattern[str], TensorSpec]] = []
    default: TensorSpec | None = None
    for name, group in qc.get("config_groups", {}).items():
        spec = _read_group(name, group, qc.get("format"))
        for target in group["targets"]:
            if target.startswith("re:"):
                patterns.append((_compiled(target), spec))
            elif target == "Linear":
                default = default or spec
            else:
                exact.setdefault(target, spec)
    ignore = [_compiled(entry) if entry.startswith("re:") else entry for entry in qc.get("ignore") or ()]
    found = {}
    for module in module_names:
        if any(module == entry if isinstance(entry, str) else entry.match(module) for entry in ignore):
            continue
        matching = (spec for pattern, spec in patterns if pattern.match(module))
        spec = exact.get(module) or next(matching, default)
        if spec is not None:
            found[module] = spec
    return found


def check(quantization_config: Mapping[str, Any], stored: Iterable[str], linears: Iterable[str]) -> None:
    """UserError unless the config calls quantized exactly those linears that lie packed among the stored tensor names.

    This is what readers do not check: a dense linear the config does not ignore loads as random weights or NaN.
    """
    packed = {name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")}
    described = read_config(quantization_config, packed | set(linears)).keys()
    if dense := sorted(described - packed, key=_natural):
        raise UserError(f"{_some(dense)} stored as plain weights, but missing from quantization_config.ignore")
    if hidden := sorted(packed - described, key=_natural):
        raise UserError(f"{_some(hidden)} stored packed, but no group of quantization_config targets them")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"


def _weights(spec: TensorSpec) -> dict[str, Any]:
    weights: dict[str, Any] = {"num_bits": spec.bits, "type": "int", "symmetric": spec.symmetric}
    if spec.group_size == -1:
        weights["strategy"] = "channel"  # together with a group_size some versions refuse it
    else:
        weights |= {"strategy": "group", "group_size": spec.group_size}
    return weights | {"dynamic": False}


def _targets(spec: TensorSpec, specs: Mapping[str, TensorSpec], ignored: set[str]) -> list[str]:
    """Names of the modules of this spec, a name that differs only in numbers written once where that is true."""
    like: dict[str, set[str]] = {}
    for name in specs.keys() | ignored:
        like.setdefault(_template(name), set()).add(name)
    targets = set()
    for name in (name for name, own in specs.items() if own == spec):
        same = like[_template(name)]
        alone = len(same) == 1 or any(specs.get(other) != spec for other in same)
        targets.add(name if alone else f"re:{_template(name)}$")
    return sorted(targets, key=_natural)


def _template(name: str) -> str:
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _compiled(entry: str) -> re.Pattern[str]:
    try:
        return re.compile(entry.removeprefix("re:"))
    except re.error as error:
        raise UserError(f"quantization_config: {entry} is no regular expression: {error}") from error


def _read_group(name: str, group: Any, outer_format: Any) -> TensorSpec:
    where = f"quantization_config.config_groups.{name}"
    if not isinstance(group, dict) or not isinstance(group.get("targets"), list):
        raise UserError(f"{where} has no list of targets")
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise UserError(f"{where} has no weights")
    if (group.get("format") or outer_format) != NAME:
        raise UserError(f"{where}: format {group.get('format') or outer_format!r} cannot be read, only {NAME}")
    if group.get("input_activations") or group.get("output_activations"):
        raise UserError(f"{where}: quantized activations cannot be run, only quantized weights")
    if weights.get("type", "int") != "int" or weights.get("dynamic"):
        raise UserError(f"{where}: weights of type {weights.get('type')!r} cannot be read, only static integers")
    if weights.get("actorder") in ("group", "dynamic", True):
        raise UserError(f"{where}: groups in activation order cannot be read; requantize with static groups")
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy is None:
        strategy = "channel" if size in (None, -1) else "group"
    size = -1 if strategy == "channel" else size
    if strategy not in ("group", "channel") or not isinstance(size, int):
        raise UserError(f"{where}: strategy {strategy!r} with group_size {size!r} cannot be read")
    bits, symmetric = weights.get("num_bits", 8), weights.get("symmetric", True)
    if not isinstance(bits, int) or not isinstance(symmetric, bool):
        raise UserError(f"{where}: num_bits {bits!r} and symmetric {symmetric!r} are not a number and a truth value")
    return TensorSpec(bits, size, symmetric)
