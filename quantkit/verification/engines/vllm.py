"""What vLLM 0.33.0 accepts.

Read from its compressed_tensors, auto_gptq, auto_awq, fp8 and modelopt config classes; held to them by
tests/interop/test_vllm_config.py.
"""

from typing import Any

from quantkit.verification.config.other_methods import METHODS
from quantkit.verification.engines import shared_rules as rules
from quantkit.verification.engines.hardware import amx_note
from quantkit.verification.engines.vllm_schemes import ACTIVATION_FORMATS, scheme
from quantkit.verification.findings import (
    Finding,
    error,
    info,
    warning,
)
from quantkit.verification.subject import (
    DeclaredNumbers,
    DeclaredScheme,
    Subject,
    is_head,
    leaf,
    some,
)

_KNOWN = {
    *METHODS,
    *("fbgemm_fp8", "fp_quant", "humming", "experts_int8", "quark", "moe_wna16", "torchao", "inc", "auto-round"),
    *("mxfp4", "gpt_oss_mxfp4", "deepseek_v4_fp8", "mxfp8", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed"),
}
_DEPRECATED = ("fbgemm_fp8", "fp_quant")
_PLUGIN = {"bitsandbytes": "vllm-bnb-plugin", "gguf": "vllm-gguf-plugin"}
_MODELOPT = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "MXFP8", "MIXED_PRECISION")
MARLIN_GROUPS = (-1, 32, 64, 128)


def check(subject: Subject) -> list[Finding]:
    """Why vLLM would refuse this model, or run it worse than it could."""
    if subject.method in _PLUGIN:
        message = f"vLLM 0.33 reads {subject.method} only with the plugin {_PLUGIN[subject.method]}"
        return [error("method", "quant_method", message, f"install {_PLUGIN[subject.method]}, or use another format")]
    if subject.method not in _KNOWN:
        message = f"vLLM 0.33 has no quantization method {subject.method!r}"
        return [error("method", "quant_method", message, f"convert to one of {', '.join(METHODS)}")]
    if subject.method in _DEPRECATED:
        message = f"vLLM 0.33 reads {subject.method} only with --allow-deprecated-quantization"
        return [warning("method-deprecated", "quant_method", message, "convert to compressed-tensors FP8")]
    check_method = {
        "compressed-tensors": _compressed_tensors,
        "gptq": _gptq,
        "awq": _awq,
        "modelopt": _modelopt,
        "fp8": _fp8,
    }.get(subject.method)
    found = check_method(subject) if check_method else []
    return found + rules.transposed(subject) + rules.kv_static_fp8(subject, ("tensor", "attn_head"))


def _compressed_tensors(subject: Subject) -> list[Finding]:
    qc, found = subject.qc, []
    if qc.get("quantization_status") not in ("compressed", "frozen"):
        message = "quantization_status is not 'compressed': transformers would load random weights (vLLM does not mind)"
        found.append(warning("ct-status", "quantization_config", message, 'write "quantization_status": "compressed"'))
    sparsity = qc.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("targets"):
        message = "sparse weights were dropped from vLLM"
        found.append(
            error("ct-sparsity", "sparsity_config", message, "store the weights dense; write no sparsity_config")
        )
    found += _transforms(subject)
    refused = _refused_groups(qc)
    for said in _distinct(subject):
        if reason := _refusal(said):
            refused.setdefault(said.where, reason)
    for where, reason in refused.items():
        found.append(error("ct-scheme", where, reason, "use a scheme vLLM has: see the presets of quantkit"))
    wrong = {
        name: f"{N} x {K}: 4-bit weights with FP8 inputs need both to be multiples of 128"
        for name, (said, (N, K)) in subject.quantized.items()
        if scheme(said) == "W4A8-FP8" and (N % 128 or K % 128)
    }
    found += [error("w4a8-shape", some(n), text, "leave these layers unquantized") for text, n in rules.grouped(wrong)]
    dtype = str(subject.model.get("dtype", subject.model.get("torch_dtype"))).removeprefix("torch.")
    if dtype == "float16" and any(scheme(said) == "W4A8-FP8" for said in _distinct(subject)):
        message = "4-bit weights with FP8 inputs run in bfloat16 only"
        found.append(warning("w4a8-dtype", "config.json", message, "pass --dtype bfloat16"))
    found += _embeddings(subject)
    return found + rules.blocks(subject)


