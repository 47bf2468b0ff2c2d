"""Where a run reads from and what it leaves beside the weights: config, tokenizer files, report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from quantkit.algorithms.gptq import FEW_TOKENS
from quantkit.checkpoint.hub import revision
from quantkit.checkpoint.output_folder import REPORT, copy_side_files, write_json
from quantkit.checkpoint.quantization_config import OWN_CACHE
from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats import Format
from quantkit.quantization.output_layout import quantization_config
from quantkit.quantization.run_context import RunContext
from quantkit.quantization.targets import LinearTarget, Targets
from quantkit.quantization.transforms.rotation import ModelRotation
from quantkit.report.block_records import BlockRecord, LinearRecord, RejectedFold, SkippedLinear
from quantkit.report.records import CalibrationRecord, GgufRecord, HeldOutRecord, Report


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
        config[OWN_CACHE] = targets.kv.to_json()
    for name, content in format_.files(config["quantization_config"]).items():
        write_json(folder / name, content)
    write_json(folder / "config.json", config)


def write_report(folder: Path, report: Report) -> None:
    """quantkit-report.json beside the checkpoint."""
    write_json(folder / REPORT, report.to_json())


def make_report(
    run: RunContext,
    key: Mapping[str, Any],
    calibration: CalibrationRecord | None,
    blocks: Sequence[BlockRecord],
    held_out: HeldOutRecord | None,
    advice: Sequence[str],
    bytes_after: int,
    files: dict[str, str],
    gguf: GgufRecord | None = None,
) -> Report:
    """What was done to which linear, what was not and why, at which cost.

    key     of the run (recipe, model, calibration, versions, device); files: sha256 by name
    calibration  what its statistics come from
    advice  remarks on what was given, first among the warnings
    """
    targets, checkpoint = run.targets, run.streamed.checkpoint
    records = [record for block in blocks for record in block.linears]
    rejected = {reason for graph in run.graphs for reason in graph.rejected}
    remarks = [f"{record.name}: {record.note}" for record in records if record.note is not None]
    return Report(
        quantkit=key["versions"]["quantkit"],
        model=run.recipe.model,
        model_revision=revision(checkpoint.folder),
        model_fingerprint=key["model"],
        recipe=run.recipe.resolved(),
        calibration=calibration,
        versions=key["versions"],
        device=key["device"],
        coverage=f"{len(targets.linears)} of {len(targets.linears) + len(targets.skipped)} linears quantized",
        weights_quantized=1.0 if targets.coverage is None else targets.coverage.share,
        bits_per_weight=_bits_per_weight(run),
        bytes_before=sum(info.nbytes for info in checkpoint.tensors.values()),
        bytes_after=bytes_after,
        blocks=tuple(blocks),
        held_out=held_out,
        gguf=gguf,
        skipped=tuple(SkippedLinear(name, reason) for name, reason in targets.skipped),
        rotation=None if run.rotation is None else run.rotation.report(),
        kv_cache=None if targets.kv is None else str(targets.kv),
        folds_rejected=tuple(RejectedFold(pair, reason) for pair, reason in sorted(rejected)),
        warnings=(*advice, *targets.notes, *_too_few_tokens(records), *_unseen_positions(run, calibration), *remarks),
        seconds={stage: round(spent, 3) for stage, spent in run.timer.stages.items()},
        peak_memory_bytes=run.timer.peak_bytes(),
        files=files,
    )


def _too_few_tokens(records: Sequence[LinearRecord]) -> list[str]:
    """One warning if any linear was quantized by GPTQ with fewer than FEW_TOKENS tokens per input feature, or none."""
    counted = [(record.gptq.tokens, record.shape[1], record.name) for record in records if record.gptq is not None]
    few = [(tokens / K, tokens, K, name) for tokens, K, name in counted if tokens < FEW_TOKENS * K]
    if not few:
        return []
    _, tokens, K, name = min(few)
    return [
        f"{len(few)} of {len(counted)} linears saw fewer than {FEW_TOKENS} calibration tokens per input feature "
        f"(fewest: {name}, {tokens} tokens for {K} features), so GPTQ was damped and gains less; "
        "raise calibration.samples or calibration.seq_len"
    ]


def _unseen_positions(run: RunContext, calibration: CalibrationRecord | None) -> list[str]:
    """A warning if constants of key channels come from fewer positions than the model has, or none."""
    kv, config = run.targets.kv, run.streamed.model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if kv is None or kv.keys is None or not kv.keys.channels or calibration is None or not isinstance(longest, int):
        return []
    if calibration.seq_len >= longest:
        return []
    return [
        f"constants of key channels come from positions up to {calibration.seq_len}, the model has {longest}: keys "
        "change with the position, and on longer texts than that the constants can do harm; set calibration.seq_len "
        "to the longest text it will see"
    ]


def _bits_per_weight(run: RunContext) -> float:
    linears = run.targets.linears
    bits = sum(_stored_bits(run.format, linear) for linear in linears)
    return bits / sum(linear.shape[0] * linear.shape[1] for linear in linears)


def _stored_bits(format_: Format, linear: LinearTarget) -> int:
    """Bits of one weight in the checkpoint: codes, scales and zero points (not the two numbers of a weight_shape)."""
    layout = format_.layout(linear.shape, linear.scheme, linear.scale_dtype)
    return sum(
        8 * dtype.itemsize * torch.Size(shape).numel()
        for suffix, (dtype, shape) in layout.items()
        if suffix not in ("weight_shape", "g_idx")
    )
