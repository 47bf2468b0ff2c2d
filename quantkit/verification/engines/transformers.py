"""What transformers 5.24 loads, with compressed-tensors 0.20: above all what it loads wrongly without a word."""

import re

from quantkit.verification.config.compressed_tensors import GROUP_KEYS
from quantkit.verification.engines.shared_rules import conv1d, kv_scheme
from quantkit.verification.findings import (
    Finding,
    error,
    info,
    warning,
)
from quantkit.verification.subject import (
    Subject,
    leaf,
    some,
)

_LAYER_AND_EXPERT = re.compile(r"\.\d+\..*\.\d+(\.|$)")  # the numbers of a layer and of an expert of it
_KNOWN = {
    *("compressed-tensors", "awq", "gptq", "fp8", "bitsandbytes", "torchao", "mxfp4", "gguf", "quark", "auto-round"),
    *("hqq", "aqlm", "vptq", "spqr", "eetq", "higgs", "bitnet", "fbgemm_fp8", "fp_quant", "mxfp8", "quanto"),
}


# _init_weights of these types reads `weight` of layers (by last name; None: of all but the head), even of layers that
# are loaded; packed layers have none and transformers 5.24 raises AttributeError. Each was seen in a run of it.
_READS_WEIGHT: dict[str, tuple[str, ...] | None] = {
    "falcon": None,
    "falcon_mamba": ("out_proj",),
    "gpt_bigcode": ("c_proj",),
    "mamba": ("out_proj",),
    "mamba2": ("out_proj",),
    "nanochat": ("o_proj",),
    "recurrent_gemma": None,
}


