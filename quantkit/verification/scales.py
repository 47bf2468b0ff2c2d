"""Scales: finite, not zero, equal where an engine keeps one number for several layers. Small, so all are read."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from quantkit.checkpoint.reader import Checkpoint
from quantkit.verification.engines.shared_rules import grouped
from quantkit.verification.findings import (
    Finding,
    error,
    info,
    warning,
)
from quantkit.verification.subject import (
    FUSING,
    DeclaredScheme,
    Modules,
    Subject,
    TensorHeader,
    leaf,
    siblings,
    some,
)
from quantkit.verification.values import read_values

LIMIT = 512 << 20  # bytes of scales beyond which only those of one number are read
_SUFFIXES = {
    *("weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale", "scales", "input_scale"),
    *("input_global_scale", "activation_scale", "k_scale", "v_scale", "q_scale", "kv_scale", "pre_quant_scale"),
}
_INPUTS = ("input_scale", "input_global_scale", "activation_scale", "k_scale", "v_scale", "q_scale", "kv_scale")


def check_values(checkpoint: Checkpoint) -> list[Finding]:
    """NaN, infinite, zero and wrongly negative scales."""
    names = [name for name in checkpoint.tensors if leaf(name) in _SUFFIXES]
    found = []
    if sum(checkpoint.tensors[name].nbytes for name in names) > LIMIT:
        found.append(info("scales-unread", "", f"more than {LIMIT >> 20} MiB of scales: only single ones are read", ""))
        names = [name for name in names if math.prod(checkpoint.tensors[name].shape) == 1]
    wrong: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in names:
        for level, text in _value_problems(leaf(name), checkpoint.tensors[name].tag, read_values(checkpoint, name)):
            wrong[level, text].append(name)
    for (level, text), bad in wrong.items():
        rule = {"not finite": "scale-nan", "negative": "scale-negative"}.get(text, "scale-zero")
        remedy = "quantize again; if the model itself holds NaN, fix that first"
        if rule == "scale-zero":
            remedy = "clamp scales to a tiny positive number when quantizing"
        make = error if level == "error" else warning
        found.append(make(rule, some(bad), f"scales are {text}", remedy))
    return found


def _value_problems(suffix: str, tag: str, values: NDArray[np.float64]) -> Iterator[tuple[str, str]]:
    if tag == "U8":  # exponents of two, 255 is NaN
        if (values == 255).any():
            yield "error", "not finite"
        return
    if not np.isfinite(values).all():
        yield "error", "not finite"
    single = suffix in _INPUTS or suffix in ("weight_global_scale", "weight_scale_2")
    if (values == 0).any() and (single or tag != "F8_E4M3"):
        yield ("error" if single else "warning"), "zero"
    if (values < 0).any() and (single or tag == "F8_E4M3"):
        yield "error", "negative"


def check_fused(subject: Subject, checkpoint: Checkpoint, modules: Modules) -> list[Finding]:
    """Numbers of which an engine keeps one per merged layer must be equal in its members."""
    if subject.engine not in FUSING:
        return []
    wrong: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for fused, members in siblings(subject.quantized):
        said = subject.stated[members[0]]
        for suffix, level, effect in _shared(said):
            tensors = [modules[member].get(suffix) for member in members]
            if any(tensor is None or math.prod(tensor.shape) != 1 for tensor in tensors):
                continue
            values = {float(read_values(checkpoint, f"{member}.{suffix}")[0]) for member in members}
            if len(values) > 1:
                wrong[suffix, level, effect].append(fused)
    found = []
    for (suffix, level, effect), names in wrong.items():
        message = f"{suffix} differs between layers {subject.engine} merges; {effect}"
        remedy = "export with one joint scale for q, k, v and one for gate, up"
        make = error if level == "error" else warning
        found.append(make("fused-scales", some(names), message, remedy))
    return found


def _shared(said: DeclaredScheme) -> list[tuple[str, str, str]]:
    weights, inputs = said.weights, said.inputs
    if weights.strategy == "tensor_group":
        wrong = "the largest is applied to all, which rescales the weights of the others"
        return [
            ("weight_global_scale", "error", wrong),
            ("weight_scale_2", "error", wrong),
            ("input_global_scale", "warning", "the largest is used for all"),
            ("input_scale", "warning", "the largest is used for all"),
        ]
    shared = []
    if inputs and not inputs.dynamic and inputs.kind == "int":
        shared += [(s, "error", "the last one loaded is used for all") for s in ("input_scale", "input_zero_point")]
    if weights.kind == "float" and weights.bits == 8:
        shared.append(("input_scale", "warning", "the largest is used for all"))
        if weights.strategy == "tensor":
            shared.append(("weight_scale", "warning", "the weights are rounded again to the largest"))
    return shared


def check_global(subject: Subject, checkpoint: Checkpoint, modules: Modules) -> list[Finding]:
    """compressed-tensors stores NVFP4's global scale as a divisor, ModelOpt as a factor: their ranges do not meet."""
    wrong = {}
    for name, (said, _) in subject.quantized.items():
        for suffix in ("weight_global_scale", "weight_scale_2"):
            tensor = modules[name].get(suffix)
            if said.weights.strategy != "tensor_group" or tensor is None or math.prod(tensor.shape) != 1:
                continue
            value = float(read_values(checkpoint, f"{name}.{suffix}")[0])
            if 0 < value < 1 and suffix == "weight_global_scale":
                wrong[name] = f"{suffix} is {value:.3g}: it is a divisor, 2688 / the largest weight"
            if value > 1 and suffix == "weight_scale_2":
                wrong[name] = f"{suffix} is {value:.3g}: it is a factor, the largest weight / 2688"
    texts = {name: text.split(" is ")[0] + " is the reciprocal of what it should be" for name, text in wrong.items()}
    remedy = "store the reciprocal: the weights are off by a factor of a million otherwise"
    return [error("nvfp4-reciprocal", some(sorted(names)), text, remedy) for text, names in grouped(texts)]


