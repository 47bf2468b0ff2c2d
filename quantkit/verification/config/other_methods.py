"""What quantization_config says of each module, for every quant_method but compressed-tensors (see ctconfig).

Raw JSON in, findings for whatever does not parse.
"""

import re
from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

from quantkit.verification.config import compressed_tensors as ctconfig
from quantkit.verification.findings import (
    Finding,
    error,
    warning,
)
from quantkit.verification.subject import (
    DeclaredNumbers,
    DeclaredScheme,
    Shape,
    Subject,
    fused_name,
    is_head,
    leaf,
)

METHODS = ("compressed-tensors", "awq", "gptq", "fp8", "modelopt")
_FP8_TENSOR, _FP8_CHANNEL = (DeclaredNumbers(8, "float", strategy=strategy) for strategy in ("tensor", "channel"))
_FP8_TOKEN, _FP8_STATIC = DeclaredNumbers(8, "float", strategy="token", dynamic=True), _FP8_TENSOR
_NVFP4 = DeclaredNumbers(4, "float", strategy="tensor_group", group_size=16, scale_dtype="float8_e4m3fn")
_NVFP4_INPUT = DeclaredNumbers(4, "float", strategy="tensor_group", group_size=16, dynamic="local")
_MXFP8 = DeclaredNumbers(8, "float", strategy="group", group_size=32, scale_dtype="uint8")
_MXFP8_INPUT = DeclaredNumbers(8, "float", strategy="group", group_size=32, dynamic=True, scale_dtype="uint8")
MODELOPT = {
    "FP8": DeclaredScheme("modelopt-fp8", _FP8_TENSOR, _FP8_STATIC),
    "FP8_PER_CHANNEL_PER_TOKEN": DeclaredScheme("modelopt-fp8-channel", _FP8_CHANNEL, _FP8_TOKEN),
    "FP8_PB_WO": DeclaredScheme("modelopt-fp8-block", DeclaredNumbers(8, "float", strategy="block", block=(128, 128))),
    "NVFP4": DeclaredScheme("modelopt-nvfp4", _NVFP4, _NVFP4_INPUT),
    "W4A16_NVFP4": DeclaredScheme("modelopt-nvfp4", _NVFP4),
    "MXFP8": DeclaredScheme("modelopt-mxfp8", _MXFP8, _MXFP8_INPUT),
    "W4A16_AWQ": DeclaredScheme("modelopt-awq", DeclaredNumbers(4, "int", strategy="group", group_size=128)),
    "W4A8_AWQ": DeclaredScheme(
        "modelopt-awq", DeclaredNumbers(4, "int", strategy="group", group_size=128), _FP8_STATIC
    ),
}


def make_subject(
    qc: dict[str, Any],
    shapes: Mapping[str, Shape],
    linears: Mapping[str, Shape],
    model: dict[str, Any],
    engine: str,
    tp: int,
) -> Subject:
    """The subject of the rules with everything the config states of its modules."""
    method = str(qc.get("quant_method", "modelopt" if "quantization" in qc or "quant_algo" in qc else "")).lower()
    method = {"compressed_tensors": "compressed-tensors"}.get(method, method)
    method = "modelopt" if method.startswith("modelopt") else method
    subject = Subject(qc, method, model, shapes, linears, engine, tp)
    reader = {
        "compressed-tensors": ctconfig.state,
        "awq": _awq,
        "gptq": _gptq,
        "fp8": _fp8,
        "modelopt": _modelopt,
    }.get(method)
    if reader is not None:
        reader(subject)
    return subject


def _integer(subject: Subject, names: tuple[str, ...], config: Mapping[str, Any] | None = None) -> int | None:
    """The first of these keys as a whole number; a finding where there is none."""
    config = subject.qc if config is None else config
    value = next((config[name] for name in names if name in config), None)
    if type(value) is int:
        return value
    message = f"{names[0]} is {value!r}" if value is not None else f"there is no {names[0]}"
    rule = f"{subject.method}-keys"
    subject.problems.append(error(rule, "quantization_config", message, f"write {names[0]} as a whole number"))
    return None