def _refused_groups(qc: dict[str, Any]) -> dict[str, str]:
    """Groups that vLLM's parser refuses, whether they match a module or not."""
    refused = {}
    groups = qc.get("config_groups")
    for name, raw in groups.items() if isinstance(groups, dict) else ():
        weights = raw.get("weights") if isinstance(raw, dict) else None
        if not isinstance(weights, dict):
            continue
        if weights.get("actorder") is True or str(weights.get("actorder")).lower() in ("group", "dynamic"):
            refused[f"config_groups.{name}"] = (
                "columns reordered at run time (actorder 'group') are no longer supported"
            )
        if raw.get("input_activations"):
            continue
        layout = raw.get("format") if raw.get("format") is not None else qc.get("format")
        if layout in ACTIVATION_FORMATS and str(weights.get("type", "int")).lower() == "int":
            refused[f"config_groups.{name}"] = f"{layout} integers come with input_activations; pack-quantized do not"
    return refused


def _embeddings(subject: Subject) -> list[Finding]:
    """Rows are gathered from symmetric weight-only integers; nothing else of an embedding is read."""
    wrong = [
        name
        for name, (said, _) in subject.quantized.items()
        if "embed" in leaf(name)
        and not is_head(name)
        and not (scheme(said) == "WNA16" and said.weights.symmetric and said.weights.kind == "int")
    ]
    message = "vLLM reads only symmetric weight-only integers (pack-quantized) of an embedding"
    return [error("embedding", some(wrong), message, "leave the embedding unquantized")] if wrong else []


def _distinct(subject: Subject) -> list[DeclaredScheme]:
    return list(dict.fromkeys(subject.stated.values()))


def _transforms(subject: Subject) -> list[Finding]:
    raw = subject.qc.get("transform_config")
    groups = raw.get("config_groups") if isinstance(raw, dict) else None
    if not groups:
        return []
    message = "vLLM runs only Hadamard transforms of inputs and outputs; others must be folded into the weights"
    return [warning("ct-transform", "transform_config", message, "fold the rotation; write no transform_config")]


def _refusal(said: DeclaredScheme) -> str | None:
    weights, inputs = said.weights, said.inputs
    name = scheme(said)
    if name is None:
        return f"vLLM has no scheme for {said}"
    if name == "W4A8-FP8" and weights.group_size != 128:
        return f"4-bit weights with FP8 inputs need groups of 128, not {weights.group_size}"
    if name.startswith("WNA") and not 2 <= weights.bits <= 8:
        return f"{weights.bits}-bit integers are not supported"
    if name == "FP8" and weights.strategy == "block" and inputs and not inputs.dynamic:
        return "block scales go with dynamic inputs only"
    return None


def _gptq(subject: Subject) -> list[Finding]:
    qc, found = subject.qc, []
    size = qc.get("group_size")
    rules_of = qc.get("dynamic") if isinstance(qc.get("dynamic"), dict) else {}
    positive = [r for p, r in (rules_of or {}).items() if isinstance(r, dict) and not p.startswith("-:")]
    reordered = any(r.get("desc_act", qc.get("desc_act")) and r.get("group_size", size) != -1 for r in positive)
    if reordered or (qc.get("desc_act") and size != -1):
        message = "desc_act: true (columns reordered at run time) is no longer supported"
        found.append(
            error("gptq-desc-act", "quantization_config", message, "quantize with static groups and desc_act: false")
        )
    for said in _distinct(subject) or _stated_default(qc):
        if said.weights.bits not in (4, 8) or not said.weights.symmetric:
            message = f"vLLM reads GPTQ of 4 and 8 bits, symmetric; this is {said.weights}"
            found.append(
                error("gptq-type", "quantization_config", message, "write compressed-tensors pack-quantized instead")
            )
        if said.weights.group_size not in MARLIN_GROUPS:
            message = f"group_size {said.weights.group_size} is none of Marlin's {MARLIN_GROUPS}, its only GPTQ kernel"
            found.append(error("gptq-group", "quantization_config", message, "quantize with groups of 32, 64 or 128"))
    return found


