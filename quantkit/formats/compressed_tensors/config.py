"""compressed-tensors' quantization_config: written for any mix of schemes, and read back.

Only fields known to compressed-tensors 0.17 are written: it refuses unknown ones, and vLLM is pinned to it.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from quantkit.errors import UserError
from quantkit.formats.common import natural, refuse_both
from quantkit.types import BLOCK, ActivationSpec, KVSpec, Scheme, TensorSpec

MIXED = "mixed-precision"
E4M3, E8M0 = "torch.float8_e4m3fn", "torch.uint8"


def layout_name(scheme: Scheme) -> str:
    """The layout of a scheme's tensors; UserError for one that none of them holds."""
    spec, acts = scheme.weights, scheme.activations
    if spec.element == "int":
        if acts is not None and (acts.element != "int" or acts.bits != 8) and str(acts) != "fp8 dynamic token":
            raise UserError(f"compressed-tensors has no layout for {scheme}")
        if spec.bits == 8 and spec.group_size == -1 and acts is not None and acts.element == "int":
            if not spec.symmetric:
                raise UserError(f"int8 weights with int8 inputs have no zero points in compressed-tensors, not {spec}")
            return "int-quantized"
        if spec.scale_rows != 1:
            raise UserError(f"compressed-tensors holds {spec} weights only together with int8 inputs")
        if acts is not None and not acts.dynamic:
            raise UserError(f"compressed-tensors holds {spec} weights with dynamic inputs only, not {acts}")
        return "pack-quantized"
    if spec.scale_format != "float":
        if spec.group_size != (size := {"e4m3": 16, "e8m0": 32}[spec.scale_format]):
            raise UserError(f"{spec} weights have groups of {size}, not of {spec.group_size}")
        if acts is not None and (acts.scale_format, acts.bits) != (spec.scale_format, spec.bits):
            raise UserError(f"compressed-tensors has no layout for {scheme}: inputs must be {spec} too, or plain")
        if spec.bits == 8:
            return "mxfp8-quantized"
        return "nvfp4-pack-quantized" if spec.scale_format == "e4m3" else "mxfp4-pack-quantized"
    if spec.bits != 8 or (spec.scale_rows == 1 and spec.group_size != -1):
        raise UserError(f"compressed-tensors has no layout for weights of type float in {spec}")
    if acts is None:
        return "naive-quantized"
    if acts.element != "float" or acts.bits != 8 or acts.scale_format != "float":
        raise UserError(f"compressed-tensors has no layout for {scheme}: fp8 weights go with fp8 inputs or plain ones")
    if (spec.scale_rows == BLOCK) != (acts.group_size == BLOCK):
        raise UserError(f"compressed-tensors has no layout for {scheme}: blocks go with inputs in groups of {BLOCK}")
    return "float-quantized"