def _flag(subject: Subject, name: str) -> bool | None:
    value = subject.qc.get(name)
    if isinstance(value, bool):
        return value
    message = f"{name} is {value!r}" if name in subject.qc else f"there is no {name}, which engines require"
    rule = f"{subject.method}-keys"
    subject.problems.append(error(rule, "quantization_config", message, f"write {name} as true or false"))
    return None


def _names(subject: Subject, config: Mapping[str, Any], *keys: str) -> list[str]:
    raw = next((config[key] for key in keys if config.get(key)), [])
    if isinstance(raw, list) and all(isinstance(entry, str) for entry in raw):
        return raw
    message, remedy = f"{keys[0]} is {raw!r}, not a list of names", "write a list of module names"
    subject.problems.append(error(f"{subject.method}-keys", "quantization_config", message, remedy))
    return []


def _weights(bits: int, symmetric: bool, group_size: int) -> DeclaredNumbers:
    strategy = "channel" if group_size == -1 else "group"
    return DeclaredNumbers(bits, "int", symmetric, strategy, group_size)


def _awq(subject: Subject) -> None:
    """modules_to_not_convert holds parts of names; where it is empty engines go by the tensors' dtypes."""
    bits = _integer(subject, ("bits", "w_bit"))
    group_size = _integer(subject, ("group_size", "q_group_size"))
    zero_point = _flag(subject, "zero_point")
    skipped = _names(subject, subject.qc, "modules_to_not_convert")
    if bits is None or group_size is None or zero_point is None:
        return
    said = DeclaredScheme("awq", _weights(bits, not zero_point, group_size))
    for name in {*subject.linears, *subject.shapes} if skipped else subject.shapes:
        of_head = is_head(name) and not subject.qc.get("lm_head")
        if not of_head and not any(part in name for part in skipped):
            subject.stated[name] = said


def _gptq(subject: Subject) -> None:
    bits, group_size = _integer(subject, ("bits",)), _integer(subject, ("group_size",))
    symmetric, _ = _flag(subject, "sym"), _flag(subject, "desc_act")
    if bits is None or group_size is None or symmetric is None:
        return
    dynamic = subject.qc.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        subject.problems.append(
            error("gptq-dynamic", "dynamic", f"is {type(dynamic).__name__}, not an object", "write {regex: overrides}")
        )
        dynamic = {}
    inside = subject.qc.get("modules_in_block_to_quantize") or []
    if not isinstance(inside, list):
        message = f"modules_in_block_to_quantize is {inside!r}, not a list of names"
        subject.problems.append(error("gptq-keys", "quantization_config", message, "write a list of module names"))
        inside = []
    parts = [part for entry in inside for part in (entry if isinstance(entry, list) else [entry])]
    for name in {*subject.linears, *subject.shapes} if parts else subject.shapes:
        if (is_head(name) and not subject.qc.get("lm_head")) or (
            parts and not any(str(part) in name for part in parts)
        ):
            continue
        rule = gptq_override(subject, dynamic, name)
        if rule is None:
            continue
        values = (rule.get("bits", bits), rule.get("group_size", group_size), rule.get("sym", symmetric))
        if type(values[0]) is int and type(values[1]) is int:
            subject.stated[name] = DeclaredScheme("gptq", _weights(values[0], bool(values[2]), values[1]))


