"""What a model folder holds, told from its headers and config.json alone: no weight is read.

Bits per weight counts codes, scales and zero points of the quantized linears; the model's figure counts every tensor.
"""

import json
import re
from collections.abc import Collection
from math import prod
from pathlib import Path
from typing import Any

from quantkit.checkpoint.reader import Checkpoint, TensorInfo
from quantkit.errors import UserError
from quantkit.formats import FORMATS, format_name
from quantkit.formats.quantized_folder import outline
from quantkit.types import Scheme

REPORT = "quantkit-report.json"
PAYLOAD = {
    **dict.fromkeys(("weight_packed", "qweight", "weight"), "codes"),
    **dict.fromkeys(("weight_scale", "weight_scale_inv", "scales", "weight_global_scale", "weight_scale_2"), "scales"),
    **dict.fromkeys(("weight_zero_point", "qzeros"), "zero points"),
}
INPUTS = ("input_scale", "input_zero_point", "input_global_scale")
KINDS = PAYLOAD | dict.fromkeys(INPUTS, "input ranges") | {"weight_shape": "shapes", "g_idx": "group of each column"}


def inspect_folder(path: str | Path) -> dict[str, Any]:
    """Scheme of every module, sizes by kind of tensor, what is not quantized and why, and the shards.

    UserError for a folder that is not a readable checkpoint. A way of quantizing that quantkit cannot read is named
    under "note", and figures that would need it are None.
    """
    checkpoint = Checkpoint.open(Path(path))
    quantization = checkpoint.config.get("quantization_config") or {}
    tensors = checkpoint.tensors
    schemes, format_, note = _schemes(quantization, tensors)
    modules = {name: _module(checkpoint, name, FORMATS[str(format_)], scheme) for name, scheme in schemes.items()}

    rest = [name for name in tensors if _owner(name) not in modules or name.endswith(".bias")]
    weights = sum(prod(module["shape"]) for module in modules.values())
    parameters = weights + sum(prod(tensors[name].shape) for name in rest)
    stored = sum(info.nbytes for info in tensors.values())
    payload = sum(module["bytes"] for module in modules.values())
    return {
        "path": str(path),
        "architecture": (checkpoint.config.get("architectures") or ["unknown"])[0],
        "method": quantization.get("quant_method"),
        "format": quantization.get("format"),
        "note": note,
        "modules": modules,
        "parameters": None if note else parameters,
        "bits_per_weight": {
            "quantized": 8 * payload / weights if weights else None,
            "model": None if note else 8 * stored / parameters,
        },
        "bytes": stored,
        "bf16_bytes": None if note else 2 * parameters,
        "kinds": _kinds(tensors, checkpoint.config, modules.keys()),
        "unquantized": _unquantized(checkpoint, rest),
        "shards": _shards(tensors),
    }


def _schemes(
    quantization: dict[str, Any], tensors: dict[str, TensorInfo]
) -> tuple[dict[str, Scheme], str | None, str | None]:
    """Scheme of every quantized module, the name of the format, and what is in the way of reading it."""
    if not quantization:
        return {}, None, None
    name = format_name(quantization)
    if name is None:
        method = quantization.get("quant_method")
        return {}, None, f"quantkit does not read quant_method {method!r}; it reads {', '.join(FORMATS)}"
    mark = f".{FORMATS[name].MARK}"
    packed = sorted(tensor.removesuffix(mark) for tensor in tensors if tensor.endswith(mark))
    if not packed:
        return {}, name, f"config.json says {name}, but no tensor is packed that way"
    try:
        return FORMATS[name].read_config(quantization, packed), name, None
    except UserError as error:
        return {}, name, str(error)


