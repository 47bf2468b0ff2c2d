"""Which tensors a quantized module has, by what the config states; and which modules a folder's headers show.

Shapes: N = out features, K = in features, G = groups of a row (1 without groups).
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from quantkit.checkpoint.header import DTYPES
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import UserError
from quantkit.verification.engines.shared_rules import grouped
from quantkit.verification.findings import (
    Finding,
    error,
    warning,
)
from quantkit.verification.subject import (
    FUSING,
    DeclaredNumbers,
    DeclaredScheme,
    Modules,
    Shape,
    Subject,
    TensorHeader,
    leaf,
    some,
)
from quantkit.verification.values import read_values

Sizes = tuple[int, ...]
_FLOATS = ("BF16", "F16", "F32")
_F8, _U8, _I8 = ("F8_E4M3",), ("U8",), ("I8",)
_I32, _F32 = ("I32",), ("F32",)
Table = dict[str, tuple[tuple[str, ...], list[Sizes]]]  # suffix -> (tags of dtypes, shapes) it may have
_PACKED = ("F8_E4M3", "F8_E5M2", "I8", "U8")
_ONE: list[Sizes] = [(), (1,)]
_NOT_LINEAR = ("wte", "wpe", "shared")


def modules_of(tensors: Mapping[str, TensorHeader]) -> Modules:
    """Module -> its tensors by suffix."""
    modules: dict[str, dict[str, TensorHeader]] = defaultdict(dict)
    for name, info in tensors.items():
        module, _, suffix = name.rpartition(".")
        modules[module][suffix] = info
    return dict(modules)


def packed_shapes(checkpoint: Checkpoint) -> dict[str, Shape]:
    """(N, K) of each module that stores a weight_shape, as it says; the packed words alone do not give K."""
    shapes = {}
    for name, info in checkpoint.tensors.items():
        if leaf(name) == "weight_shape" and info.nbytes <= 64:
            values = read_values(checkpoint, name)
            if len(values) == 2:
                shapes[name.rpartition(".")[0]] = int(values[0]), int(values[1])
    return shapes


def find_shapes(
    modules: Modules, packed: Mapping[str, Shape], qc: Mapping[str, Any]
) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """((N, K) of modules with quantized tensors, (N, K) of all linear modules); packed: as packed_shapes has it."""
    shapes, linears = {}, {}
    for name, tensors in modules.items():
        found = _quantized_shape(packed.get(name), tensors, qc)
        if found is not None:
            shapes[name] = linears[name] = found
        elif "weight" in tensors and len(tensors["weight"].shape) == 2 and not _embeds(name):
            linears[name] = (tensors["weight"].shape[0], tensors["weight"].shape[1])
    return shapes, linears


def _embeds(name: str) -> bool:
    last = leaf(name)
    return (("embed" in last or "norm" in last) and last != "embed_out") or last in _NOT_LINEAR


def _quantized_shape(packed: Shape | None, tensors: Mapping[str, TensorHeader], qc: Mapping[str, Any]) -> Shape | None:
    if "weight_packed" in tensors:
        info = tensors["weight_packed"]
        N, width = (*info.shape, 0, 0)[:2]
        if info.tag == "U8":
            return N, 2 * width
        return packed or (N, width * 8)
    if "qweight" in tensors:
        rows, columns = (*tensors["qweight"].shape, 0, 0)[:2]
        if str(qc.get("quant_method")).lower() == "awq":
            scales = tensors.get("scales")
            return (scales.shape[-1] if scales and scales.shape else columns * 8), rows
        order, bits = tensors.get("g_idx"), qc.get("bits")
        bits = bits if isinstance(bits, int) and 2 <= bits <= 8 else 4
        return columns, (order.shape[0] if order and order.shape else rows * 32 // bits)
    weight = tensors.get("weight")
    if weight is None or weight.tag not in _PACKED or len(weight.shape) != 2:
        return None
    N, width = weight.shape
    inner = qc.get("quantization", qc)
    if weight.tag == "U8":
        by_rows = isinstance(inner, dict) and "AWQ" in str(inner.get("quant_algo")).upper()
        return (2 * N, width) if by_rows else (N, 2 * width)
    return N, width


def expected(said: DeclaredScheme, N: int, K: int) -> Table:
    """Suffix -> (dtypes, shapes) it may have, of every tensor the module must have; {} where nothing is known."""
    weights, inputs, layout = said.weights, said.inputs, said.layout
    bits, size = weights.bits, weights.group_size
    G = -(-K // size) if size > 0 else 1
    scale = _scale_shapes(weights, N, K, G)
    static = inputs is not None and not inputs.dynamic and inputs.strategy == "tensor"
    tensors: Table = {}
    if layout == "pack-quantized":
        tensors = {
            "weight_packed": (_I32, [(N, -(-K * bits // 32))]),
            "weight_scale": (_FLOATS, scale),
            "weight_shape": (("I64", "I32"), [(2,)]),
        }
        if not weights.symmetric:
            tensors["weight_zero_point"] = (_I32, [(-(-N * bits // 32), G)])
    elif layout in ("int-quantized", "float-quantized", "naive-quantized"):
        tensors = {"weight": (_F8 if weights.kind == "float" else _I8, [(N, K)]), "weight_scale": (_FLOATS, scale)}
    elif layout == "nvfp4-pack-quantized":
        tensors = {
            "weight_packed": (_U8, [(N, K // 2)]),
            "weight_scale": (_F8, [(N, G)]),
            "weight_global_scale": (_F32, _ONE),
        } | ({"input_global_scale": (_F32, _ONE)} if inputs else {})
    elif layout in ("mxfp4-pack-quantized", "mxfp8-quantized", "modelopt-mxfp8"):
        code: Table = {"weight_packed": (_U8, [(N, K // 2)])} if bits == 4 else {"weight": (_F8, [(N, K)])}
        tensors = code | {"weight_scale": (_U8, [(N, G)])}
    elif layout in ("awq", "gptq"):
        per_row = (K, N * bits // 32) if layout == "awq" else (K * bits // 32, N)
        tensors = {
            "qweight": (_I32, [per_row]),
            "qzeros": (_I32, [(G, N * bits // 32)]),
            "scales": (_FLOATS, [(G, N)]),
        }
    elif layout in ("fp8", "fp8-block"):
        return {"weight": (_F8, [(N, K)])}  # two dialects of scales: see scale_names
    elif layout == "modelopt-fp8":
        tensors = {"weight": (_F8, [(N, K)]), "weight_scale": (_F32, _ONE), "input_scale": (_F32, _ONE)}
    elif layout == "modelopt-fp8-channel":
        tensors = {"weight": (_F8, [(N, K)]), "weight_scale": (_F32, [(N,)])}
    elif layout == "modelopt-fp8-block":
        tensors = {"weight": (_F8, [(N, K)]), "weight_scale": (_FLOATS, [(-(-N // 128), 1, -(-K // 128), 1)])}
    elif layout == "modelopt-nvfp4":
        tensors = {
            "weight": (_U8, [(N, K // 2)]),
            "weight_scale": (_F8, [(N, G)]),
            "weight_scale_2": (_F32, _ONE),
        } | ({"input_scale": (_F32, _ONE)} if inputs else {})
    if layout in ("int-quantized", "float-quantized") and static and inputs:
        tensors["input_scale"] = (_FLOATS, _ONE)
        if not inputs.symmetric:
            tensors["input_zero_point"] = (("I8", "I32"), _ONE)
    return tensors


def _scale_shapes(weights: DeclaredNumbers, N: int, K: int, G: int) -> list[Sizes]:
    if weights.block is not None:
        return [(-(-N // weights.block[0]), -(-K // weights.block[1]))]
    return {"tensor": _ONE, "channel": [(N, 1)]}.get(weights.strategy, [(N, G)])


def check_tensors(subject: Subject, modules: Modules) -> list[Finding]:
    """Every module's tensors against what the config states of it."""
    wrong: dict[str, dict[str, str]] = defaultdict(dict)
    for name, (said, (N, K)) in subject.quantized.items():
        tensors = modules[name]
        for suffix, (dtypes, shapes) in expected(said, N, K).items():
            info = tensors.get(suffix)
            if info is None:
                wrong["tensor-missing"][name] = f"{said} needs the tensor {suffix}"
            elif info.tag not in dtypes:
                found, wanted = DTYPES[info.tag][0], DTYPES[dtypes[0]][0]
                wrong["tensor-dtype"][name] = f"{suffix} is {found}, {said} has {wanted}"
            elif (
                suffix == "weight_packed"
                and said.weights.bits in (3, 5, 6, 7)
                and info.shape == _padded(said.weights.bits, N, K)
            ):
                wrong["old-packing"][name] = (
                    f"{said.weights.bits}-bit words are padded, as before compressed-tensors 0.17"
                )
            elif info.shape not in shapes:
                what = f"{suffix} is {list(info.shape)}, {said} of {N} x {K} has {list(shapes[0])}"
                wrong["tensor-shape"][name] = what
        if said.layout in ("fp8", "fp8-block"):
            for rule, text in _fp8_scales(subject, said, tensors, N, K):
                wrong[rule][name] = text
        if "weight_g_idx" in tensors:
            wrong["tensor-extra"][name] = "weight_g_idx is discarded by engines, so the columns' order is lost"
        if "weight_zero_point" in tensors and said.weights.symmetric:
            wrong["tensor-extra"][name] = "weight_zero_point is stored although the config says symmetric"
        if "weight" in tensors and ("weight_packed" in tensors or "qweight" in tensors):
            wrong["tensor-extra"][name] = "a dense weight is stored beside the packed one"
    remedies = {
        "tensor-missing": "export the model again, all tensors of a module together",
        "tensor-extra": "export again without that tensor",
        "old-packing": "export again with compressed-tensors 0.18 or later",
        "fp8-dialect": "write compressed-tensors float-quantized, which every engine reads alike",
    }
    found = []
    for rule, names in wrong.items():
        make = warning if rule == "tensor-extra" else error
        remedy = remedies.get(rule, "the config does not describe these tensors: fix it or export again")
        found += [make(rule, some(modules_), text, remedy) for text, modules_ in grouped(names)]
    found += _act_scales(subject, modules)
    return found + _no_g_idx(subject, modules)


