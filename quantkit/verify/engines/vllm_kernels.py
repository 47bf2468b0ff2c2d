"""Which of vLLM 0.33's kernels a module gets on which hardware, and where the other engines run a scheme.

Order and conditions are those of vLLM's choose_mp_linear_kernel and of the kernels' own can_implement.
"""

from collections import Counter
from typing import Any

from quantkit.verify.engines.vllm import MARLIN_GROUPS
from quantkit.verify.engines.vllm_schemes import scheme
from quantkit.verify.findings import (
    Finding,
    warning,
)
from quantkit.verify.subject import (
    DeclaredScheme,
    Subject,
    leaf,
    local_shape,
    siblings,
)

HARDWARE = ("Turing", "Ampere", "Ada", "Hopper", "Blackwell", "ROCm", "XPU", "CPU")
_TRITON_GROUPS = (-1, 32, 64, 128, 256)
_FP8_RUNS = ("weight-only", "weight-only", "yes", "yes", "yes", "MI300 on", "yes", "no")
_RUNS: dict[str, tuple[str, ...]] = {
    "W4A16": ("yes",) * 8,
    "W8A16": ("yes", "yes", "yes", "yes", "yes", "partly", "no", "no"),
    "WNA16": ("yes", "yes", "yes", "yes", "yes", "no", "no", "no"),
    "INT8": ("yes", "yes", "yes", "yes", "prefer FP8", "yes", "yes", "yes"),
    "FP8": _FP8_RUNS,
    "FP8 dynamic": (*_FP8_RUNS[:7], "yes"),
    "FP8 block": (*_FP8_RUNS[:5], "yes", "yes", "AMX only"),
    "W4A8-FP8": ("no", "no", "no", "yes", "no", "no", "no", "no"),
    "W4A8-INT": ("yes", "yes", "yes", "yes", "yes", "no", "yes", "yes"),
    "NVFP4": ("weight-only", "weight-only", "weight-only", "weight-only", "yes", "emulated", "no", "no"),
    "MXFP4": ("no", "weight-only", "weight-only", "weight-only", "yes", "gfx950", "yes", "no"),
    "MXFP8": ("emulated", "weight-only", "weight-only", "weight-only", "yes", "gfx950", "yes", "no"),
}
_SGLANG = ("Turing", "Ampere", "Ada", "Hopper", "Blackwell", "CPU")
_SGLANG_RUNS: dict[str, tuple[str, ...]] = {
    "W4A16": ("no", "yes", "yes", "yes", "yes", "AMX only"),
    "W8A16": ("no", "yes", "yes", "yes", "yes", "no"),
    "INT8": ("no", "yes", "yes", "yes", "yes", "AMX only"),
    "FP8": ("no", "weight-only", "yes", "yes", "yes", "AMX only"),
    "NVFP4": ("no", "no", "no", "no", "yes", "no"),
    "NVFP4A16": ("no", "yes", "yes", "yes", "yes", "no"),
    "MXFP8": ("no", "no", "no", "no", "yes", "no"),
}
_TRT = ("Ampere", "Ada", "Hopper", "Blackwell SM100", "Blackwell SM120")
_TRT_RUNS: dict[str, tuple[str, ...]] = {
    "NVFP4": ("no", "no", "no", "yes", "yes"),
    "MXFP4": ("no", "no", "no", "yes", "yes"),
    "FP8": ("no", "yes", "yes", "yes", "yes"),
    "FP8 block": ("no", "no", "yes", "yes", "no"),
    "FP8 dynamic": ("no", "no", "yes", "no", "no"),
    "W4A16": ("yes", "yes", "yes", "no", "no"),
}


def family(said: DeclaredScheme) -> str:
    """The row of the tables above a module belongs to."""
    weights, inputs = said.weights, said.inputs
    if weights.kind == "float":
        if weights.bits == 4:
            base = "NVFP4" if weights.strategy == "tensor_group" else "MXFP4"
            return base if base == "MXFP4" or inputs else "NVFP4A16"
        if weights.strategy == "group" or said.layout == "modelopt-mxfp8":
            return "MXFP8"
        if weights.strategy == "block":
            return "FP8 block"
        return "FP8 dynamic" if inputs and inputs.dynamic and weights.strategy == "channel" else "FP8"
    if inputs is None:
        return "W4A16" if weights.bits == 4 else "W8A16" if weights.bits == 8 and weights.symmetric else "WNA16"
    if inputs.kind == "float":
        return "W4A8-FP8"
    if weights.bits == 8 and said.layout == "int-quantized":
        return "INT8"
    return "W4A8-INT" if weights.bits == 4 and inputs.bits == 8 else "WNA16"


