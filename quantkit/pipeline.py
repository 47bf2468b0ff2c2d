"""The straight line: recipe -> plan -> one decoder block after the other -> checkpoint and report.

Only one block's weights, the calibration states and one group's statistics are in memory at any time.
"""

import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.algorithms.gptq import FEW_TOKENS
from quantkit.blocks import BlockCall, Skeleton, build_meta_model, read_config
from quantkit.cache import scale_layouts
from quantkit.checkpoint.journal import Journal
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.writer import ShardWriter
from quantkit.clock import Clock
from quantkit.data import data_fingerprint, token_batches
from quantkit.errors import DiskFullError, RunError, UserError
from quantkit.formats import FORMATS
from quantkit.graph import BlockGraph, trace_block
from quantkit.memory import reuse_pages
from quantkit.naming import weight_sources
from quantkit.output import check_output, locate_model, locate_tokenizer, versions, write_report, write_side_files
from quantkit.plan import Linear, file_layout, make_plan, output_bytes
from quantkit.preflight import check_engine, check_result
from quantkit.progress import Progress
from quantkit.recipe import Recipe
from quantkit.rotate import Rotator
from quantkit.run import Run
from quantkit.trial import once_per_structure
from quantkit.verify import file_hashes


def quantize(
    recipe: Recipe,
    output: Path,
    *,
    device: str = "auto",
    restart: bool = False,
    trust_remote_code: bool = False,
    progress: bool = True,
    calibration_ids: Tensor | None = None,
) -> dict[str, Any]:
    """Quantize recipe.model into the new folder `output`; returns the report that lies beside the checkpoint.

    calibration_ids, [samples, seq] token ids, stand in for the recipe's calibration text.
    UserError for bad input, before anything is written; RunError for a run that failed. A run that was killed goes on
    where it stopped when called again with the same arguments.
    """
    clock = Clock()
    reuse_pages()
    check_output(output)
    checkpoint = Checkpoint.open(locate_model(recipe))
    skeleton, ids_ST = _prepare(recipe, checkpoint, _device(device), trust_remote_code, calibration_ids)
    clock.lap("prepare")
    graphs = trace_all(skeleton, folds=bool(recipe.transforms))
    skeleton.rotation = rotation_for(recipe, skeleton, graphs)
    plan = make_plan(recipe, graphs, skeleton)
    format_ = FORMATS[recipe.output.format]
    if skeleton.rotation is not None:
        plan = replace(plan, extra=skeleton.rotation.layouts)
    if plan.kv is not None:
        plan = replace(plan, kv_scales=scale_layouts(plan.kv, format_.KV_NAMES, plan, skeleton))
    advice = check_engine(recipe, plan, checkpoint, format_)
    units = file_layout(checkpoint, plan, format_)
    key = run_key(recipe, checkpoint, ids_ST, skeleton.device)
    clock.lap("trace")

    partial = output.with_name(output.name + ".partial")
    journal = Journal(partial, key, restart=restart)
    begun = bool(journal.entries)
    try:
        writer = ShardWriter(partial, units, int(recipe.output.max_shard_gb * 1e9))
        if begun and writer.created:
            raise UserError(f"{partial}: files of the unfinished run are gone; pass --restart to begin anew")
        run = Run(recipe, skeleton, graphs, plan, format_, writer, partial, clock)
        with closing(run):
            _walk_blocks(run, journal, ids_ST, progress)
    except (UserError, RunError) as error:
        useless = len(journal.entries) < 2 or (isinstance(error, UserError) and not isinstance(error, DiskFullError))
        if useless and not begun:
            shutil.rmtree(partial)
        raise
    write_side_files(checkpoint, partial, format_, plan, skeleton.rotation)
    clock.lap("write")
    report = make_report(key, run, journal.entries[1:], output_bytes(units), advice)
    report["files"] = file_hashes(partial)
    write_report(partial, report)
    check_result(recipe, partial)
    journal.publish(output)
    return report


def _walk_blocks(run: Run, journal: Journal, ids_ST: Tensor | None, progress: bool) -> None:
    """All blocks in order: those in the journal are replayed, the others quantized and journaled."""
    total = len(run.skeleton.blocks)
    with Progress(total, enabled=progress) as bar:
        if not journal.entries:
            run.copy_outside()
            run.writer.sync()
            journal.append({"block": None})
        run.start_states(ids_ST)
        for entry in journal.entries[1:]:
            run.replay(entry["block"])
            bar.advance(f"block {entry['block']} was done")
        for index in range(len(journal.entries) - 1, total):
            entry = run.quantize_block(index, bar.note)
            run.writer.sync()
            journal.append({"block": index, **entry})
            bar.advance(f"block {index}")
    run.writer.finish()
    run.clock.lap("write")