def gptq_override(subject: Subject, dynamic: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """What `dynamic` overrides for a module; None: it stays dense. The first regex that matches decides."""
    for pattern, override in dynamic.items():
        regex = pattern[2:] if pattern[:2] in ("-:", "+:") else pattern
        try:
            hit = re.match(regex, name)
        except re.error as problem:
            finding = error("gptq-dynamic", "dynamic", f"{pattern!r} is not a regex: {problem}", "fix the pattern")
            if finding not in subject.problems:
                subject.problems.append(finding)
            continue
        if hit:
            return None if pattern.startswith("-:") else override if isinstance(override, dict) else {}
    return {}


def _fp8(subject: Subject) -> None:
    qc = subject.qc
    scheme = qc.get("activation_scheme", "dynamic" if subject.engine == "transformers" else None)
    if scheme not in ("static", "dynamic"):
        message = f"activation_scheme is {scheme!r}" if scheme else "there is no activation_scheme"
        subject.problems.append(
            error("fp8-activation", "quantization_config", message, "write 'static' or 'dynamic', whichever is stored")
        )
    absent = [128, 128] if subject.engine == "transformers" else None
    block = qc.get("weight_block_size", absent)
    pair = None
    if block is not None:
        if not isinstance(block, list | tuple) or len(block) != 2 or not all(type(s) is int and s > 0 for s in block):
            message = f"weight_block_size is {block!r}, not two sizes"
            subject.problems.append(error("fp8-block", "quantization_config", message, "write [128, 128] or null"))
            return
        pair = (block[0], block[1])
    inputs = _FP8_STATIC if scheme == "static" else _FP8_TOKEN
    weights = DeclaredNumbers(8, "float", strategy="block" if pair else "tensor", block=pair)
    said = DeclaredScheme("fp8-block" if pair else "fp8", weights, inputs)
    skipped = _names(subject, qc, "ignored_layers", "modules_to_not_convert")
    for name in {*subject.linears, *subject.shapes}:
        if not is_head(name) and not _skipped_fp8(subject, name, skipped):
            subject.stated[name] = said


def _skipped_fp8(subject: Subject, name: str, skipped: list[str]) -> bool:
    names = {name, fused_name(name) or name}
    if subject.engine in ("vllm", "tensorrt-llm"):
        return any(each in skipped for each in names)
    return any(name.endswith(entry) or f"{name}.".startswith(f"{entry}.") for entry in skipped) or bool(
        names & set(skipped)
    )


def _modelopt(subject: Subject) -> None:
    inner = subject.qc.get("quantization", subject.qc)
    if not isinstance(inner, dict):
        message = f"quantization is {type(inner).__name__}, not an object"
        subject.problems.append(error("modelopt-algo", "hf_quant_config.json", message, "export it again"))
        return
    algo = str(inner.get("quant_algo") or "").upper()
    keys = ("exclude_modules",) if "quantization" in subject.qc else ("ignore",)
    excluded = _names(subject, inner, *keys)
    per_layer = inner.get("quantized_layers") or {}
    if algo == "MIXED_PRECISION" and not (isinstance(per_layer, dict) and per_layer):
        subject.problems.append(
            error("modelopt-mixed", "quantization_config", "MIXED_PRECISION needs quantized_layers", "list the layers")
        )
        return
    if algo not in MODELOPT and algo != "MIXED_PRECISION":
        message = f"quant_algo is {algo!r}" if algo else "there is no quant_algo"
        remedy = f"use one of {', '.join(MODELOPT)} or MIXED_PRECISION"
        subject.problems.append(error("modelopt-algo", "quantization_config", message, remedy))
        return
    for name in {*subject.linears, *subject.shapes, subject.head}:
        one = algo
        if algo == "MIXED_PRECISION":
            entry = per_layer.get(name)
            one = str(entry.get("quant_algo", "")).upper() if isinstance(entry, dict) else ""
        elif _excluded(name, excluded):
            continue
        if one in MODELOPT:
            subject.stated[name] = MODELOPT[one]
        elif one:
            subject.problems.append(
                error("modelopt-algo", name, f"quant_algo is {one!r}", f"use one of {', '.join(MODELOPT)}")
            )


def _excluded(name: str, patterns: list[str]) -> bool:
    names = {name, fused_name(name) or name}
    return any(each == p or p in each or fnmatch(each, p) for each in names for p in patterns)


def agreement(subject: Subject) -> list[Finding]:
    """Modules stated as quantized that are stored dense, and the other way round."""
    found: list[Finding] = []
    missing = sorted(subject.stated.keys() - subject.shapes.keys() - {subject.head})
    missing = [name for name in missing if name in subject.linears]
    if missing:
        router = all(leaf(name) in ("gate", "router", "shared_expert_gate") for name in missing)
        make = warning if router and subject.engine == "transformers" else error
        found.append(
            make(
                "missing-packed",
                missing[0],
                f"{len(missing)} modules are stored unquantized although the config calls them quantized",
                "name them in the config's ignore list, or store them quantized",
            )
        )
    if not subject.stated and subject.problems:
        return found
    if untargeted := sorted(subject.shapes.keys() - subject.stated.keys()):
        found.append(
            error(
                "untargeted",
                untargeted[0],
                f"{len(untargeted)} modules are stored quantized but nothing in the config says so",
                "let a config group target them and take them off the ignore list",
            )
        )
    return found