def hardware(subject: Subject) -> dict[str, str]:
    """What each kind of machine does with the model's worst-placed module; "?" where nothing is known."""
    names, table = {
        "vllm": (HARDWARE, _RUNS | {"NVFP4A16": _RUNS["NVFP4"]}),
        "sglang": (_SGLANG, _SGLANG_RUNS | {"FP8 block": _SGLANG_RUNS["FP8"], "FP8 dynamic": _SGLANG_RUNS["FP8"]}),
        "tensorrt-llm": (_TRT, _TRT_RUNS | {"NVFP4A16": _TRT_RUNS["NVFP4"]}),
    }.get(subject.engine, ((), {}))
    families = {family(said) for said, _ in subject.quantized.values()}
    result = {}
    for column, name in enumerate(names):
        cells = [table[f][column] if f in table else "?" for f in sorted(families)]
        worst = next((cell for cell in ("no", "?") if cell in cells), None)
        limited = [cell for cell in cells if cell != "yes"]
        if cells:
            result[name] = worst or (limited[0] if limited else "yes")
    return result


def integer_kernel(said: DeclaredScheme, n: float, k: float, hopper: bool, fp16: bool) -> str:
    """The kernel of weight-only integers on an NVIDIA GPU, for one GPU's part of the layer."""
    weights = said.weights
    size, four, eight = weights.group_size, weights.bits == 4, weights.bits == 8
    if said.layout == "gptq":
        return "Machete" if hopper and size in (-1, 64, 128) and not k % 64 and not n % 128 else "Marlin"
    if hopper and (four or eight) and size in (-1, 64, 128) and not k % 64 and not n % 128:
        return "Machete"
    if (four or (eight and weights.symmetric)) and size in MARLIN_GROUPS:
        return "Marlin"
    if said.layout == "awq":
        return "plain AWQ"
    if fp16 and (four or eight) and weights.symmetric and size > 0 and not n % (32 // weights.bits):
        return "Exllama"
    if four and not n % 8 and size in _TRITON_GROUPS:
        return "Triton"
    return "Humming"


def kernel_table(subject: Subject) -> list[dict[str, Any]]:
    """[{modules, count, scheme, kernel: {hardware: kernel}}], one row for modules that are served alike."""
    fp16 = str(subject.model.get("dtype", subject.model.get("torch_dtype"))).removeprefix("torch.") == "float16"
    rows: dict[tuple[str, tuple[tuple[str, str], ...]], Counter[str]] = {}
    merged = {}
    for _, members in siblings(subject.quantized):
        total = sum(local_shape(member, subject.shapes[member], subject)[0] for member in members)
        merged |= dict.fromkeys(members, total)
    for name, (said, shape) in sorted(subject.quantized.items()):
        n, k = local_shape(name, shape, subject)
        n = merged.get(name, n)
        kind = family(said)
        if subject.engine != "vllm":
            kernels = {}
        elif kind in ("W4A16", "W8A16", "WNA16") and said.inputs is None and said.weights.kind == "int":
            kernels = {h: integer_kernel(said, n, k, h == "Hopper", fp16) for h in HARDWARE[:5]}
        else:
            kernels = {h: _other_kernel(said, kind, h) for h in HARDWARE[:5]}
        rows.setdefault((str(said), tuple(kernels.items())), Counter())[leaf(name)] += 1
    return [
        {"modules": ", ".join(names), "count": names.total(), "scheme": text, "kernel": dict(kernels)}
        for (text, kernels), names in rows.items()
    ]


def _other_kernel(said: DeclaredScheme, kind: str, machine: str) -> str:
    runs = (_RUNS | {"NVFP4A16": _RUNS["NVFP4"]}).get(kind, ("?",) * 8)[HARDWARE.index(machine)]
    if runs == "weight-only":
        return "Marlin (weight-only)"
    if runs in ("no", "?"):
        return "none" if runs == "no" else "?"
    if kind == "NVFP4A16":
        return "Marlin (weight-only)"
    if kind.startswith(("WNA", "W4A8-INT")) or scheme(said) in ("WNA4", "WNA8"):
        return "Humming"
    return "emulated" if runs == "emulated" else "scaled matmul"


def slow_kernels(subject: Subject) -> list[Finding]:
    """Weight-only integers that end up on a kernel behind Marlin."""
    rows = [row for row in kernel_table(subject) if row["kernel"].get("Ampere") in ("Humming", "Triton", "Exllama")]
    found = []
    for row in rows:
        if "int4" in row["scheme"] or "int8" in row["scheme"]:
            message = f"{row['scheme']}: Marlin does not take it, {row['kernel']['Ampere']} runs instead"
            remedy = (
                f"for the fast kernels use symmetric weights (4-bit also asymmetric) and groups of {MARLIN_GROUPS[1:]}"
            )
            found.append(warning("kernel-slow", row["modules"], message, remedy))
    return found