def _module(checkpoint: Checkpoint, name: str, format_: Any, scheme: Scheme) -> dict[str, Any]:
    """One quantized linear. A two-number weight_shape is the only tensor that is read."""
    tensors = outline(checkpoint, name, format_.SUFFIXES)
    try:
        N, K = format_.check_tensors(tensors, scheme)
    except UserError as error:
        raise UserError(f"{checkpoint.folder}: {name}: {error}") from error
    size = sum(checkpoint.info(f"{name}.{suffix}").nbytes for suffix in tensors if suffix in PAYLOAD)
    return {
        "scheme": str(scheme),
        "bits": scheme.weights.bits,
        "group_size": scheme.weights.group_size,
        "symmetric": scheme.weights.symmetric,
        "shape": [N, K],
        "bytes": size,
        "bits_per_weight": 8 * size / (N * K),
    }


def _kinds(
    tensors: dict[str, TensorInfo], config: dict[str, Any], modules: Collection[str]
) -> dict[str, dict[str, int]]:
    kinds: dict[str, dict[str, int]] = {}
    for name, info in tensors.items():
        kind = kinds.setdefault(_kind(name, info, config, modules), {"tensors": 0, "bytes": 0})
        kind["tensors"] += 1
        kind["bytes"] += info.nbytes
    return dict(sorted(kinds.items(), key=lambda item: -item[1]["bytes"]))


def _kind(name: str, info: TensorInfo, config: dict[str, Any], modules: Collection[str] = ()) -> str:
    owner, _, suffix = name.rpartition(".")
    if suffix in ("k_scale", "v_scale"):
        return "key and value scales"
    if suffix in KINDS and (suffix != "weight" or owner in modules):
        return KINDS[suffix]
    if suffix == "bias":
        return "biases"
    if len(info.shape) < 2:
        return "norms and vectors"
    if info.shape[0] == (config.get("text_config") or config).get("vocab_size"):
        return "output head" if _owner(name).endswith("lm_head") else "embeddings"
    return "dense weights"


def _unquantized(checkpoint: Checkpoint, names: list[str]) -> list[dict[str, Any]]:
    """Tensors that keep their values, each with the best reason known: the run's report first, then the config."""
    config = checkpoint.config
    quantization = config.get("quantization_config")
    given = _skipped(checkpoint.folder)
    ignored = (quantization or {}).get("ignore") or []
    found = []
    for name in names:
        info = checkpoint.tensors[name]
        kind = _kind(name, info, config)
        reason = given.get(_owner(name)) or given.get(name)
        if kind in KINDS.values():
            reason = "packed in a way quantkit does not read"
        elif reason is None and kind in ("biases", "norms and vectors", "embeddings"):
            reason = f"{kind} are never quantized"
        elif reason is None and not quantization:
            reason = "the folder is not quantized"
        elif reason is None:
            reason = "ignored by the recipe" if _matches(_owner(name), ignored) else "not said"
        found.append(_entry(name, kind, reason, info))
    has_head = any(_owner(name).endswith("lm_head") for name in checkpoint.tensors)
    if config.get("tie_word_embeddings") and not has_head:
        found.append({"name": "lm_head", "kind": "output head", "reason": "tied to the embedding", "bytes": 0})
    return found


def _entry(name: str, kind: str, reason: str, info: TensorInfo) -> dict[str, Any]:
    return {"name": name, "kind": kind, "reason": reason, "shape": list(info.shape), "bytes": info.nbytes}


def _skipped(folder: Path) -> dict[str, str]:
    """Reasons of the run that wrote the folder, by module name; a missing or foreign report has none to give."""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        return {entry["name"]: entry["reason"] for entry in report.get("skipped", [])}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{folder / REPORT}: not a report of quantkit: {error}") from error


def _matches(name: str, patterns: list[str]) -> bool:
    return any(re.match(p[3:], name) if p.startswith("re:") else p == name for p in patterns)


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _shards(tensors: dict[str, TensorInfo]) -> list[dict[str, Any]]:
    files = sorted({info.file for info in tensors.values()})
    counts = {file: sum(info.file == file for info in tensors.values()) for file in files}
    return [{"file": file.name, "bytes": file.stat().st_size, "tensors": counts[file]} for file in files]
