"""Will an engine load this folder, on which hardware, and with which kernel? From headers and JSON alone.

`preflight` asks the same of what would be written, before a run. Facts about the engines are those of vLLM 0.33,
SGLang 0.5.23, transformers 5.24 with compressed-tensors 0.20, llama.cpp of October and TensorRT-LLM of autumn 2026.

findings.py  what is returned: findings, kernels, the verdict
subject.py   what the rules look at
files.py     headers, index, shards, leftovers, checksums
tensors.py   shapes and dtypes of packed tensors
scales.py    values of scales, zero points and caches
values.py    numbers read with numpy, without torch
config/      what a quantization_config declares
engines/     what each engine accepts
gguf/        the same of a GGUF file
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from quantkit.checkpoint.gguf_header import GgufFile
from quantkit.checkpoint.output_folder import (
    file_hashes,
)
from quantkit.checkpoint.quantization_config import descriptions, quantized_tensor
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import UserError
from quantkit.paths import user_path
from quantkit.suggestions import unknown
from quantkit.verification import files as files
from quantkit.verification import gguf, scales
from quantkit.verification import tensors as layouts
from quantkit.verification.config.other_methods import METHODS, make_subject
from quantkit.verification.engines import hardware as machines
from quantkit.verification.engines import llama_cpp, sglang, tensorrt_llm, transformers, vllm
from quantkit.verification.engines import shared_rules as rules
from quantkit.verification.engines import vllm_kernels as kernels
from quantkit.verification.findings import Finding, Verdict, error, info
from quantkit.verification.subject import (
    ENGINES,
    DeclaredNumbers,
    DeclaredScheme,
    Modules,
    Shape,
    Subject,
    TensorHeader,
)

__all__ = [
    "ENGINES",
    "DeclaredNumbers",
    "DeclaredScheme",
    "Finding",
    "Verdict",
    "file_hashes",
    "judge_gguf",
    "judge_schemes",
    "preflight",
    "verify_folder",
    "verify_layout",
]

_ENGINE_RULES: dict[str, ModuleType] = {
    "vllm": vllm,
    "sglang": sglang,
    "transformers": transformers,
    "llama.cpp": llama_cpp,
    "tensorrt-llm": tensorrt_llm,
}
_ORDER = {"error": 0, "warning": 1, "info": 2}


def preflight(
    quantization_config: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    linears: Mapping[str, Shape],
    model_config: Mapping[str, Any],
    engine: str,
    tp: int = 1,
) -> list[Finding]:
    """Why `engine` would refuse, misread or slow down this model, worst first.

    quantization_config  as it is, or would be, in config.json
    shapes, linears      (N, K) of the quantized modules and of all linear modules, by checkpoint name
    model_config         the model's config.json
    tp                   GPUs each layer is split over
    UserError for an unknown engine or a tp below 1; never for the config, which may be anything.
    """
    return _judge(_subject(quantization_config, shapes, linears, model_config, engine, tp))


def judge_schemes(
    schemes: Sequence[DeclaredScheme], engine: str, cache: Mapping[str, Any] | None = None
) -> tuple[list[Finding], dict[str, str]]:
    """What an engine says of a plain Llama stored as compressed-tensors in these number formats, before there is one.

    cache: its kv_cache_scheme. Returns the findings, worst first, and what each kind of machine does ("yes", "no",
    "weight-only", "slow kernel", ...). UserError for an unknown engine.
    """
    _check_arguments(engine, 1)
    groups = {f"group_{i}": {} for i in range(len(schemes))}
    qc: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "config_groups": groups,
    }
    stated = {f"model.layers.{i}.mlp.down_proj": said for i, said in enumerate(schemes)}
    shapes = dict.fromkeys(stated, (4096, 4096))
    qc["kv_cache_scheme"] = cache
    subject = Subject(qc, "compressed-tensors", {"model_type": "llama"}, shapes, shapes, engine, stated=stated)
    runs = machines.hardware(subject)
    slow = kernels.slow_machines(subject) if engine == "vllm" else set()
    runs |= {name: "slow kernel" for name in slow if runs.get(name) == "yes"}
    return _judge(subject), runs


def judge_gguf(engine: str) -> tuple[list[Finding], dict[str, str]]:
    """As judge_schemes, of a plain Llama in a single GGUF file of any of the types that quantkit writes."""
    _check_arguments(engine, 1)
    return gguf.judge_llama(engine)


def verify_layout(
    tensors: Mapping[str, TensorHeader],
    shapes: Mapping[str, Shape],
    config: Mapping[str, Any],
    engine: str,
    tp: int = 1,
    *,
    hardware: str | None = None,
) -> list[Finding]:
    """What verify_folder will find in a folder of these tensors, the values of tensors aside; worst first.

    tensors  name -> dtype and shape of everything the folder will hold
    shapes   (N, K) of the quantized modules, by the names their tensors begin with
    config   config.json as it will be, its quantization_config included
    hardware  also ask whether it runs there, as verify_folder does
    UserError for an unknown engine or hardware, or a tp below 1.
    """
    qc, modules = config.get("quantization_config"), layouts.modules_of(tensors)
    qc = qc if isinstance(qc, dict) else None
    quantized, linears = layouts.find_shapes(modules, shapes, qc or {})
    found = files.head_missing(config, tensors)
    subject = _subject(qc or {}, quantized, linears, config, engine, tp)
    if hardware is not None:
        found += machines.check_machine(subject, machines.find_machine(hardware))
    if qc is None:
        return _sorted(found + _dense(quantized))
    return _sorted(found + _judge(subject) + _check_headers(subject, modules, tensors))


def _subject(
    qc: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    linears: Mapping[str, Shape],
    model: Mapping[str, Any],
    engine: str,
    tp: int,
) -> Subject:
    _check_arguments(engine, tp)
    return make_subject(dict(qc), shapes, linears, dict(model), engine, tp)


def _check_arguments(engine: str | None, tp: int) -> None:
    if engine is not None and engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    if tp < 1:
        raise UserError(f"tp is the number of GPUs a layer is split over: at least 1, not {tp}")


def _judge(subject: Subject) -> list[Finding]:
    found = rules.common(subject) + _ENGINE_RULES[subject.engine].check(subject)
    if subject.method not in METHODS:
        message = f"quantkit knows no rules for the tensors of {subject.method!r}"
        found.append(info("method-unknown", "quant_method", message, "load it to find out"))
    if subject.engine == "vllm":
        found += vllm.notes(subject) + kernels.slow_kernels(subject)
        if subject.quantized and "yes" not in (runs := machines.hardware(subject)).values():
            where = ", ".join(f"{name} ({how})" for name, how in runs.items() if how not in ("no", "?"))
            found.append(info("hardware", "", f"no hardware runs all of it as it is; {where or 'nothing'}", ""))
    return _sorted(found)


def _sorted(found: list[Finding]) -> list[Finding]:
    return sorted(dict.fromkeys(found), key=lambda finding: _ORDER[finding.level])


def verify_folder(
    path: str | Path,
    engine: str | None = None,
    tp: int = 1,
    *,
    checksums: bool = False,
    hardware: str | None = None,
) -> Verdict:
    """What becomes of a model folder in an engine; None: in each of them, and it loads if any of them loads it.

    checksums  also read every file and compare its sha256 with the report's
    hardware   also ask whether it runs there (cpu, h100, cuda:8.6, ...): refused where the engine has no kernel
    UserError for an unknown engine or hardware, or a tp below 1; never for the folder, which may be anything.
    """
    folder = user_path(path)
    _check_arguments(engine, tp)
    machine = None if hardware is None else machines.find_machine(hardware)
    names = [engine] if engine else ENGINES
    if (file := gguf.open_file(folder)) is not None:
        shared, results = _verify_gguf(folder, file, names, machine, checksums=checksums)
    else:
        shared, checkpoint = _open(folder)
        if checksums:
            shared += files.check_hashes(folder)
        parts = None if checkpoint is None else _read_parts(folder, checkpoint, shared)
        results = {name: _verify(folder, name, tp, shared, parts, machine) for name in names}
    if engine:
        return results[engine]
    verdicts = [result.verdict for result in results.values()]
    verdict = "loads" if "loads" in verdicts else "unknown" if "unknown" in verdicts else "refused"
    return Verdict(str(folder), None, tp, verdict, _sorted(shared), [], {}, results)


def _verify_gguf(
    folder: Path, file: GgufFile | Finding, engines: Sequence[str], machine: str | None, *, checksums: bool
) -> tuple[list[Finding], dict[str, Verdict]]:
    """What concerns every reader, and the verdict of each engine."""
    if isinstance(file, Finding):
        return [file], {name: gguf.judge(folder, file, name, [], machine) for name in engines}
    shared = gguf.read_shared(file) + (files.check_hashes(file.path.parent) if checksums else [])
    return shared, {name: gguf.judge(folder, file, name, _sorted(shared), machine) for name in engines}


@dataclass(frozen=True, slots=True)
class _Parts:
    """What is read from a folder once, for all engines. qc: its quantization_config, None where it has none."""

    checkpoint: Checkpoint
    qc: dict[str, Any] | None
    modules: Modules
    shapes: Mapping[str, Shape]
    linears: Mapping[str, Shape]


def _open(folder: Path) -> tuple[list[Finding], Checkpoint | None]:
    """What is wrong with the files, and the checkpoint where it can be read."""
    if other := files.not_a_model(folder):
        return [other], None
    found = files.check_files(folder)
    if any(finding.level == "error" and finding.rule != "two-models" for finding in found):
        return found, None
    opened = layouts.open_checkpoint(folder)
    if isinstance(opened, Finding):
        return [*found, opened], None
    return found + files.head_missing(opened.config, opened.tensors) + files.check_head(opened), opened


def _read_parts(folder: Path, checkpoint: Checkpoint, shared: list[Finding]) -> _Parts | None:
    """The parts; findings that concern every engine are added to `shared`.

    None where what the folder says of its quantization cannot be read.
    """
    try:  # one that contradicts config.json has findings of its own: engines differ in which of the two they believe
        qc = next(iter(descriptions(checkpoint).values()), None)
    except UserError as problem:
        shared.append(error("no-config", "quantization_config", str(problem), "restore the quantization_config"))
        return None
    shared += files.check_side_configs(folder, qc)
    modules = layouts.modules_of(checkpoint.tensors)
    shapes, linears = layouts.find_shapes(modules, layouts.packed_shapes(checkpoint), qc or {})
    if qc is None and not shapes and (name := quantized_tensor(checkpoint.tensors)):
        message = "it holds codes or scales of a quantized weight, but nothing describes them"
        shared.append(error("no-config", name, message, "restore the quantization_config of config.json"))
    if qc is not None:
        shared += scales.check_values(checkpoint)
    return _Parts(checkpoint, qc, modules, shapes, linears)


def _verify(
    folder: Path, engine: str, tp: int, shared: list[Finding], parts: _Parts | None, machine: str | None
) -> Verdict:
    found, subject = list(shared), None
    if parts is not None:
        subject = _subject(parts.qc or {}, parts.shapes, parts.linears, parts.checkpoint.config, engine, tp)
        found += _dense(parts.shapes) if parts.qc is None else _judge(subject) + _check_parts(subject, parts)
    refused = any(finding.level == "error" for finding in found)
    quantized = parts is not None and parts.qc is not None
    runs = machines.hardware(subject) if subject and quantized and not refused else {}
    if machine is not None and subject and not refused:
        found += machines.check_machine(subject, machine)
        refused = any(finding.level == "error" for finding in found)
    known = subject is not None and (not quantized or subject.method in METHODS)
    verdict = "refused" if refused else "loads" if known else "unknown"
    rows = kernels.kernel_table(subject) if subject and quantized else []
    return Verdict(str(folder), engine, tp, verdict, _sorted(found), rows, runs)


def _check_parts(subject: Subject, parts: _Parts) -> list[Finding]:
    checkpoint, modules = parts.checkpoint, parts.modules
    found = _check_headers(subject, modules, checkpoint.tensors)
    if subject.method not in METHODS or any(finding.rule == "weight-shape" for finding in found):
        return found
    found += scales.check_fused(subject, checkpoint, modules)
    found += scales.check_global(subject, checkpoint, modules)
    return found + scales.check_zeros(subject, checkpoint, modules)


def _check_headers(subject: Subject, modules: Modules, tensors: Mapping[str, TensorHeader]) -> list[Finding]:
    """The stored tensors against the config, as far as names, dtypes and shapes tell."""
    if subject.method not in METHODS:
        return []
    if found := layouts.check_weight_shape(subject, modules):
        return found
    found = layouts.check_tensors(subject, modules) + scales.check_kv(subject, tensors)
    return found + scales.check_channels(subject, tensors)


def _dense(shapes: Mapping[str, Shape]) -> list[Finding]:
    if packed := sorted(shapes):
        message = f"{len(packed)} modules are stored quantized, but config.json has no quantization_config"
        return [error("no-config", packed[0], message, "restore the quantization_config of config.json")]
    return [info("dense", "config.json", "the model is not quantized", "")]
