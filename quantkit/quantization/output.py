"""Where a run reads from and what it leaves beside the weights: config, tokenizer files, report."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from quantkit.algorithms.gptq import FEW_TOKENS
from quantkit.checkpoint.output_folder import (
    REPORT,
    copy_side_files,
    write_json,
)
from quantkit.checkpoint.quantization_config import (
    OWN_CACHE,
)
from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.interface import Format
from quantkit.quantization.block_quantizer import BlockQuantizer
from quantkit.quantization.output_layout import quantization_config
from quantkit.quantization.targets import LinearTarget, Targets
from quantkit.quantization.transforms.rotation import ModelRotation


def write_side_files(
    checkpoint: Checkpoint,
    folder: Path,
    format_: Format,
    targets: Targets,
    rotation: ModelRotation | None = None,
) -> None:
    """config.json with quantization_config, tokenizer and generation files byte for byte."""
    copy_side_files(checkpoint.folder, folder)
    config = dict(checkpoint.config) if rotation is None else rotation.config(checkpoint.config)
    config["quantization_config"] = quantization_config(targets, format_)
    if targets.kv is not None and targets.stored_kv is None:  # no engine's format describes it: for quantkit's runtime
        config[OWN_CACHE] = asdict(targets.kv)
    for name, content in format_.files(config["quantization_config"]).items():
        write_json(folder / name, content)
    write_json(folder / "config.json", config)


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """quantkit-report.json beside the checkpoint."""
    write_json(folder / REPORT, report)


def make_report(
    key: dict[str, Any], run: BlockQuantizer, blocks: list[dict[str, Any]], size: int, advice: list[str]
) -> dict[str, Any]:
    """quantkit-report.json: what was done to which linear, what was not and why, at which cost."""
    targets, checkpoint, timer = run.targets, run.streamed.checkpoint, run.timer
    records = [record for block in blocks for record in block["linears"]]
    total = len(targets.linears) + sum(1 for _, reason in targets.skipped)
    weights = sum(linear.shape[0] * linear.shape[1] for linear in targets.linears)
    bits = sum(_stored_bits(run.format, linear) for linear in targets.linears)
    rejected = {reason for graph in run.graphs for reason in graph.rejected}
    remarks = [f"{record['name']}: {record['note']}" for record in records if "note" in record]
    return {
        "quantkit": key["versions"]["quantkit"],
        "model": str(checkpoint.folder),
        **key,
        "coverage": f"{len(targets.linears)} of {total} linears quantized",
        "weights_quantized": 1.0 if targets.coverage is None else targets.coverage.share,
        "bits_per_weight": bits / weights,
        "bytes_before": sum(info.nbytes for info in checkpoint.tensors.values()),
        "bytes_after": size,
        "linears": records,
        "skipped": [{"name": name, "reason": reason} for name, reason in targets.skipped],
        "folds": [{"block": block["block"], **fold} for block in blocks for fold in block["folds"]],
        "rotation": None if run.rotation is None else run.rotation.report(),
        "kv_cache": None if targets.kv is None else str(targets.kv),
        "folds_rejected": [{"pair": pair, "reason": reason} for pair, reason in sorted(rejected)],
        "warnings": [*advice, *targets.notes, *_too_few_tokens(records), *remarks],
        "seconds": {stage: round(seconds, 3) for stage, seconds in timer.stages.items()},
        "seconds_total": round(sum(timer.stages.values()), 3),
        "peak_memory_bytes": timer.peak_bytes(),
    }


def _too_few_tokens(records: list[dict[str, Any]]) -> list[str]:
    """One warning if any linear was quantized by GPTQ with fewer than FEW_TOKENS tokens per input feature, or none."""
    counted = [(record["tokens"], record["shape"][1], record["name"]) for record in records if "tokens" in record]
    few = [(tokens / K, tokens, K, name) for tokens, K, name in counted if tokens < FEW_TOKENS * K]
    if not few:
        return []
    _, tokens, K, name = min(few)
    return [
        f"{len(few)} of {len(counted)} linears saw fewer than {FEW_TOKENS} calibration tokens per input feature "
        f"(fewest: {name}, {tokens} tokens for {K} features), so GPTQ was damped and gains less; "
        "raise calibration.samples or calibration.seq_len"
    ]


def _stored_bits(format_: Format, linear: LinearTarget) -> int:
    """Bits of one weight in the checkpoint: codes, scales and zero points (not the two numbers of a weight_shape)."""
    layout = format_.layout(linear.shape, linear.scheme, linear.scale_dtype)
    return sum(
        8 * dtype.itemsize * torch.Size(shape).numel()
        for suffix, (dtype, shape) in layout.items()
        if suffix not in ("weight_shape", "g_idx")
    )
