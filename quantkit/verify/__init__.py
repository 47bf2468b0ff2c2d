"""Will an engine load this folder, on which hardware, and with which kernel? From headers and JSON alone.

`preflight` asks the same of what would be written, before a run. Facts about the engines are those of vLLM 0.33,
SGLang 0.5.23, transformers 5.23, llama.cpp of October and TensorRT-LLM of autumn 2026.

findings.py  a finding: what, where, what to do
subject.py   what the rules look at
files.py     headers, index, shards, leftovers, checksums
tensors.py   shapes and dtypes of packed tensors
scales.py    values of scales, zero points and caches
config/      what a quantization_config declares
engines/     what each engine accepts
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from quantkit.checkpoint.header import read_json
from quantkit.checkpoint.output_folder import (
    file_hashes,
)
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import UserError
from quantkit.verify import files as files
from quantkit.verify import scales
from quantkit.verify import tensors as layouts
from quantkit.verify.config.other_methods import METHODS, make_subject
from quantkit.verify.engines import (
    llama_cpp as llamacpp,
)
from quantkit.verify.engines import (
    sglang,
    transformers,
    vllm,
)
from quantkit.verify.engines import (
    shared_rules as rules,
)
from quantkit.verify.engines import (
    tensorrt_llm as tensorrt,
)
from quantkit.verify.engines import (
    vllm_kernels as kernels,
)
from quantkit.verify.findings import (
    Finding,
    error,
    info,
)
from quantkit.verify.subject import (
    ENGINES,
    Modules,
    Shape,
    Subject,
    TensorHeader,
)

__all__ = ["ENGINES", "Finding", "file_hashes", "preflight", "verify_folder", "verify_layout"]

_ENGINE_RULES: dict[str, ModuleType] = {
    "vllm": vllm,
    "sglang": sglang,
    "transformers": transformers,
    "llama.cpp": llamacpp,
    "tensorrt-llm": tensorrt,
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


def verify_layout(
    tensors: Mapping[str, TensorHeader],
    shapes: Mapping[str, Shape],
    config: Mapping[str, Any],
    engine: str,
    tp: int = 1,
) -> list[Finding]:
    """What verify_folder will find in a folder of these tensors, the values of tensors aside; worst first.

    tensors  name -> dtype and shape of everything the folder will hold
    shapes   (N, K) of the quantized modules, by the names their tensors begin with
    config   config.json as it will be, its quantization_config included
    UserError for an unknown engine or a tp below 1.
    """
    qc, modules = config.get("quantization_config"), layouts.modules_of(tensors)
    qc = qc if isinstance(qc, dict) else None
    quantized, linears = layouts.find_shapes(modules, shapes, qc or {})
    found = files.head_missing(config, tensors)
    if qc is None:
        return _sorted(found + _dense(quantized))
    subject = _subject(qc, quantized, linears, config, engine, tp)
    return _sorted(found + _judge(subject) + _check_headers(subject, modules, tensors))


def _subject(
    qc: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    linears: Mapping[str, Shape],
    model: Mapping[str, Any],
    engine: str,
    tp: int,
) -> Subject:
    if engine not in ENGINES:
        raise UserError(f"unknown engine {engine!r}; there are {', '.join(ENGINES)}")
    if tp < 1:
        raise UserError(f"tp is the number of GPUs a layer is split over: at least 1, not {tp}")
    return make_subject(dict(qc), shapes, linears, dict(model), engine, tp)


def _judge(subject: Subject) -> list[Finding]:
    found = rules.common(subject) + _ENGINE_RULES[subject.engine].check(subject)
    if subject.method not in METHODS:
        message = f"quantkit knows no rules for the tensors of {subject.method!r}"
        found.append(info("method-unknown", "quant_method", message, "load it to find out"))
    if subject.engine == "vllm":
        found += vllm.notes(subject) + kernels.slow_kernels(subject)
        if subject.quantized and "yes" not in (machines := kernels.hardware(subject)).values():
            where = ", ".join(f"{name} ({how})" for name, how in machines.items() if how not in ("no", "?"))
            found.append(info("hardware", "", f"no hardware runs all of it as it is; {where or 'nothing'}", ""))
    return _sorted(found)


def _sorted(found: list[Finding]) -> list[Finding]:
    return sorted(dict.fromkeys(found), key=lambda finding: _ORDER[finding.level])


def verify_folder(
    path: str | Path, engine: str | None = None, tp: int = 1, *, checksums: bool = False
) -> dict[str, Any]:
    """What becomes of a model folder in an engine (None: in each of them), as plain JSON values.

    {path, engine, tp, verdict, findings, kernels, hardware}; with engine None also engines: {name: such a dict}, and
    the verdict is "loads" if any engine loads it. verdict: "loads"; "refused" if it does not load or loads wrong
    weights; "unknown" if the format is not one we know. checksums: also read every file and compare its sha256.
    UserError for an unknown engine or a tp below 1.
    """
    folder = Path(path)
    if engine is not None:
        _subject({}, {}, {}, {}, engine, tp)
    if tp < 1:
        raise UserError(f"tp is the number of GPUs a layer is split over: at least 1, not {tp}")
    shared, checkpoint = _open(folder)
    if checksums:
        shared += files.check_hashes(folder)
    parts = None if checkpoint is None else _parts(folder, checkpoint, shared)
    results = {name: _verify(folder, name, tp, shared, parts) for name in ([engine] if engine else ENGINES)}
    if engine:
        return results[engine]
    verdicts = [result["verdict"] for result in results.values()]
    verdict = next((v for v in ("loads", "unknown") if v in verdicts), "refused")
    whole = {"path": str(folder), "engine": None, "tp": tp, "verdict": verdict}
    return whole | {"findings": _plain(shared), "kernels": [], "hardware": {}, "engines": results}


def _open(folder: Path) -> tuple[list[Finding], Checkpoint | None]:
    """What is wrong with the files, and the checkpoint where it can be read."""
    if not folder.is_dir():
        return [error("no-folder", str(folder), "there is no such folder", "give the path of a model folder")], None
    found = files.check_files(folder)
    if any(finding.level == "error" and finding.rule != "two-models" for finding in found):
        return found, None
    opened = layouts.open_checkpoint(folder)
    if isinstance(opened, Finding):
        return [*found, opened], None
    return found + files.head_missing(opened.config, opened.tensors) + files.check_head(opened), opened


def _parts(folder: Path, checkpoint: Checkpoint, shared: list[Finding]) -> dict[str, Any]:
    """Everything read from the folder once, for all engines; findings that concern all go to `shared`."""
    qc = _quantization_config(folder, checkpoint)
    shared += files.check_side_configs(folder, qc)
    modules = layouts.modules_of(checkpoint.tensors)
    shapes, linears = layouts.find_shapes(modules, layouts.packed_shapes(checkpoint), qc or {})
    if qc is not None:
        shared += scales.check_values(checkpoint)
    return {"checkpoint": checkpoint, "qc": qc, "modules": modules, "shapes": shapes, "linears": linears}


def _quantization_config(folder: Path, checkpoint: Checkpoint) -> dict[str, Any] | None:
    """quantization_config, from config.json or else from the file of its kind; None: there is none."""
    config = checkpoint.config
    inner = config.get("text_config")
    for holder in (config, inner if isinstance(inner, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if isinstance(holder.get(key), dict):
                return holder[key]
    for name, method in (("hf_quant_config.json", "modelopt"), ("quantize_config.json", "gptq")):
        if (folder / name).exists():
            try:
                return {"quant_method": method} | read_json(folder / name, "")
            except UserError:
                return {"quant_method": method}
    return None


def _verify(folder: Path, engine: str, tp: int, shared: list[Finding], parts: dict[str, Any] | None) -> dict[str, Any]:
    found, subject = list(shared), None
    if parts is not None and parts["qc"] is None:
        found += _dense(parts["shapes"])
    elif parts is not None:
        subject = _subject(parts["qc"], parts["shapes"], parts["linears"], parts["checkpoint"].config, engine, tp)
        found += _judge(subject)
        if subject.method in METHODS:
            found += _check_parts(subject, parts)
    found = _sorted(found)
    refused = any(finding.level == "error" for finding in found)
    unknown = subject is not None and subject.method not in METHODS
    return {
        "path": str(folder),
        "engine": engine,
        "tp": tp,
        "verdict": "refused" if refused else "unknown" if unknown else "loads",
        "findings": _plain(found),
        "kernels": kernels.kernel_table(subject) if subject else [],
        "hardware": kernels.hardware(subject) if subject and not refused else {},
    }


def _check_parts(subject: Subject, parts: dict[str, Any]) -> list[Finding]:
    checkpoint, modules = parts["checkpoint"], parts["modules"]
    found = _check_headers(subject, modules, checkpoint.tensors)
    if any(finding.rule == "weight-shape" for finding in found):
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
    return layouts.check_tensors(subject, modules) + scales.check_kv(subject, tensors)


def _dense(shapes: Mapping[str, Shape]) -> list[Finding]:
    if packed := sorted(shapes):
        message = f"{len(packed)} modules are stored quantized, but config.json has no quantization_config"
        return [error("no-config", packed[0], message, "restore the quantization_config of config.json")]
    return [info("dense", "config.json", "the model is not quantized", "")]


def _plain(found: list[Finding]) -> list[dict[str, str]]:
    return [asdict(finding) for finding in _sorted(found)]
