"""What TensorRT-LLM's PyTorch backend reads (its source of autumn 2026)."""

from quantkit.verification.config.other_methods import MODELOPT
from quantkit.verification.engines import shared_rules as rules
from quantkit.verification.engines.hardware import family
from quantkit.verification.findings import (
    Finding,
    error,
)
from quantkit.verification.subject import (
    DeclaredScheme,
    Subject,
)

_KNOWN = ("modelopt", "fp8", "compressed-tensors", "mxfp4", "mxfp8", "nvfp4")
_REMEDY = "export for ModelOpt (FP8, NVFP4), or use FP8 blocks"


def check(subject: Subject) -> list[Finding]:
    """Why TensorRT-LLM would refuse or misread this model."""
    if subject.method not in _KNOWN:
        message = f"TensorRT-LLM does not know quant_method {subject.method!r}"
        return [error("method", "quant_method", message, _REMEDY)]
    found = []
    if subject.method == "fp8" and subject.qc.get("weight_block_size") != [128, 128]:
        message = f"fp8 is read as blocks of 128 x 128 only, weight_block_size is {subject.qc.get('weight_block_size')}"
        found.append(error("fp8-block", "quantization_config", message, _REMEDY))
    if subject.method == "compressed-tensors":
        found += _compressed_tensors(subject)
    if subject.method == "modelopt":
        inner = subject.qc.get("quantization", subject.qc)
        algo = str(inner.get("quant_algo") or "").upper() if isinstance(inner, dict) else ""
        if algo and algo not in (*MODELOPT, "MIXED_PRECISION"):
            found.append(error("modelopt-algo", "quantization_config", f"quant_algo {algo} is unknown", _REMEDY))
    return found + rules.kv_static_fp8(subject, ("tensor",))


def _compressed_tensors(subject: Subject) -> list[Finding]:
    found = []
    for said in dict.fromkeys(subject.stated.values()):
        if not _readable(said):
            message = f"{said} is refused or misread"
            found.append(error("ct-scheme", said.where, message, _REMEDY))
    groups = subject.qc.get("config_groups")
    if isinstance(groups, dict) and len(groups) > 1:
        targets = [t for g in groups.values() if isinstance(g, dict) for t in g.get("targets") or []]
        if plain := [t for t in targets if isinstance(t, str) and "." not in t and not t.startswith("re:")]:
            message = f"with several groups the class name {plain[0]!r} is refused as a target"
            found.append(error("ct-targets", "config_groups", message, 'write "re:" patterns or full names'))
    return found


def _readable(said: DeclaredScheme) -> bool:
    weights, inputs = said.weights, said.inputs
    if weights.kind != "float":
        return False  # 8-bit channels with dynamic tokens would be taken for FP8
    if weights.bits == 8 and weights.strategy == "channel":
        return inputs is not None and inputs.strategy == "token"
    if weights.strategy == "block":
        return inputs is not None and inputs.strategy == "group" and inputs.group_size == 128
    if weights.strategy == "tensor_group":
        return weights.group_size == 16
    return family(said) == "MXFP4" and inputs is None
