"""What a model folder holds, told from its headers and config.json alone: no weight is read.

Bits per weight counts codes, scales and zero points of the quantized linears; the model's figure counts every tensor.
"""

import json
import re
from collections.abc import Collection
from math import prod
from pathlib import Path
from typing import Any

from quantkit.checkpoint.header import TensorInfo
from quantkit.checkpoint.output_folder import REPORT
from quantkit.checkpoint.quantization_config import CHANNEL_NAMES, descriptions, quantization_config
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import UserError
from quantkit.formats.common import listed
from quantkit.formats.described_folder import DescribedFolder

IGNORE_KEYS = ("ignore", "exclude_modules", "modules_to_not_convert", "ignored_layers")
PAYLOAD = {
    **dict.fromkeys(("weight_packed", "qweight", "weight"), "codes"),
    **dict.fromkeys(("weight_scale", "weight_scale_inv", "scales", "weight_global_scale", "weight_scale_2"), "scales"),
    **dict.fromkeys(("weight_zero_point", "qzeros"), "zero points"),
}
INPUTS = ("input_scale", "input_zero_point", "input_global_scale")
KINDS = PAYLOAD | dict.fromkeys(INPUTS, "input ranges") | {"weight_shape": "shapes", "g_idx": "group of each column"}


def inspect_checkpoint(path: str | Path) -> dict[str, Any]:
    """Scheme of every module, sizes by kind of tensor, what is not quantized and why, and the shards.

    UserError for a folder that is not a readable checkpoint. A way of quantizing that quantkit cannot read is named
    under "note", and figures that would need it are None.
    """
    checkpoint = Checkpoint.open(Path(path))
    tensors, stated = checkpoint.tensors, quantization_config(checkpoint) or {}
    folder, note = None, None
    if stated:
        try:
            folder = DescribedFolder.open(checkpoint)
        except UserError as error:
            note = str(error)
    modules = {} if folder is None else {name: _module(folder, name) for name in folder.schemes}
    cache = None if folder is None else folder.cache

    rest = [name for name in tensors if _owner(name) not in modules or name.endswith(".bias")]
    weights = sum(prod(module["shape"]) for module in modules.values())
    parameters = weights + sum(prod(tensors[name].shape) for name in rest)
    stored = sum(info.nbytes for info in tensors.values())
    payload = sum(module["bytes"] for module in modules.values())
    return {
        "path": str(path),
        "architecture": _architecture(checkpoint.config),
        "method": stated.get("quant_method"),
        "described_by": next(iter(descriptions(checkpoint)), None),
        "format": stated.get("format"),
        "kv_cache": None if cache is None else str(cache),
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
        "unquantized": _unquantized(checkpoint, rest, stated),
        "shards": _shards(tensors),
    }


def _architecture(config: dict[str, Any]) -> str:
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else "unknown"


def _module(folder: DescribedFolder, name: str) -> dict[str, Any]:
    """One quantized linear, from headers."""
    (N, K), scheme = folder.shape(name), folder.schemes[name]
    size = sum(
        folder.checkpoint.info(tensor).nbytes for suffix, tensor in folder.own(name).items() if suffix in PAYLOAD
    )
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
    if suffix in ("k_scale", "v_scale", *CHANNEL_NAMES):
        return "key and value scales"
    if suffix in KINDS and (suffix != "weight" or owner in modules):
        return KINDS[suffix]
    if suffix == "bias":
        return "biases"
    if len(info.shape) < 2:
        return "norms and vectors"
    inner = config.get("text_config")
    if info.shape[0] == (inner if isinstance(inner, dict) else config).get("vocab_size"):
        return "output head" if _owner(name).endswith("lm_head") else "embeddings"
    return "dense weights"


def _unquantized(checkpoint: Checkpoint, names: list[str], stated: dict[str, Any]) -> list[dict[str, Any]]:
    """Tensors that keep their values, each with the best reason known: the run's report first, then the config."""
    config = checkpoint.config
    given = _skipped(checkpoint.folder)
    ignored = _ignored(stated)
    found = []
    for name in names:
        info = checkpoint.tensors[name]
        kind = _kind(name, info, config)
        reason = given.get(_owner(name)) or given.get(name)
        if kind in KINDS.values():
            reason = "packed in a way quantkit does not read"
        elif reason is None and kind in ("biases", "norms and vectors", "embeddings", "key and value scales"):
            reason = f"{kind} are never quantized"
        elif reason is None and not stated:
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


def _ignored(stated: dict[str, Any]) -> list[str]:
    """Names and patterns of the modules that the description excludes, under whichever key its method has."""
    inner = stated.get("quantization")
    parts = (stated, inner if isinstance(inner, dict) else {})
    lists = [part.get(key) for part in parts for key in IGNORE_KEYS]
    return [name for names in lists if isinstance(names, list) for name in names if isinstance(name, str)]


def _matches(name: str, patterns: list[str]) -> bool:
    try:
        by_regex = any(re.match(p[3:], name) for p in patterns if p.startswith("re:"))
    except re.error:
        by_regex = False  # what such a description means is for the format's reader to say
    return by_regex or listed(name, [p for p in patterns if not p.startswith("re:")])


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _shards(tensors: dict[str, TensorInfo]) -> list[dict[str, Any]]:
    files = sorted({info.file for info in tensors.values()})
    counts = {file: sum(info.file == file for info in tensors.values()) for file in files}
    return [{"file": file.name, "bytes": file.stat().st_size, "tensors": counts[file]} for file in files]