def _stated_default(qc: dict[str, Any]) -> list[DeclaredScheme]:
    """The scheme of the config itself, where no module is known to have it."""
    bits, size, symmetric = qc.get("bits"), qc.get("group_size"), qc.get("sym")
    if type(bits) is int and type(size) is int and isinstance(symmetric, bool):
        return [
            DeclaredScheme("gptq", DeclaredNumbers(bits, "int", symmetric, "channel" if size == -1 else "group", size))
        ]
    return []


def _awq(subject: Subject) -> list[Finding]:
    qc, found = subject.qc, []
    bits = qc.get("bits", qc.get("w_bit"))
    if bits != 4 and isinstance(bits, int):
        message = f"vLLM reads AWQ of 4 bits only, not {bits}"
        found.append(error("awq-bits", "quantization_config", message, "write compressed-tensors W8A16 instead"))
    version = str(qc.get("version", "gemm")).lower()
    if version != "gemm":
        message = f"the {version} layout is taken for gemm, so its tensors do not fit"
        found.append(error("awq-version", "quantization_config", message, "convert to version gemm"))
    size = qc.get("group_size", qc.get("q_group_size"))
    if isinstance(size, int) and size not in MARLIN_GROUPS:
        message = f"group_size {size} is not on Marlin's list {MARLIN_GROUPS}: a slower kernel runs"
        found.append(warning("kernel-slow", "quantization_config", message, "quantize with groups of 32, 64 or 128"))
    return found


def _fp8(subject: Subject) -> list[Finding]:
    qc = subject.qc
    found = []
    if qc.get("weight_block_size") is not None and qc.get("activation_scheme") == "static":
        message = "block scales go with dynamic inputs only"
        found.append(error("fp8-activation", "quantization_config", message, "write activation_scheme: dynamic"))
    return found + rules.blocks(subject)


def _modelopt(subject: Subject) -> list[Finding]:
    qc, found = subject.qc, []
    inner = qc.get("quantization", qc)
    inner = inner if isinstance(inner, dict) else {}
    algo = str(inner.get("quant_algo") or "").upper()
    if algo and algo not in _MODELOPT:
        message = f"vLLM does not read ModelOpt's {algo}"
        found.append(error("modelopt-algo", "quantization_config", message, f"use one of {', '.join(_MODELOPT)}"))
    needed = {"NVFP4": ("group_size", "kv_cache_quant_algo", "exclude_modules")}
    needed |= {"W4A16_NVFP4": needed["NVFP4"], "MXFP8": ("kv_cache_quant_algo", "exclude_modules")}
    missing = [key for key in needed.get(algo, ()) if key not in inner] if "quantization" in qc else []
    if missing:
        message = f"vLLM needs {', '.join(missing)} in the file for {algo}"
        found.append(error("modelopt-keys", "hf_quant_config.json", message, "write them, null where there is none"))
    if subject.head in subject.stated and subject.head not in subject.shapes:
        message = f"{subject.head} is not excluded, so vLLM expects it quantized"
        found.append(error("head", subject.head, message, "add lm_head to exclude_modules (inline: ignore)"))
    wrong = {
        name: f"{K} input features are not whole blocks of 128"
        for name, (said, (_, K)) in subject.quantized.items()
        if said.layout == "modelopt-fp8-block" and K % 128
    }
    found += [error("group-divides", some(n), text, "exclude these layers") for text, n in rules.grouped(wrong)]
    return found


def notes(subject: Subject) -> list[Finding]:
    """What vLLM does without being asked."""
    found = amx_note(subject)
    if rules.kv_scheme(subject) and subject.method == "compressed-tensors":
        message = "vLLM keeps the KV cache in fp8 because of kv_cache_scheme"
        found.append(info("kv-auto", "kv_cache_scheme", message, "pass --kv-cache-dtype bfloat16 to keep it wide"))
    return found
