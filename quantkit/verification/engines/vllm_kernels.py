"""Which of vLLM 0.33's kernels a module gets on which NVIDIA GPU.

Order and conditions are those of vLLM's choose_mp_linear_kernel and of the kernels' own can_implement.
"""

from collections import Counter

from quantkit.verification.engines.hardware import HARDWARE, VLLM_RUNS, family, merged_rows
from quantkit.verification.engines.vllm import MARLIN_GROUPS
from quantkit.verification.engines.vllm_schemes import scheme
from quantkit.verification.findings import (
    Finding,
    KernelRow,
    warning,
)
from quantkit.verification.subject import (
    DeclaredScheme,
    Subject,
    leaf,
    local_shape,
)

BEHIND_MARLIN = ("Humming", "Triton", "Exllama")
_TRITON_GROUPS = (-1, 32, 64, 128, 256)


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


def kernel_table(subject: Subject) -> list[KernelRow]:
    """One row for the modules that are served alike; without kernels for other engines than vLLM."""
    fp16 = str(subject.model.get("dtype", subject.model.get("torch_dtype"))).removeprefix("torch.") == "float16"
    rows: dict[tuple[str, tuple[tuple[str, str], ...]], Counter[str]] = {}
    merged = merged_rows(subject)
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
    return [KernelRow(", ".join(names), names.total(), text, dict(kernels)) for (text, kernels), names in rows.items()]


def _other_kernel(said: DeclaredScheme, kind: str, machine: str) -> str:
    runs = VLLM_RUNS.get(kind, ("?",) * len(HARDWARE))[HARDWARE.index(machine)]
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
    rows = [row for row in kernel_table(subject) if row.kernel.get("Ampere") in BEHIND_MARLIN]
    found = []
    for row in rows:
        if "int4" in row.scheme or "int8" in row.scheme:
            message = f"{row.scheme}: Marlin does not take it, {row.kernel['Ampere']} runs instead"
            remedy = (
                f"for the fast kernels use symmetric weights (4-bit also asymmetric) and groups of {MARLIN_GROUPS[1:]}"
            )
            found.append(warning("kernel-slow", row.modules, message, remedy))
    return found


def slow_machines(subject: Subject) -> set[str]:
    """Where weight-only integers of the model end up on a kernel behind Marlin."""
    dense_inputs = {str(said) for said, _ in subject.quantized.values() if said.inputs is None}
    rows = [row for row in kernel_table(subject) if row.scheme in dense_inputs]
    return {machine for row in rows for machine, kernel in row.kernel.items() if kernel in BEHIND_MARLIN}
