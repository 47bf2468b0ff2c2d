"""On which hardware each engine runs a number format, and whether it does on the one a user asks about.

The tables are read from the engines' sources; the CPU column of vLLM was held to runs of vLLM 0.32 on AVX512 without
AMX.
"""

import difflib
import re

from quantkit.errors import UserError
from quantkit.verification.engines.shared_rules import grouped
from quantkit.verification.findings import Finding, error, info, warning
from quantkit.verification.subject import DeclaredScheme, Subject, local_shape, siblings, some

HARDWARE = ("Turing", "Ampere", "Ada", "Hopper", "Blackwell", "ROCm", "XPU", "CPU")
_FP8_RUNS = ("weight-only", "weight-only", "yes", "yes", "yes", "MI300 on", "yes", "no")
VLLM_RUNS: dict[str, tuple[str, ...]] = {
    "W4A16": ("yes",) * 8,
    "W8A16": ("yes", "yes", "yes", "yes", "yes", "partly", "no", "no"),
    "WNA16": ("yes", "yes", "yes", "yes", "yes", "no", "no", "no"),
    "INT8": ("yes", "yes", "yes", "yes", "prefer FP8", "yes", "yes", "yes"),
    "FP8": _FP8_RUNS,
    "FP8 dynamic": (*_FP8_RUNS[:7], "yes"),
    "FP8 block": (*_FP8_RUNS[:5], "yes", "yes", "AMX only"),
    "W4A8-FP8": ("no", "no", "no", "yes", "no", "no", "no", "no"),
    "W4A8-INT": ("yes", "yes", "yes", "yes", "yes", "no", "yes", "weight-only"),  # with AMX inputs are rounded as well
    "NVFP4": ("weight-only", "weight-only", "weight-only", "weight-only", "yes", "emulated", "no", "no"),
    "MXFP4": ("no", "weight-only", "weight-only", "weight-only", "yes", "gfx950", "yes", "no"),
    "MXFP8": ("emulated", "weight-only", "weight-only", "weight-only", "yes", "gfx950", "yes", "no"),
}
VLLM_RUNS["NVFP4A16"] = VLLM_RUNS["NVFP4"]
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
_SGLANG_RUNS |= dict.fromkeys(("FP8 block", "FP8 dynamic"), _SGLANG_RUNS["FP8"])
_TRT = ("Ampere", "Ada", "Hopper", "Blackwell SM100", "Blackwell SM120")
_TRT_RUNS: dict[str, tuple[str, ...]] = {
    "NVFP4": ("no", "no", "no", "yes", "yes"),
    "MXFP4": ("no", "no", "no", "yes", "yes"),
    "FP8": ("no", "yes", "yes", "yes", "yes"),
    "FP8 block": ("no", "no", "yes", "yes", "no"),
    "FP8 dynamic": ("no", "no", "yes", "no", "no"),
    "W4A16": ("yes", "yes", "yes", "no", "no"),
}
_TRT_RUNS["NVFP4A16"] = _TRT_RUNS["NVFP4"]
_TABLES = {"vllm": (HARDWARE, VLLM_RUNS), "sglang": (_SGLANG, _SGLANG_RUNS), "tensorrt-llm": (_TRT, _TRT_RUNS)}

# What a user may call a column of these tables. "Blackwell" alone means both of its kinds.
_NAMES = {
    "Turing": "turing t4 sm75",
    "Ampere": "ampere a100 a800 a10 a10g a30 a40 a6000 rtx3090 sm80 sm86 sm87",
    "Ada": "ada l4 l40 l40s rtx4080 rtx4090 sm89",
    "Hopper": "hopper h100 h200 h800 h20 gh200 sm90",
    "Blackwell SM100": "b100 b200 b300 gb200 gb300 sm100 sm103",
    "Blackwell SM120": "rtx5090 gb10 sm120 sm121",
    "Blackwell": "blackwell",
    "ROCm": "rocm mi250 mi300 mi300x mi325x mi350x mi355x",
    "XPU": "xpu",
    "CPU": "cpu",
}

# The sizes of heads vLLM's attention on CPUs takes.
_CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


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
    names, table = _TABLES.get(subject.engine, ((), {}))
    families = {family(said) for said, _ in subject.quantized.values()}
    result = {}
    for column, name in enumerate(names):
        cells = [table[f][column] if f in table else "?" for f in sorted(families)]
        worst = next((cell for cell in ("no", "?") if cell in cells), None)
        limited = [cell for cell in cells if cell != "yes"]
        if cells:
            result[name] = worst or (limited[0] if limited else "yes")
    if "CPU" in result and cpu_limits(subject):
        result["CPU"] = "no"
    return result


def merged_rows(subject: Subject) -> dict[str, float]:
    """Output features, on one GPU, of the layer that each merged module becomes a part of."""
    rows = {}
    for _, members in siblings(subject.quantized):
        total = sum(local_shape(member, subject.shapes[member], subject)[0] for member in members)
        rows |= dict.fromkeys(members, total)
    return rows