def _prepare(
    recipe: Recipe, checkpoint: Checkpoint, device: torch.device, trust_remote_code: bool, ids_ST: Tensor | None
) -> tuple[Skeleton, Tensor | None]:
    """The meta model over its checkpoint, and the calibration tokens."""
    folder = checkpoint.folder
    if "quantization_config" in checkpoint.config:
        method = checkpoint.config["quantization_config"].get("quant_method", "unknown")
        raise UserError(f"{folder} is already quantized ({method}); start from the original model")
    config = read_config(folder, trust_remote_code=trust_remote_code)
    model = build_meta_model(config, trust_remote_code=trust_remote_code)
    if ids_ST is None and recipe.calibration is not None:
        ids_ST = token_batches(
            recipe.calibration,
            locate_tokenizer(folder, trust_remote_code),
            max_positions=getattr(config.get_text_config(), "max_position_embeddings", None),
        )
    # A CPU computes fastest and best in float32; without calibration nothing is computed, so nothing is widened.
    # A rotation, though, is computed in float32 at least.
    wide = (device.type == "cpu" and ids_ST is not None) or any(t.name == "rotation" for t in recipe.transforms)
    compute = torch.promote_types(checkpoint.dtype, torch.float32) if wide else checkpoint.dtype
    return Skeleton(model, weight_sources(model, checkpoint.tensors), checkpoint, compute, device), ids_ST


def _device(name: str) -> torch.device:
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def rotation_for(recipe: Recipe, skeleton: Skeleton, graphs: list[BlockGraph]) -> Rotator | None:
    """The rotation the recipe asks for, proved; None where it asks for none."""
    options = next((t.options for t in recipe.transforms if t.name == "rotation"), None)
    return None if options is None else Rotator(skeleton, graphs, seed=options.seed)


def trace_all(skeleton: Skeleton, *, folds: bool) -> list[BlockGraph]:
    """The graph of every block; blocks of one structure are run (and their folds proved) once."""

    def trace(_: int, block: nn.Module, hidden: Tensor, call: BlockCall) -> BlockGraph:
        return trace_block(block, (hidden, *call.args), call.kwargs, folds=folds)

    return once_per_structure(skeleton, trace)


def run_key(recipe: Recipe, checkpoint: Checkpoint, ids_ST: Tensor | None, device: torch.device) -> dict[str, Any]:
    """What a run's bytes depend on: an unfinished run goes on only under an equal key.

    Where the model and the text lie does not matter, what is in them does.
    """
    settings = recipe.resolved()
    settings.pop("model")
    settings.pop("calibration")
    return {
        "recipe": settings,
        "model": checkpoint.fingerprint(),
        "calibration": None if ids_ST is None else data_fingerprint(ids_ST),
        "versions": versions(),
        "device": device.type,
    }


def make_report(
    key: dict[str, Any], run: Run, blocks: list[dict[str, Any]], size: int, advice: list[str]
) -> dict[str, Any]:
    """quantkit-report.json: what was done to which linear, what was not and why, at which cost."""
    plan, checkpoint, clock = run.plan, run.skeleton.checkpoint, run.clock
    records = [record for block in blocks for record in block["linears"]]
    total = len(plan.linears) + sum(1 for _, reason in plan.skipped)
    weights = sum(linear.shape[0] * linear.shape[1] for linear in plan.linears)
    bits = sum(_stored_bits(run.format, linear) for linear in plan.linears)
    rejected = {reason for graph in run.graphs for reason in graph.rejected}
    remarks = [f"{record['name']}: {record['note']}" for record in records if "note" in record]
    return {
        "quantkit": key["versions"]["quantkit"],
        "model": str(checkpoint.folder),
        **key,
        "coverage": f"{len(plan.linears)} of {total} linears quantized",
        "bits_per_weight": bits / weights,
        "bytes_before": sum(info.nbytes for info in checkpoint.tensors.values()),
        "bytes_after": size,
        "linears": records,
        "skipped": [{"name": name, "reason": reason} for name, reason in plan.skipped],
        "folds": [{"block": block["block"], **fold} for block in blocks for fold in block["folds"]],
        "rotation": None if run.skeleton.rotation is None else run.skeleton.rotation.report(),
        "kv_cache": None if plan.kv is None else str(plan.kv),
        "folds_rejected": [{"pair": pair, "reason": reason} for pair, reason in sorted(rejected)],
        "warnings": [*advice, *plan.notes, *_too_few_tokens(records), *remarks],
        "seconds": {stage: round(seconds, 3) for stage, seconds in clock.stages.items()},
        "seconds_total": round(sum(clock.stages.values()), 3),
        "peak_memory_bytes": clock.peak_bytes(),
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


def _stored_bits(format_: Any, linear: Linear) -> int:
    """Bits of one weight on file: codes, scales and zero points (not the two numbers of a weight_shape)."""
    layout = format_.layout(linear.shape, linear.scheme, linear.scale_dtype)
    return sum(
        8 * dtype.itemsize * torch.Size(shape).numel()
        for suffix, (dtype, shape) in layout.items()
        if suffix not in ("weight_shape", "g_idx")
    )