def check_zeros(subject: Subject, checkpoint: Checkpoint, modules: Modules) -> list[Finding]:
    """Symmetric awq and gptq weights have one zero point, known beforehand: gptq v1 stores it less one."""
    v2 = subject.qc.get("checkpoint_format") == "gptq_v2"
    wrong = {}
    for name, (said, _) in subject.quantized.items():
        bits, zeros = said.weights.bits, modules[name].get("qzeros")
        if said.layout not in ("awq", "gptq") or not said.weights.symmetric or zeros is None or bits not in (2, 4, 8):
            continue
        middle = 1 << (bits - 1)
        stored = middle - 1 if said.layout == "gptq" and not v2 else middle
        word = sum(stored << shift for shift in range(0, 32, bits))
        if zeros.tag != "I32" or not zeros.shape or 0 in zeros.shape:
            continue
        row = checkpoint.raw(f"{name}.qzeros", 0, checkpoint.info(f"{name}.qzeros").nbytes // zeros.shape[0])
        if (np.frombuffer(row, "<u4") != word).any():
            wrong[name] = f"symmetric, so qzeros should hold {word:#010x} ({'v2' if v2 else 'v1'} layout)"
    serious = subject.engine in ("transformers", "llama.cpp") or subject.method == "awq"
    make = error if serious else warning  # the Marlin kernels do not look at them
    remedy = "state the checkpoint_format that is stored (gptq or gptq_v2), or convert the model again"
    return [make("zero-points", some(sorted(names)), text, remedy) for text, names in grouped(wrong)]


def check_channels(subject: Subject, tensors: Mapping[str, TensorHeader]) -> list[Finding]:
    """Offsets and scales of a cache's channels are quantkit's own: loaders that know every name stop at them."""
    own = sorted(name for name in tensors if leaf(name) in ("k_channels", "v_channels"))
    if not own:
        return []
    message = f"{subject.engine} knows no tensor of that name: constants of the channels of a cache are quantkit's own"
    if subject.engine == "transformers":
        return [info("kv-channels", some(own), f"{message}; it leaves them out", "evaluate the cache with quantkit")]
    return [error("kv-channels", some(own), message, "quantize for this engine without channels in kv_cache")]


def check_kv(subject: Subject, tensors: Mapping[str, TensorHeader]) -> list[Finding]:
    """A static KV cache scheme comes with a key and a value scale in every attention."""
    raw = subject.qc.get("kv_cache_scheme")
    if not isinstance(raw, dict) or raw.get("dynamic"):
        return []
    attentions = {
        name.rpartition(".")[0]: leaf(name)
        for name in {*subject.linears, *subject.shapes}
        if leaf(name) in ("k_proj", "qkv_proj", "query_key_value", "c_attn")
    }
    missing, wrong = [], []
    count = subject.number("num_key_value_heads") if raw.get("strategy") == "attn_head" else 1
    for attention in sorted(attentions):
        for letter in ("k", "v"):
            names = (f"{letter}_scale", f"attn.{letter}_scale", f"{letter}_proj.{letter}_scale", "kv_scale")
            names = (*names, f"{letter}_proj.output_scale")
            stored = [full for name in names if (full := f"{attention}.{name}") in tensors]
            if not stored:
                missing.append(f"{attention}.{letter}_scale")
            elif count and math.prod(tensors[stored[0]].shape) != count:
                wrong.append(stored[0])
    found = []
    if missing:
        message = f"{len(missing)} scales of the KV cache are not stored: engines use 1.0"
        found.append(warning("kv-missing", missing[0], message, "calibrate and store them, or drop kv_cache_scheme"))
    if wrong:
        message = f"strategy {raw.get('strategy')!r} has scales of {count}, stored are other numbers of them"
        found.append(error("kv-shape", some(wrong), message, "state the strategy the scales were made for"))
    return found
