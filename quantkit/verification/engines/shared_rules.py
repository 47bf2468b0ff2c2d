"""Rules that hold for every engine, and those of the engines that merge siblings and split layers over GPUs."""

from collections import defaultdict
from typing import Any

from quantkit.verification.config.other_methods import METHODS, agreement
from quantkit.verification.findings import (
    Finding,
    error,
    warning,
)
from quantkit.verification.subject import (
    FUSING,
    DeclaredScheme,
    Subject,
    is_row,
    leaf,
    local_shape,
    siblings,
    some,
)

# Linears that the architecture keeps as Conv1D, [in, out], where quantized checkpoints hold [out, in]; by model type.
_CONV1D = {
    "gpt2": ("c_attn", "q_attn", "c_proj", "c_fc"),
    "jais": ("c_attn", "q_attn", "c_proj", "c_fc", "c_fc2"),
    "openai-gpt": ("c_attn", "c_proj", "c_fc"),
}


def conv1d(subject: Subject) -> list[str]:
    """The quantized modules that are Conv1D in this architecture, sorted."""
    names = {last for kind in subject.model_types for last in _CONV1D.get(kind, ())}
    return sorted(name for name in subject.quantized if leaf(name) in names)


def transposed(subject: Subject) -> list[Finding]:
    """vLLM's and SGLang's loaders of GPT-2 and Jais transpose the Conv1D tensors whose names end in .weight."""
    wrong = [name for name in conv1d(subject) if subject.stated[name].keeps_weight]
    if not wrong:
        return []
    message = (
        f"a Conv1D layer of {'/'.join(sorted(subject.model_types))} is stored as weight [out, in]; "
        f"{subject.engine} transposes every such weight while loading, so it would compute with the wrong matrix"
    )
    remedy = "use packed integers without input quantization (W4A16, W8A16), or leave these layers unquantized"
    return [error("conv1d-transposed", some(wrong), message, remedy)]


def common(subject: Subject) -> list[Finding]:
    """Everything that can be said without knowing the engine's kernels."""
    found = list(subject.problems)
    if subject.method not in METHODS:
        return found
    found += agreement(subject)
    found += group_sizes(subject)
    found += words(subject)
    if subject.engine in FUSING:
        found += fused(subject)
        found += split(subject)
    elif subject.tp > 1:
        message = f"{subject.engine} does not split layers the way --tp {subject.tp} asks"
        found.append(Finding("info", "tp-ignored", "--tp", message, "leave out --tp for this engine"))
    return found


def grouped(names: dict[str, str]) -> list[tuple[str, list[str]]]:
    """(what is wrong, the modules it is wrong with), so that a model of 64 layers gives one line."""
    by_text = defaultdict(list)
    for name, text in names.items():
        by_text[text].append(name)
    return [(text, sorted(modules)) for text, modules in by_text.items()]


def group_sizes(subject: Subject) -> list[Finding]:
    """A group must not cross the end of a row. fp8 blocks may be cut short."""
    wrong = {}
    for name, (said, (_, K)) in subject.quantized.items():
        size = said.weights.group_size
        if size > 0 and K % size:
            wrong[name] = f"groups of {size} do not divide {K} input features"
    return [
        error(
            "group-divides", some(names), text, "use a smaller group (64 or 32) there, or leave the layer unquantized"
        )
        for text, names in grouped(wrong)
    ]


def words(subject: Subject) -> list[Finding]:
    """awq packs 8 codes along N in a word, gptq 32 / bits along K and as many zero points along N."""
    wrong = {}
    for name, (said, (N, K)) in subject.quantized.items():
        bits = said.weights.bits
        if bits not in (2, 3, 4, 8) or said.layout not in ("awq", "gptq"):
            continue
        if (N * bits) % 32 or (said.layout == "gptq" and (K * bits) % 32):
            wrong[name] = f"{said.layout} cannot pack {N} x {K} at {bits} bits into whole 32-bit words"
    return [
        error("words", some(names), text, "leave the layer unquantized or write compressed-tensors")
        for text, names in grouped(wrong)
    ]


def fused(subject: Subject) -> list[Finding]:
    """Layers the engine merges are all quantized alike, or none is."""
    partly, mixed = {}, {}
    for name, members in siblings({*subject.linears, *subject.shapes}):
        said = [subject.stated.get(member) for member in members]
        kinds = {_kind(each) for each in said}
        if None in said and len(kinds) > 1:
            dense = ", ".join(leaf(m) for m, each in zip(members, said, strict=True) if each is None)
            partly[name] = f"{dense} unquantized, the rest not: {subject.engine} merges them into one layer"
        elif len(kinds) > 1:
            mixed[name] = f"{' and '.join(sorted(str(k) for k in kinds))}: {subject.engine} merges them into one layer"
    found = [error("fused-partly", some(names), text, "ignore all of them or none") for text, names in grouped(partly)]
    found += [error("fused-schemes", some(names), text, "give them one scheme") for text, names in grouped(mixed)]
    return found + _experts(subject)


def _kind(said: DeclaredScheme | None) -> Any:
    return said and (said.layout, said.weights, said.inputs)


