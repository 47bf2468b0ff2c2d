"""A folder's files: damaged headers, shards against their index, what an earlier quantization left, checksums."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from quantkit.checkpoint.header import read_header, read_json
from quantkit.checkpoint.output_folder import file_hashes
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import UserError
from quantkit.verification.findings import (
    Finding,
    error,
    info,
    warning,
)
from quantkit.verification.subject import (
    is_head,
    leaf,
    some,
)

INDEX = "model.safetensors.index.json"
REPORT = "quantkit-report.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_WEIGHTS = ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight")
_FETCH = "the folder is incomplete or damaged: fetch or export it again"


def not_a_model(folder: Path) -> Finding | None:
    """Why this path cannot be a model folder at all; None where it may be one."""
    where, remedy = str(folder), "give the path of a model folder: config.json beside model.safetensors"
    if folder.is_file():
        return error("no-folder", where, "it is a file, not a folder", remedy)
    if not folder.is_dir():
        return error("no-folder", where, "there is no such folder", remedy)
    if not os.access(folder, os.R_OK | os.X_OK):
        return error("no-folder", where, "the folder cannot be read", "check its permissions")
    if any((folder / name).exists() for name in _WEIGHTS):
        return None
    names = sorted(path.name for path in folder.iterdir())
    if adapter := next((name for name in names if name.startswith(("adapter_model.", "adapter_config."))), None):
        message = "this is an adapter (LoRA), not a model: its weights mean nothing without the base model"
        return error("adapter", adapter, message, "merge it into its base model and verify the merged folder")
    if not names:
        return error("no-folder", where, "the folder is empty", remedy)
    weights = [name for name in names if name.endswith((".safetensors", ".bin", ".pt", ".pth", ".onnx"))]
    what = f"; it holds {some(weights)}" if weights else ""
    message = f"there is neither model.safetensors nor {INDEX}, nor either under the name pytorch_model{what}"
    return error("no-weights", where, message, remedy)


def check_files(folder: Path) -> list[Finding]:
    """Headers, index and shards. Errors here mean that nothing else can be judged."""
    single, index = folder / "model.safetensors", folder / INDEX
    found: list[Finding] = []
    if index.exists():
        found += _check_index(folder, index)
        if single.exists():
            message = "there is a single model.safetensors and an index of shards: readers take one or the other"
            found.append(error("two-models", single.name, message, "delete whichever is stale"))
    elif single.exists():
        found += _header(single)[1]
    found += _strays(folder)
    if not any((folder / name).exists() for name in _TOKENIZERS):
        message = "there is no tokenizer: engines that serve text need one"
        found.append(info("no-tokenizer", str(folder.name), message, "copy the tokenizer files of the source model"))
    return found


def _header(path: Path) -> tuple[dict[str, Any], list[Finding]]:
    """(the file's tensors, what is wrong with its header)."""
    try:
        tensors = read_header(path)
    except UserError as problem:
        return {}, [error("header", path.name, str(problem), _FETCH)]
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or metadata.get("format") != "pt":
        message = 'the header lacks {"format": "pt"}: transformers before 5 refuses the file'
        return tensors, [warning("metadata", path.name, message, "save it again with that metadata")]
    return tensors, []


def _check_index(folder: Path, index: Path) -> list[Finding]:
    try:
        content = read_json(index, "")
    except UserError as problem:
        return [error("index", index.name, str(problem), _FETCH)]
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        return [error("index", index.name, "there is no weight_map of tensors to files", _FETCH)]
    found: list[Finding] = []
    home: dict[str, str] = {}
    total = 0
    present = {path.name for path in folder.iterdir() if path.is_file()}
    for file in sorted(set(weight_map.values())):
        path = folder / file
        if file not in present:
            found.append(error("shard-missing", file, f"{index.name} names this file, but it is not there", _FETCH))
            continue
        tensors, problems = _header(path)
        found += problems
        total += sum(tensor.nbytes for tensor in tensors.values())
        for name in tensors:
            if name in home:
                message = f"{name} is in {home[name]} too: one of the two files is stale"
                found.append(error("tensor-twice", file, message, "delete the stale file and fix the index"))
            home[name] = file
    if any(finding.level == "error" for finding in found):
        return found
    wrong = [name for name, file in weight_map.items() if home.get(name) != file]
    if wrong:
        message = f"the index says it is in {weight_map[wrong[0]]}, but it is not ({len(wrong)} such tensors)"
        found.append(error("index-mismatch", wrong[0], message, _FETCH))
    if extra := sorted(home.keys() - weight_map.keys()):
        message = f"the index does not list it ({len(extra)} such tensors), so readers that follow it never see it"
        found.append(warning("index-extra", extra[0], message, "write the index again"))
    metadata = content.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    if stated is not None and stated != total:
        message = f"total_size says {stated} bytes, the shards hold {total}"
        found.append(warning("total-size", index.name, message, "write the index again"))
    return found


def _strays(folder: Path) -> list[Finding]:
    """Weights that no index names: leftovers that are uploaded along, or taken for the model by another reader."""
    stray = sorted(path.name for pattern in ("pytorch_model*.bin", "pytorch_model.bin.index.json", "consolidated*")
                   for path in folder.glob(pattern))  # fmt: skip
    safe = sorted(path.name for path in folder.glob("*.safetensors"))
    index = folder / INDEX
    if index.exists():
        try:
            named = set((read_json(index, "").get("weight_map") or {}).values())
        except (UserError, AttributeError, TypeError):
            named = set(safe)
        stray += [name for name in safe if name not in named and not name.startswith("consolidated")]
    elif (folder / "model.safetensors").exists():
        stray += [name for name in safe if name != "model.safetensors" and not name.startswith("consolidated")]
    else:
        stray = []  # old .bin models are all there is
    if (folder / "original").is_dir():
        stray.append("original/")
    if not stray:
        return []
    message = f"{', '.join(stray[:3])}{' ...' if len(stray) > 3 else ''} belong to no part of this model"
    return [warning("stale", stray[0], message, "delete them: they cost space, and some readers prefer them")]


def check_side_configs(folder: Path, qc: dict[str, Any] | None) -> list[Finding]:
    """quantize_config.json, quant_config.json and hf_quant_config.json left over from another quantization."""
    found = []
    method = str((qc or {}).get("quant_method", "")).lower()
    if method == "modelopt" and not (folder / "hf_quant_config.json").exists():
        message = "ModelOpt's own file is absent: some readers know nothing but that"
        found.append(
            info("no-side-config", "hf_quant_config.json", message, "write both, the inline config and the file")
        )
    rightful = {
        "quantize_config.json": ("gptq", "awq"),
        "quant_config.json": ("awq",),
        "hf_quant_config.json": ("modelopt", "modelopt_fp4"),
    }
    for name, methods in rightful.items():
        path = folder / name
        if not path.exists():
            continue
        remedy = f"delete {name}, or write the same as quantization_config of config.json"
        try:
            content = read_json(path, "")
        except UserError as problem:
            found.append(error("side-config", name, str(problem), remedy))
            continue
        if qc is not None and method not in methods:
            message = f"it is of another quantization than {method or 'config.json'}; engines may pick it up"
            found.append(warning("stale", name, message, f"delete {name}"))
        elif qc is not None:
            keys = ("bits", "group_size", "desc_act", "sym", "checkpoint_format", "zero_point")
            differing = [key for key in keys if key in content and key in qc and content[key] != qc[key]]
            inner = content.get("quantization")
            if isinstance(inner, dict) and "quant_algo" in qc and inner.get("quant_algo") != qc["quant_algo"]:
                differing.append("quant_algo")
            if differing:
                message = f"{differing[0]} differs from config.json's quantization_config"
                found.append(error("side-config", name, message, remedy))
    return found


def head_missing(config: Mapping[str, Any], tensors: Iterable[str]) -> list[Finding]:
    """An untied model that stores no head. tensors: their names."""
    names = list(tensors)
    stored = any(is_head(name.rpartition(".")[0]) for name in names)
    if _tied(config) is not False or stored or not any(name.endswith(_EMBEDDINGS) for name in names):
        return []
    message = "tie_word_embeddings is false but there is no lm_head: it would be random"
    return [error("head-missing", "lm_head", message, "export again with the head")]


def _tied(config: Mapping[str, Any]) -> Any:
    inner = config.get("text_config")
    inner = inner if isinstance(inner, dict) else {}
    return config.get("tie_word_embeddings", inner.get("tie_word_embeddings"))


def check_head(checkpoint: Checkpoint) -> list[Finding]:
    """Tied embeddings with an lm_head of its own."""
    head = next((n for n in checkpoint.tensors if leaf(n) == "weight" and is_head(n[:-7])), None)
    embed = next((n for n in checkpoint.tensors if n.endswith(_EMBEDDINGS)), None)
    if _tied(checkpoint.config) is not True or embed is None or head is None:
        return []
    first, second = checkpoint.tensors[head], checkpoint.tensors[embed]
    if first.shape == second.shape and first.tag == second.tag and first.shape and first.nbytes:
        size = first.nbytes // first.shape[0]
        starts = sorted({size * (i * (first.shape[0] - 1) // 15) for i in range(16)})
        if all(checkpoint.raw(head, at, at + size) == checkpoint.raw(embed, at, at + size) for at in starts):
            return []
    message = "tie_word_embeddings is true, yet a different lm_head is stored: engines do not agree on which to use"
    return [warning("tied-head", head, message, "set tie_word_embeddings to false, or store no lm_head")]


def check_hashes(folder: Path) -> list[Finding]:
    """The files against the sha256 sums of the report that was written with them."""
    path = folder / REPORT
    try:
        stated = read_json(path, "").get("files") if path.exists() else None
    except UserError as problem:
        return [error("report", REPORT, str(problem), _FETCH)]
    if not isinstance(stated, dict) or not stated:
        message = f"there is no table of checksums in {REPORT}"
        return [info("no-checksums", REPORT, message, "only folders written by quantkit have one")]
    actual = file_hashes(folder)
    wrong = [name for name, value in stated.items() if actual.get(name) != value]
    text = "its sha256 is not the one it was written with"
    return [error("checksum", name, text if name in actual else "it is missing", _FETCH) for name in wrong]