def _padded(bits: int, N: int, K: int) -> Sizes:
    """The shape of packed codes of which none crosses a word."""
    return N, -(-K // (32 // bits))


def _fp8_scales(
    subject: Subject, said: DeclaredScheme, tensors: Mapping[str, TensorHeader], N: int, K: int
) -> list[tuple[str, str]]:
    """transformers reads weight_scale_inv and activation_scale; vLLM, per tensor, weight_scale and input_scale."""
    names = [name for name in ("weight_scale_inv", "weight_scale") if name in tensors]
    if not names:
        return [("tensor-missing", f"{said} needs the tensor weight_scale_inv or weight_scale")]
    found, name = [], names[0]
    shapes = _scale_shapes(said.weights, N, K, 1)
    shapes = [*shapes, (1, 1)] if said.layout == "fp8" else shapes
    if tensors[name].shape not in shapes:
        text = f"{name} is {list(tensors[name].shape)}, {said} of {N} x {K} has {list(shapes[0])}"
        found.append(("tensor-shape", text))
    wanted = {"transformers": "weight_scale_inv", "vllm": "weight_scale", "sglang": "weight_scale"}.get(subject.engine)
    if wanted and name != wanted and (said.layout == "fp8" or subject.engine == "transformers"):
        found.append(("fp8-dialect", f"the scale is called {name}, {subject.engine} looks for {wanted}"))
    if said.inputs and not said.inputs.dynamic and not {"input_scale", "activation_scale"} & tensors.keys():
        found.append(("tensor-missing", "static inputs need the tensor input_scale"))
    return found


def _act_scales(subject: Subject, modules: Modules) -> list[Finding]:
    """AutoAWQ keeps the scale of a gelu beside the layer, where only its own modules look for it."""
    names = sorted(name for name, tensors in modules.items() if leaf(name) == "act" and "scales" in tensors)
    if subject.method != "awq" or subject.engine not in FUSING or not names:
        return []
    message = f"{subject.engine} has no place for the scales of an activation function"
    return [error("awq-act-scales", some(names), message, "quantize without scaling down_proj's (fc2's) inputs")]


def _no_g_idx(subject: Subject, modules: Modules) -> list[Finding]:
    names = [n for n, (said, _) in subject.quantized.items() if said.layout == "gptq" and "g_idx" not in modules[n]]
    if not names:
        return []
    message = "there is no g_idx: gptqmodel, which transformers uses, crashes or reads garbage without it"
    make = error if subject.engine in ("transformers", "llama.cpp") else warning
    return [make("gptq-g-idx", some(sorted(names)), message, "store g_idx = k // group_size, int32 [K]")]


def check_weight_shape(subject: Subject, modules: Modules) -> list[Finding]:
    """weight_shape must agree with what is packed; the other checks would mean nothing otherwise."""
    wrong = {}
    for name, (N, K) in subject.shapes.items():
        packed = modules[name].get("weight_packed")
        if packed is not None and len(packed.shape) == 2 and (packed.shape[0] != N or min(N, K) < 1):
            wrong[name] = f"weight_shape says {N} x {K}, weight_packed has {packed.shape[0]} rows"
    remedy = "the file is damaged: export the model again"
    return [error("weight-shape", some(sorted(n)), text, remedy) for text, n in grouped(wrong)]


def open_checkpoint(folder: Any) -> Checkpoint | Finding:
    """The folder's checkpoint, or why it cannot be opened."""
    try:
        return Checkpoint.open(folder)
    except UserError as problem:
        return error("unreadable", str(folder), str(problem), "see the message")