def config(schemes: Mapping[str, Scheme], ignored: Iterable[str], kv: KVSpec | None = None) -> dict[str, Any]:
    """quantization_config for config.json.

    schemes maps every quantized module's checkpoint name to its scheme; ignored names every linear that stays as it is
    (the head too: transformers would otherwise replace it by an empty quantized one).
    """
    ignored = set(ignored)
    if not schemes:
        raise UserError("no module is quantized: there is nothing to describe")
    refuse_both(schemes, ignored)
    # vLLM's head is no Linear: it is quantized only where a target names it
    heads = sorted(name for name in schemes if not any(part.isdigit() for part in name.split(".")))
    groups, distinct = {}, sorted(set(schemes.values()), key=str)
    for i, scheme in enumerate(distinct):
        groups[f"group_{i}"] = {
            "targets": ["Linear", *heads] if len(distinct) == 1 else _targets(scheme, schemes, ignored),
            "weights": _weights(scheme.weights),
            "input_activations": None if scheme.activations is None else _activations(scheme.activations),
            "output_activations": None,
            "format": layout_name(scheme),
        }
    names = {layout_name(scheme) for scheme in distinct}
    return {
        "quant_method": "compressed-tensors",
        "format": names.pop() if len(names) == 1 else MIXED,
        "quantization_status": "compressed",  # without it transformers builds dense layers with random weights
        "version": "0.17.0",
        "config_groups": groups,
        "ignore": sorted(ignored, key=natural),
        "kv_cache_scheme": None if kv is None else _kv(kv),
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def files(quantization_config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """None: all of it is in config.json."""
    return {}


def _weights(spec: TensorSpec) -> dict[str, Any]:
    weights: dict[str, Any] = {
        "num_bits": spec.bits,
        "type": spec.element,
        "symmetric": spec.symmetric,
        **_strategy(spec.scale_rows, spec.group_size, spec.scale_format),
    }
    return weights | {"dynamic": False}


def _activations(spec: ActivationSpec) -> dict[str, Any]:
    rows = 1 if spec.dynamic else -1
    strategy = _strategy(rows, spec.group_size, spec.scale_format)
    if strategy["strategy"] == "channel":
        strategy["strategy"] = "token"
    dynamic = "local" if spec.scale_format == "e4m3" else spec.dynamic
    return {"num_bits": spec.bits, "type": spec.element, "symmetric": spec.symmetric, **strategy, "dynamic": dynamic}


def _strategy(rows: int, group_size: int, scale: str) -> dict[str, Any]:
    if rows == BLOCK:
        return {"strategy": "block", "block_structure": [BLOCK, BLOCK]}
    if rows == -1:
        return {"strategy": "tensor"}
    if group_size == -1:
        return {"strategy": "channel"}  # together with a group_size some versions refuse it
    if scale == "e4m3":
        return {"strategy": "tensor_group", "group_size": group_size, "scale_dtype": E4M3, "zp_dtype": E4M3}
    extra = {"scale_dtype": E8M0, "zp_dtype": E8M0} if scale == "e8m0" else {}
    return {"strategy": "group", "group_size": group_size, **extra}


def _kv(kv: KVSpec) -> dict[str, Any]:
    if kv.element != "float" or kv.bits != 8:
        raise UserError(f"engines load fp8 caches only; {kv} is for evaluation: set output.engine to null and eval it")
    strategy = "tensor" if kv.per == "tensor" else "attn_head"
    return {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False}


def read_kv(quantization_config: Mapping[str, Any]) -> KVSpec | None:
    """The cache's format; UserError for one that cannot be run."""
    scheme = quantization_config.get("kv_cache_scheme")
    if not scheme:
        return None
    per = {"tensor": "tensor", "attn_head": "head", None: "tensor"}.get(scheme.get("strategy"))
    if scheme.get("type") != "float" or scheme.get("num_bits") != 8 or per is None or scheme.get("dynamic"):
        raise UserError(
            f"quantization_config.kv_cache_scheme {scheme} cannot be read, only static fp8 per tensor or head"
        )
    return KVSpec(8, "float", "head" if per == "head" else "tensor")


def read_config(quantization_config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Scheme]:
    """Which of the named linears are stored quantized, and how; UserError for what cannot be read.

    An exact target wins over a pattern and a pattern over the class name, as in compressed-tensors.
    """
    qc = quantization_config
    if qc.get("quant_method") != "compressed-tensors":
        raise UserError(f"quant_method {qc.get('quant_method')!r} is not compressed-tensors")
    if qc.get("quantization_status") not in ("compressed", "frozen"):
        raise UserError("quantization_status is not 'compressed': readers would take the weights for dense ones")
    for key in ("sparsity_config", "transform_config"):
        if qc.get(key) and qc[key] != {"format": "dense"}:
            raise UserError(f"{key} is set, and only plain quantized weights can be read")
    read_kv(qc)
    exact: dict[str, Scheme] = {}
    patterns: list[tuple[re.Pattern[str], Scheme]] = []
    default: Scheme | None = None
    for name, group in qc.get("config_groups", {}).items():
        scheme = _read_group(name, group, qc.get("format"))
        for target in group["targets"]:
            if target.startswith("re:"):
                patterns.append((_compiled(target), scheme))
            elif target == "Linear":
                default = default or scheme
            else:
                exact.setdefault(target, scheme)
    ignore = [_compiled(entry) if entry.startswith("re:") else entry for entry in qc.get("ignore") or ()]
    found = {}
    for module in modules:
        if any(module == entry if isinstance(entry, str) else entry.match(module) for entry in ignore):
            continue
        matching = (scheme for pattern, scheme in patterns if pattern.match(module))
        scheme = exact.get(module) or next(matching, default)
        if scheme is not None:
            found[module] = scheme
    return found


def check(quantization_config: Mapping[str, Any], stored: Iterable[str], linears: Iterable[str]) -> None:
    """UserError unless the config calls quantized exactly those linears that lie packed among the stored tensor names.

    This is what readers do not check: a dense linear the config does not ignore loads as random weights or NaN.
    """
    packed = {name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")}
    described = read_config(quantization_config, packed | set(linears)).keys()
    if dense := sorted(described - packed, key=natural):
        raise UserError(f"{_some(dense)} stored as plain weights, but missing from quantization_config.ignore")
    if hidden := sorted(packed - described, key=natural):
        raise UserError(f"{_some(hidden)} stored packed, but no group of quantization_config targets them")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"


def _targets(scheme: Scheme, schemes: Mapping[str, Scheme], ignored: set[str]) -> list[str]:
    """Names of the modules of this scheme, a name that differs only in numbers written once where that is true."""
    like: dict[str, set[str]] = {}
    for name in schemes.keys() | ignored:
        like.setdefault(_template(name), set()).add(name)
    targets = set()
    for name in (name for name, own in schemes.items() if own == scheme):
        same = like[_template(name)]
        alone = len(same) == 1 or any(schemes.get(other) != scheme for other in same)
        targets.add(name if alone else f"re:{_template(name)}$")
    return sorted(targets, key=natural)


def _template(name: str) -> str:
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))


def _compiled(entry: str) -> re.Pattern[str]:
    try:
        return re.compile(entry.removeprefix("re:"))
    except re.error as error:
        raise UserError(f"quantization_config: {entry} is not a regular expression: {error}") from error


def _read_group(name: str, group: Any, outer_format: Any) -> Scheme:
    where = f"quantization_config.config_groups.{name}"
    if not isinstance(group, dict) or not isinstance(group.get("targets"), list):
        raise UserError(f"{where} has no list of targets")
    weights, acts = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, dict):
        raise UserError(f"{where} has no weights")
    if group.get("output_activations"):
        raise UserError(f"{where}: quantized outputs cannot be run")
    if weights.get("dynamic"):
        raise UserError(f"{where}: dynamic weights cannot be read")
    if weights.get("actorder") in ("group", "dynamic", True):
        raise UserError(f"{where}: groups in activation order cannot be read; requantize with static groups")
    try:
        scheme = Scheme(_read_weights(weights), _read_activations(acts) if acts else None)
        expected = layout_name(scheme)
    except (UserError, KeyError, TypeError) as error:
        raise UserError(f"{where}: cannot be read: {error}") from error
    stored = group.get("format") or outer_format
    if stored != expected and not (stored == "naive-quantized" and expected in ("int-quantized", "float-quantized")):
        raise UserError(f"{where}: format {stored!r} cannot be read for {scheme}, only {expected}")
    return scheme