# Types whose experts transformers 5.24 reads from one tensor per layer only: of a folder with one tensor per expert it
# leaves them random, with a warning. Each was seen in a run of it.
_EXPERTS_TOGETHER = {
    *("aria_text", "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "inkling_text"),
    *("jetmoe", "minimax_m3_vl_text", "openai_privacy_filter"),
}


def check(subject: Subject) -> list[Finding]:
    """Why transformers would refuse this model or load wrong weights."""
    if subject.method == "modelopt":
        message = "transformers has no reader of ModelOpt checkpoints"
        return [error("method", "quant_method", message, "convert to compressed-tensors")]
    if subject.method not in _KNOWN:
        message = f"transformers has no quantization method {subject.method!r}"
        return [error("method", "quant_method", message, "convert to compressed-tensors")]
    check_method = {"compressed-tensors": _compressed_tensors, "gptq": _gptq, "awq": _awq, "fp8": _fp8}.get(
        subject.method
    )
    found = check_method(subject) if check_method else []
    return found + _conv1d(subject) + _without_weight(subject) + _experts_together(subject)


def _experts_together(subject: Subject) -> list[Finding]:
    """Experts stored one by one, of types whose experts are loaded together only."""
    if not subject.model_types & _EXPERTS_TOGETHER:
        return []
    wrong = [name for name in sorted(subject.shapes) if _LAYER_AND_EXPERT.search(name)]
    if not wrong:
        return []
    kind = "/".join(sorted(subject.model_types & _EXPERTS_TOGETHER))
    message = f"transformers loads the experts of {kind} from one tensor per layer: these would stay random"
    remedy = "load it with vLLM or quantkit.load, or leave the experts unquantized"
    return [error("experts", some(wrong), message, remedy)]


def _conv1d(subject: Subject) -> list[Finding]:
    """Only GPTQ's reader replaces Conv1D layers; the others leave them dense and [in, out]."""
    names = conv1d(subject) if subject.method != "gptq" else []
    if not names:
        return []
    stored = subject.stated[names[0]].keeps_weight
    effect = "the stored [out, in] weight does not fit" if stored else "they keep random weights, with a warning only"
    message = f"Conv1D layers are not replaced by quantized ones when {subject.method} is loaded: {effect}"
    remedy = "load it with vLLM or quantkit.load, or quantize with format gptq"
    return [error("conv1d", some(names), message, remedy)]


def _without_weight(subject: Subject) -> list[Finding]:
    """compressed-tensors' packed layers are torch Linears without `weight`, which some types' _init_weights reads."""
    if subject.method != "compressed-tensors":
        return []
    wrong = []
    for kind in sorted(subject.model_types & _READS_WEIGHT.keys()):
        lasts = _READS_WEIGHT[kind]
        wrong += [
            name
            for name, (said, _) in sorted(subject.quantized.items())
            if not said.keeps_weight and (leaf(name) in lasts if lasts else name != subject.head)
        ]
    if not wrong:
        return []
    kind = "/".join(sorted(subject.model_types))
    message = f"_init_weights of {kind} reads the weight of packed layers, which have none: AttributeError"
    remedy = "use FP8 or W8A8 (stored as weight), leave these layers unquantized, or load with vLLM or quantkit.load"
    return [error("init-weights", some(wrong), message, remedy)]


def _compressed_tensors(subject: Subject) -> list[Finding]:
    qc, found = subject.qc, []
    status = qc.get("quantization_status")
    if status not in ("compressed", "frozen"):
        message = f"quantization_status is {status!r}: dense layers with random weights are built, without an error"
        found.append(error("ct-status", "quantization_config", message, 'write "quantization_status": "compressed"'))
    if subject.head in subject.stated and subject.head not in subject.shapes:
        head = subject.head_module
        message = f"{head} is not ignored: it becomes an empty quantized layer and all logits are NaN"
        found.append(error("head", "ignore", message, f'add "{head}" to ignore'))
    raw_groups = qc.get("config_groups")
    for name, raw in raw_groups.items() if isinstance(raw_groups, dict) else ():
        if isinstance(raw, dict) and (extra := sorted(raw.keys() - GROUP_KEYS)):
            message = f"the unknown field {extra[0]!r} is refused inside a group"
            found.append(error("ct-unknown-key", f"config_groups.{name}", message, f"drop {extra[0]}"))
        if isinstance(raw, dict) and raw.get("format") == "mixed-precision":
            message = "a group cannot have the format mixed-precision"
            found.append(error("ct-format", f"config_groups.{name}", message, "name the group's own format"))
    for said in dict.fromkeys(subject.groups):
        if said.layout == "none":
            message = "without a format the weights are looked for as dense ones"
            found.append(error("ct-format", said.where, message, "state format in the group"))
        if said.weights.actorder == "group":
            message = "actorder 'group' is refused since compressed-tensors 0.20"
            found.append(error("ct-actorder", said.where, message, "quantize with static groups, omit actorder"))
        for numbers in (said.inputs, said.outputs):
            if numbers and (numbers.actorder or numbers.strategy in ("channel", "block")):
                message = f"inputs cannot have strategy {numbers.strategy} or an actorder"
                found.append(error("ct-scheme", said.where, message, "use strategy token or tensor"))
        if said.layout.startswith("mxfp6"):
            message = "mxfp6 came after compressed-tensors 0.17, so vLLM 0.33 cannot read it"
            found.append(warning("ct-newer", said.where, message, "use MXFP4 or MXFP8 for vLLM"))
        if said.layout == "pack-quantized" and not said.weights.symmetric:
            message = "transformers 5.24 with compressed-tensors 0.20 refuses packed zero points (size mismatch)"
            remedy = "load with CompressedTensorsConfig(dequantize=True); the file itself is right"
            found.append(warning("ct-asymmetric", said.where, message, remedy))
        if said.layout == "pack-quantized" and said.weights.bits in (3, 5, 6, 7):
            message = f"compressed-tensors before 0.18 unpacks {said.weights.bits}-bit words differently"
            found.append(warning("ct-bits", said.where, message, "install compressed-tensors 0.18 or later"))
    transform = qc.get("transform_config")
    if isinstance(transform, dict) and transform.get("config_groups"):
        message = "transformers ignores transform_config: weights that need a transform at run time come out wrong"
        found.append(error("ct-transform", "transform_config", message, "fold the rotation; write no transform_config"))
    if kv_scheme(subject):
        message = "compressed-tensors 0.20 finds no attention in transformers 5.24: the cache stays unquantized"
        remedy = "load with vLLM or quantkit.load for a quantized cache; the weights load right"
        found.append(warning("kv-ignored", "kv_cache_scheme", message, remedy))
    return [*found, info("needs", "", "compressed-tensors 0.15 or later is needed", "pip install compressed-tensors")]


def _gptq(subject: Subject) -> list[Finding]:
    qc, found = subject.qc, []
    for said in dict.fromkeys(subject.stated.values()):
        if said.weights.bits not in (2, 3, 4, 8):
            message = f"GPTQ has 2, 3, 4 or 8 bits, not {said.weights.bits}"
            found.append(error("gptq-type", "quantization_config", message, "write compressed-tensors instead"))
    damping = qc.get("damp_percent")
    if damping is not None and not (isinstance(damping, int | float) and 0 < damping < 1):
        message = f"damp_percent is {damping!r}; transformers wants it between 0 and 1"
        found.append(error("gptq-damping", "quantization_config", message, "drop it or write 0.05"))
    dense = [name for name in subject.linears if name not in subject.shapes and ".layers." in name]
    inside = qc.get("modules_in_block_to_quantize") or qc.get("dynamic")
    if dense and subject.shapes and not inside and leaf(dense[0]) not in ("gate", "router"):
        message = f"{len(dense)} layers of the blocks are dense, but every linear of a block is expected in GPTQ"
        remedy = "name the quantized ones in modules_in_block_to_quantize, or the dense ones in dynamic"
        found.append(warning("gptq-dense", some(dense), message, remedy))
    return [*found, info("needs", "", "optimum and gptqmodel are needed", "pip install optimum gptqmodel")]


def _awq(subject: Subject) -> list[Finding]:
    found = []
    version = str(subject.qc.get("version", "gemm")).lower()
    if version not in ("gemm", "gemv", "gemv_fast", "llm-awq"):
        message = f"version {version!r} is none of gemm, gemv, gemv_fast, llm-awq"
        found.append(error("awq-version", "quantization_config", message, "write version gemm"))
    return [*found, info("needs", "", "gptqmodel is needed to run AWQ layers", "pip install gptqmodel")]


def _fp8(subject: Subject) -> list[Finding]:
    found = []
    scheme = subject.qc.get("scale_fmt", "float")
    if scheme not in ("float", "ue8m0"):
        message = f"scale_fmt is {scheme!r}"
        found.append(error("fp8-scale-fmt", "quantization_config", message, "write float or ue8m0"))
    if "weight_block_size" not in subject.qc:
        message = "without weight_block_size transformers assumes blocks of [128, 128]"
        found.append(
            warning("fp8-block-absent", "quantization_config", message, "write weight_block_size, null for per tensor")
        )
    return found