def cpu_limits(subject: Subject) -> list[Finding]:
    """Why vLLM cannot run this model on a CPU, whatever the table says of its number format."""
    if subject.engine != "vllm":
        return []
    found, rows, wrong = [], merged_rows(subject), {}
    head = subject.head_size
    if head and head not in _CPU_HEADS:
        message = f"heads of {head}: vLLM's attention on CPUs takes {', '.join(map(str, _CPU_HEADS))} only"
        found.append(error("hardware", "CPU", message, "run this model on a GPU"))
    for name, (said, shape) in subject.quantized.items():
        n, k = local_shape(name, shape, subject)
        n = rows.get(name, n)
        if family(said) in ("W4A16", "W4A8-INT") and (n % 32 or k % 32):
            wrong[name] = f"{n:g} x {k:g}: vLLM's 4-bit kernel for CPUs needs multiples of 32 both ways"
    remedy = "leave these layers unquantized, or run the model on a GPU"
    return found + [error("hardware", f"CPU, {some(names)}", text, remedy) for text, names in grouped(wrong)]


def plain_name(name: str) -> str:
    """A device's name as it is compared: small letters and digits, without the maker's name."""
    return re.sub(r"^(nvidia|geforce|amd|intel)|[\s_.-]", "", name.lower())


def find_machine(name: str) -> str:
    """The kind of machine a user means: a column of the tables above; UserError for an unknown name."""
    plain = re.sub(r"^(cuda:?)?(sm)?(?=\d{2,3}$)", "sm", plain_name(name))
    for machine, names in _NAMES.items():
        if plain in names.split() or f"rtx{plain}" in names.split() or plain == machine.lower().replace(" ", ""):
            return machine
    near = difflib.get_close_matches(plain, [word for names in _NAMES.values() for word in names.split()], n=1)
    known = ", ".join(each.split()[min(1, len(each.split()) - 1)] for each in _NAMES.values())
    hint = f"did you mean `{near[0]}`? Or name" if near else f"name a device such as {known}, or"
    raise UserError(f"unknown hardware {name!r}\nhint: {hint} a compute capability: cuda:8.6")


def check_machine(subject: Subject, machine: str) -> list[Finding]:
    """Whether the engine runs this model on that kind of machine: an error where it has no kernel."""
    columns, table = _TABLES.get(subject.engine, ((), {}))
    here = [name for name in columns if name.startswith(machine) or machine.startswith(name)]
    found = cpu_limits(subject) if machine == "CPU" else []
    if subject.engine == "tensorrt-llm" and not here:
        found.append(
            error("hardware", machine, "TensorRT-LLM runs on NVIDIA GPUs from Ampere on", "use another engine")
        )
    if not subject.quantized or found:
        return found
    if not here:
        message = f"what {subject.engine} runs on {machine} is not known here"
        return [info("hardware", machine, message, "load it to find out")]
    runs = hardware(subject)
    able = [name for name, how in runs.items() if how == "yes"]
    elsewhere = f"use {' or '.join(able)}, or another number format" if able else "use another number format"
    for kind in sorted({family(said) for said, _ in subject.quantized.values()}):
        cells = {name: table[kind][columns.index(name)] if kind in table else "?" for name in here}
        if set(cells.values()) == {"yes"}:
            continue
        text = ", ".join(cells.values() if len(set(cells.values())) == 1 else (f"{n} {c}" for n, c in cells.items()))
        if set(cells.values()) == {"no"}:
            found.append(error("hardware", machine, f"{subject.engine} has no kernel for {kind} there", elsewhere))
        elif set(cells.values()) == {"?"}:
            message = f"whether {subject.engine} runs {kind} there is not known here"
            found.append(info("hardware", machine, message, "load it to find out"))
        else:
            found.append(
                warning("hardware", machine, f"{subject.engine} runs {kind} there with a limit: {text}", elsewhere)
            )
    if machine == "CPU" and subject.engine == "vllm" and _four_bits(subject):
        message = "vLLM's 4-bit kernel for CPUs has no float32: --dtype float32 fails at the first token"
        found.append(info("cpu-float32", machine, message, "leave --dtype at auto (bfloat16), or pass float16"))
    return found


def amx_note(subject: Subject) -> list[Finding]:
    """vLLM's default on CPUs with AMX, which changes the results of weight-only 4-bit models."""
    dtype = str(subject.model.get("dtype", subject.model.get("torch_dtype"))).removeprefix("torch.")
    if not _four_bits(subject) or dtype == "float16" or cpu_limits(subject):
        return []
    message = "on a CPU with AMX vLLM rounds the inputs of 4-bit layers to int8 (VLLM_CPU_INT4_W4A8 is 1)"
    return [info("cpu-int8-inputs", "", message, "set VLLM_CPU_INT4_W4A8=0 there to keep inputs unrounded")]


def _four_bits(subject: Subject) -> bool:
    return any(family(said) == "W4A16" for said, _ in subject.quantized.values())