def _read_weights(weights: Mapping[str, Any]) -> TensorSpec:
    bits, symmetric, kind = weights.get("num_bits", 8), weights.get("symmetric", True), weights.get("type", "int")
    if not isinstance(bits, int) or not isinstance(symmetric, bool) or kind not in ("int", "float"):
        raise UserError(f"num_bits {bits!r}, symmetric {symmetric!r}, type {kind!r}")
    strategy, size = weights.get("strategy"), weights.get("group_size")
    strategy = strategy or ("channel" if size in (None, -1) else "group")
    if strategy == "tensor":
        return TensorSpec(bits, -1, symmetric, kind, scale_rows=-1)
    if strategy == "channel":
        return TensorSpec(bits, -1, symmetric, kind)
    if strategy == "block":
        if weights.get("block_structure") != [BLOCK, BLOCK]:
            raise UserError(f"block_structure {weights.get('block_structure')}, only [{BLOCK}, {BLOCK}] can be read")
        return TensorSpec(bits, BLOCK, symmetric, kind, scale_rows=BLOCK)
    if strategy not in ("group", "tensor_group") or not isinstance(size, int):
        raise UserError(f"strategy {strategy!r} with group_size {size!r}")
    scale = _read_scale(weights, strategy, kind)
    return TensorSpec(bits, size, symmetric, kind, scale)


def _read_scale(tensor: Mapping[str, Any], strategy: str, kind: str) -> Any:
    if strategy == "tensor_group":
        return "e4m3"
    return "e8m0" if kind == "float" and tensor.get("scale_dtype") == E8M0 else "float"


def _read_activations(acts: Mapping[str, Any]) -> ActivationSpec:
    bits, symmetric, kind = acts.get("num_bits", 8), acts.get("symmetric", True), acts.get("type", "int")
    strategy, size, dynamic = acts.get("strategy"), acts.get("group_size"), acts.get("dynamic", False)
    if strategy in ("token", "tensor", None):
        if (strategy == "token") != bool(dynamic):
            raise UserError(f"input_activations with strategy {strategy!r} and dynamic {dynamic!r}")
        return ActivationSpec(bits, -1, symmetric, kind, dynamic=bool(dynamic))
    if strategy not in ("group", "tensor_group") or not isinstance(size, int) or not dynamic:
        raise UserError(f"input_activations with strategy {strategy!r}, group_size {size!r}, dynamic {dynamic!r}")
    return ActivationSpec(bits, size, symmetric, kind, _read_scale(acts, strategy, kind))