def _experts(subject: Subject) -> list[Finding]:
    """All experts of a layer are one fused module: one scheme for its three projections."""
    layers: dict[str, set[Any]] = defaultdict(set)
    for name in {*subject.linears, *subject.shapes}:
        stem, separator, rest = name.partition(".experts.")
        if separator and rest.split(".")[0].isdigit():
            layers[f"{stem}.experts"].add(_kind(subject.stated.get(name)))
    wrong = sorted(name for name, kinds in layers.items() if len(kinds) > 1)
    if not wrong:
        return []
    message = f"experts of one layer are stored in different ways; {subject.engine} holds them in one tensor"
    return [error("experts-schemes", some(wrong), message, "give every projection of all experts one scheme")]


def split(subject: Subject) -> list[Finding]:
    """Whether the layers can be cut for `tp` GPUs."""
    tp = subject.tp
    if tp == 1:
        return []
    found = []
    heads = subject.number("num_attention_heads")
    kv_heads = subject.number("num_key_value_heads", heads)
    if heads % tp or (kv_heads % tp and tp % max(kv_heads, 1)):
        message = f"{heads} attention heads with {kv_heads} key/value heads do not split over {tp} GPUs"
        found.append(error("tp-heads", "config.json", message, "choose a --tp that divides the numbers of heads"))
    wrong = {}
    for name, (said, shape) in subject.quantized.items():
        N, K = local_shape(name, shape, subject)
        size = said.weights.group_size
        if int(N) != N or int(K) != K:
            wrong[name] = f"{shape[int(is_row(name))]} features do not split over {tp} GPUs"
        elif is_row(name) and size > 0 and K % size:
            wrong[name] = f"{int(K)} input features for each of {tp} GPUs are not whole groups of {size}"
        elif said.layout == "awq" and N % 8:
            wrong[name] = f"{int(N)} outputs for each of {tp} GPUs are not whole words of 8 codes"
        elif said.layout == "gptq" and ((N * said.weights.bits) % 32 or (K * said.weights.bits) % 32):
            wrong[name] = f"{int(N)} x {int(K)} for each of {tp} GPUs are not whole 32-bit words"
        elif said.layout == "pack-quantized" and is_row(name) and (K * said.weights.bits) % 32:
            wrong[name] = f"{int(K)} inputs for each of {tp} GPUs are not whole 32-bit words"
    remedy = "choose a smaller --tp, or smaller groups for these layers"
    found += [error("tp-group", some(names), text, remedy) for text, names in grouped(wrong)]
    return found


def blocks(subject: Subject) -> list[Finding]:
    """fp8 blocks must not cross the border between merged layers, nor that between GPUs (vLLM's own check)."""
    wrong = {}
    members = {m: group for _, group in siblings(subject.quantized) for m in group}
    for name, (said, shape) in subject.quantized.items():
        if said.weights.block is None:
            continue
        block_n, block_k = said.weights.block
        N, K = local_shape(name, shape, subject)
        if subject.tp > 1 and is_row(name) and K % block_k:
            wrong[name] = f"{K:g} inputs for each GPU are not whole blocks of {block_k}"
        last = members.get(name, [name])[-1]
        merged = name in members and name != last
        if N % block_n and (merged or (subject.tp > 1 and shape[0] != N)):
            where = "before the next merged layer" if subject.tp == 1 else "for each GPU"
            wrong[name] = f"{N:g} outputs {where} are not whole blocks of {block_n}"
    remedy = "use FP8 per channel for these layers, or leave them unquantized"
    return [error("block-merge", some(names), text, remedy) for text, names in grouped(wrong)]


def kv_scheme(subject: Subject) -> dict[str, Any] | None:
    """The config's kv_cache_scheme where it is an object."""
    raw = subject.qc.get("kv_cache_scheme")
    return raw if isinstance(raw, dict) else None


def kv_static_fp8(subject: Subject, strategies: tuple[str, ...]) -> list[Finding]:
    """kv_cache_scheme must be symmetric static 8-bit float with one of these strategies."""
    raw = subject.qc.get("kv_cache_scheme")
    if raw is None or subject.method not in ("compressed-tensors", "modelopt"):
        return []
    where, remedy = "kv_cache_scheme", "write 8-bit float, strategy tensor, symmetric, or drop it"
    if not isinstance(raw, dict):
        return [error("kv-scheme", where, f"is {type(raw).__name__}, not an object", remedy)]
    if subject.method == "modelopt":
        return []
    if raw.get("type") != "float" or raw.get("num_bits") != 8:
        message = f"{subject.engine} reads only 8-bit float, this is {raw.get('num_bits')}-bit {raw.get('type')}"
        return [error("kv-scheme", where, message, remedy)]
    if raw.get("strategy") not in strategies:
        message = f"strategy {raw.get('strategy')!r}; {subject.engine} knows {' and '.join(strategies)}"
        return [error("kv-scheme", where, message, remedy)]
    if not raw.get("symmetric"):
        return [error("kv-scheme", where, f"{subject.engine} reads only symmetric scales", remedy)]
    if raw.get("dynamic"):
        return [warning("kv-dynamic", where, "the scales of a dynamic scheme are not stored", "calibrate them")]
    return []
