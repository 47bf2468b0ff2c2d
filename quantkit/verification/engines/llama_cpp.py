"""What llama.cpp's converter from Hugging Face folders reads (of October 2026)."""

from quantkit.verification.engines.shared_rules import conv1d
from quantkit.verification.findings import (
    Finding,
    error,
    warning,
)
from quantkit.verification.subject import (
    Subject,
    some,
)

_REMEDY = "write a GGUF from the unquantized model instead"


def check(subject: Subject) -> list[Finding]:
    """Why the converter would refuse this folder."""
    if subject.method not in ("compressed-tensors", "gptq", "fp8", "modelopt", "mxfp4"):
        return [error("method", "quant_method", f"the converter does not read {subject.method!r}", _REMEDY)]
    found = []
    kinds = dict.fromkeys(subject.stated.values())
    for said in kinds:
        weights = said.weights
        if subject.method == "compressed-tensors":
            if said.layout == "pack-quantized" and weights.strategy != "group":
                found.append(error("ct-scheme", said.where, "packed weights are read with groups only", _REMEDY))
            elif said.layout not in (
                *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized"),
            ):
                found.append(error("ct-scheme", said.where, f"the format {said.layout} is not read", _REMEDY))
            elif said.layout.endswith("-quantized") and weights.strategy not in (
                *("group", "channel", "block", "tensor_group"),
            ):
                message = f"{said.layout} is read per channel or block, not per {weights.strategy}"
                found.append(error("ct-scheme", said.where, message, _REMEDY))
        if subject.method == "gptq" and weights.bits not in (2, 4, 8):
            found.append(error("gptq-type", "quantization_config", f"{weights.bits}-bit GPTQ is not read", _REMEDY))
        if subject.method == "fp8" and weights.block is None:
            found.append(error("fp8-block", "quantization_config", "fp8 is read in blocks only", _REMEDY))
        if subject.method == "modelopt" and said.layout != "modelopt-nvfp4":
            found.append(error("modelopt-algo", "quantization_config", "of ModelOpt only NVFP4 is read", _REMEDY))
    groups = subject.qc.get("config_groups")
    if subject.method == "compressed-tensors" and isinstance(groups, dict) and len(groups) > 1:
        found.append(error("ct-groups", "config_groups", "the converter reads a single config group", _REMEDY))
    if wrong := conv1d(subject):
        message = "the converter transposes Conv1D weights, but quantized ones are stored [out, in] already"
        found.append(error("conv1d-transposed", some(wrong), message, _REMEDY))
    if subject.qc.get("kv_cache_scheme"):
        message = "the converter drops the scales of the KV cache"
        found.append(warning("kv-dropped", "kv_cache_scheme", message, "choose the cache's type when llama.cpp runs"))
    return found
