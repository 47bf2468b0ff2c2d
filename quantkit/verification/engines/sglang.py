"""What SGLang 0.5.23 accepts, by its source: compressed-tensors 0.18, the Marlin kernels, FP8 and ModelOpt."""

from quantkit.verification.engines import shared_rules as rules
from quantkit.verification.engines.hardware import family
from quantkit.verification.findings import (
    Finding,
    error,
    warning,
)
from quantkit.verification.subject import (
    Subject,
    some,
)

_KNOWN = {
    *("compressed-tensors", "awq", "gptq", "fp8", "modelopt", "bitsandbytes", "gguf", "quark", "auto-round"),
    *("mxfp4", "mxfp8", "w8a8_int8", "w8a8_fp8"),
}
_SCHEMES = {"W4A16", "W8A16", "INT8", "FP8", "FP8 dynamic", "FP8 block", "NVFP4", "NVFP4A16"}
_MODELOPT = ("FP8", "NVFP4")


def check(subject: Subject) -> list[Finding]:
    """Why SGLang would refuse this model."""
    if subject.method not in _KNOWN:
        message = f"SGLang has no quantization method {subject.method!r}"
        return [error("method", "quant_method", message, "convert to compressed-tensors, awq, gptq or fp8")]
    check_method = {
        "compressed-tensors": _compressed_tensors,
        "gptq": _gptq,
        "awq": _awq,
        "modelopt": _modelopt,
        "fp8": lambda subject: rules.blocks(subject),
    }.get(subject.method)
    found = check_method(subject) if check_method else []
    return found + rules.transposed(subject) + rules.kv_static_fp8(subject, ("tensor",))


def _compressed_tensors(subject: Subject) -> list[Finding]:
    found = []
    if subject.qc.get("quantization_status") not in ("compressed", "frozen"):
        message = "quantization_status is not 'compressed': transformers would load random weights"
        found.append(warning("ct-status", "quantization_config", message, 'write "quantization_status": "compressed"'))
    for said in dict.fromkeys(subject.stated.values()):
        kind = family(said)
        packed = said.layout == "pack-quantized"
        if kind not in _SCHEMES or (said.inputs is None and packed and said.weights.bits not in (4, 8)):
            message = f"SGLang has no scheme for {said}: no integers under 4 bits, no MXFP4 or MXFP8 of dense layers"
            remedy = "use W4A16, W8A16, W8A8, FP8 or NVFP4"
            found.append(error("ct-scheme", said.where, message, remedy))
        if said.weights.actorder == "group":
            message = "actorder 'group' is on its way out: compressed-tensors 0.18 warns"
            found.append(warning("ct-actorder", said.where, message, "quantize with static groups, omit actorder"))
    sparsity = subject.qc.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("targets"):
        message = "compressed-tensors dropped sparse weights"
        found.append(
            error("ct-sparsity", "sparsity_config", message, "store the weights dense; write no sparsity_config")
        )
    return found + rules.blocks(subject)


def _gptq(subject: Subject) -> list[Finding]:
    found = []
    for said in dict.fromkeys(subject.stated.values()):
        if said.weights.bits not in (4, 8) or not said.weights.symmetric:
            message = f"only the Marlin kernel is left: 4 or 8 bits, symmetric; this is {said.weights}"
            found.append(error("gptq-type", "quantization_config", message, "write compressed-tensors instead"))
    return found


def _awq(subject: Subject) -> list[Finding]:
    found = []
    bits = subject.qc.get("bits", subject.qc.get("w_bit"))
    if isinstance(bits, int) and bits not in (4, 8):
        message = f"AWQ has 4 bits, with Marlin 8, not {bits}"
        found.append(error("awq-bits", "quantization_config", message, "write compressed-tensors instead"))
    if absent := [key for key in ("bits", "group_size", "zero_point") if key not in subject.qc]:
        message = f"the Marlin kernel is found only by the keys bits, group_size, zero_point; {absent[0]} is absent"
        found.append(warning("awq-keys", "quantization_config", message, "write these keys"))
    version = str(subject.qc.get("version", "gemm")).lower()
    if version != "gemm":
        message = f"the {version} layout is taken for gemm, so its tensors do not fit"
        found.append(error("awq-version", "quantization_config", message, "convert to version gemm"))
    return found


def _modelopt(subject: Subject) -> list[Finding]:
    found = []
    inner = subject.qc.get("quantization", subject.qc)
    algo = str(inner.get("quant_algo") or "").upper() if isinstance(inner, dict) else ""
    if algo and algo not in _MODELOPT:
        message = f"SGLang reads ModelOpt's {' and '.join(_MODELOPT)}, not {algo}"
        found.append(error("modelopt-algo", "quantization_config", message, "export one of these"))
    if subject.head in subject.stated and subject.head not in subject.shapes:
        message = f"{some([subject.head])} is not excluded"
        found.append(error("head", subject.head, message, "add lm_head to exclude_modules (inline: ignore)"))
    return found
