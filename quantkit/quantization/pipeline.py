"""The straight line: recipe -> targets -> one decoder block after the other -> checkpoint and report.

Only one block's weights, the calibration states and one group's statistics are in memory at any time.
"""

import shutil
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.checkpoint.gguf_writer import header_bytes
from quantkit.checkpoint.journal import Journal
from quantkit.checkpoint.model_folder import TOKENIZERS
from quantkit.checkpoint.output_folder import file_hash, versions
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.tokenizer import locate_tokenizer
from quantkit.checkpoint.writer import ShardWriter
from quantkit.device_names import torch_device
from quantkit.errors import DiskFullError, RunError, UserError
from quantkit.formats import FORMATS
from quantkit.model.block_graph import BlockGraph, matrices_of, trace_block
from quantkit.model.block_trial import (
    once_per_structure,
)
from quantkit.model.expert_stacks import idle_stacks, unstacked
from quantkit.model.meta_model import (
    build_meta_model,
    read_config,
)
from quantkit.model.streamed_model import (
    BlockCall,
    StreamedModel,
)
from quantkit.model.ties import equal_tensors, settle_ties
from quantkit.model.weight_sources import weight_sources
from quantkit.progress import Mode, Progress
from quantkit.quantization.block_quantizer import BlockQuantizer
from quantkit.quantization.calibration.data import CalibrationTokens, data_fingerprint, token_batches
from quantkit.quantization.calibration.given import Given, GivenTokens, given
from quantkit.quantization.calibration.widest import widest_input
from quantkit.quantization.early_checks import check_before_torch, check_given, partial_folder
from quantkit.quantization.engine_check import check_engine, check_result
from quantkit.quantization.gguf_importance import recipe_imatrix, run_importance
from quantkit.quantization.gguf_keys import file_metadata, gguf_remarks, tokenizer_keys
from quantkit.quantization.gguf_layout import candidate_types, plan_for
from quantkit.quantization.gguf_measured import measured_types
from quantkit.quantization.gguf_output import GgufOutput
from quantkit.quantization.head import head_candidate
from quantkit.quantization.held_out import windows_for
from quantkit.quantization.output import (
    make_report,
    write_report,
    write_side_files,
)
from quantkit.quantization.output_layout import file_layout
from quantkit.quantization.resources import (
    StageTimer,
    reuse_pages,
)
from quantkit.quantization.run_context import RunContext
from quantkit.quantization.targets import HEAD, resolve_targets
from quantkit.quantization.transforms.rotation import ModelRotation
from quantkit.recipe.gguf import Measured
from quantkit.recipe.recipe import Recipe
from quantkit.recipe.sections import Calibration
from quantkit.report.block_records import BlockRecord, LinearRecord
from quantkit.report.records import CalibrationRecord, CalibrationSource, Report
from quantkit.verification import file_hashes


def quantize(
    recipe: Recipe,
    output: Path,
    *,
    device: str = "auto",
    restart: bool = False,
    trust_remote_code: bool = False,
    progress: Mode = True,
    calibration: Any = None,
    checkpoint: Checkpoint | None = None,
    expected_seconds: float | None = None,
    beside: Mapping[str, str] | None = None,
) -> Report:
    """Quantize recipe.model into the new folder `output`; returns the report that lies beside the checkpoint.

    calibration  in place of the recipe's data: whatever `calibration.given` takes
    checkpoint  what is quantized in place of what recipe.model names
    progress, expected_seconds  what is shown, and how long the blocks will take by an estimate
    beside  further files of the result: name -> text
    UserError for bad input, before anything is written; RunError for a run that failed. A run that was killed goes on
    where it stopped when called again with the same arguments.
    """
    with Progress(progress, expected=expected_seconds) as bar:
        return _run(recipe, output, device, restart, trust_remote_code, calibration, checkpoint, bar, beside or {})


def _run(
    recipe: Recipe,
    output: Path,
    device: str,
    restart: bool,
    trust_remote_code: bool,
    calibration: Any,
    checkpoint: Checkpoint | None,
    bar: Progress,
    beside: Mapping[str, str],
) -> Report:
    timer = StageTimer()
    reuse_pages()
    recipe, data = _with_data(recipe, calibration)
    if checkpoint is None:
        folder = check_before_torch(recipe, output, device=device, restart=restart, calibrated=data is None)
        bar.stage("loading model")
        checkpoint = Checkpoint.open(folder)
    else:
        check_given(recipe, output, checkpoint, device=device, restart=restart)
    tokenizer, given_imatrix = tokenizer_keys(recipe, checkpoint), recipe_imatrix(recipe)
    streamed, tokens, remarks = prepare(recipe, checkpoint, torch_device(device), trust_remote_code, data)
    whole = streamed
    if recipe.gguf is None:  # which keeps experts in one tensor
        streamed = whole.with_checkpoint(*unstacked(whole.model, whole.sources, whole.checkpoint))
    timer.mark("prepare")
    bar.stage(f"{_amount(tokens)}{bar.expectation()}")
    bar.stage("tracing")
    graphs = trace_all(streamed, folds=bool(recipe.transforms))
    if recipe.experts.calibrate == "all":
        graphs = [replace(graph, every_token=True) for graph in graphs]
    rotation = rotation_for(recipe, streamed, graphs)
    if rotation is not None:
        streamed = streamed.with_rewrite(rotation)
    extra = [] if rotation is None else rotation.layouts
    config = dict(checkpoint.config) if rotation is None else rotation.config(checkpoint.config)
    stored = checkpoint.tensors | {layout.name: layout for layout in extra}
    plan = None if recipe.gguf is None else plan_for(recipe, config, stored)
    types = None if plan is None else candidate_types(plan)
    head = head_candidate(recipe, streamed)
    targets = resolve_targets(recipe, graphs, streamed, extra, types, head)
    if idle := idle_stacks(streamed.checkpoint, targets.schemes):  # written as they were read
        streamed = streamed.with_checkpoint(*unstacked(whole.model, whole.sources, whole.checkpoint, idle))
        targets = resolve_targets(recipe, graphs, streamed, extra, types, head)
    checkpoint = streamed.checkpoint
    format_ = FORMATS[recipe.output.format]
    advice = [*remarks, *check_engine(recipe, targets, checkpoint.tensors, config)]
    measured, importance, shard = None, {}, int(recipe.output.max_shard_gb * 1e9)
    if plan is not None and recipe.gguf is not None:
        dense = [f"{name}.weight" for name, _ in targets.skipped]
        plan = plan.with_dense(dense, stored)
        importance = run_importance(given_imatrix, plan, targets.linears)
        advice += gguf_remarks(plan, config, stored, given_imatrix, importance, tokenizer)
        if isinstance(mix := recipe.gguf.mix, Measured):
            assert tokens is not None, "measured mixes require calibration (validated in the recipe)"
            keys = file_metadata(plan, recipe, tokenizer, _calibration(tokens), given_imatrix)
            headers = header_bytes(keys, plan.layouts(), mix.size or 0, shard)
            gptq = recipe.weights.algorithm == "gptq"
            measured = measured_types(
                recipe.gguf, plan, streamed, tokens.ids_ST, dense, bar, importance, gptq=gptq, headers=headers
            )
            plan = plan.with_types(measured.types)
            targets = resolve_targets(recipe, graphs, streamed, extra, candidate_types(plan))
    key = run_key(recipe, checkpoint, None if tokens is None else tokens.ids_ST, streamed.device)
    if given_imatrix is not None:
        key["imatrix"] = file_hash(given_imatrix[0])
    timer.mark("trace")

    partial = partial_folder(output)
    journal = Journal(partial, key, restart=restart)
    begun = bool(journal.entries)
    try:
        if plan is None:
            writer = ShardWriter(partial, file_layout(checkpoint.tensors, targets, format_), shard)
        else:
            metadata = file_metadata(plan, recipe, tokenizer, _calibration(tokens), given_imatrix)
            writer = GgufOutput(partial, plan, metadata, shard)
        if begun and writer.created:
            raise UserError(f"{partial}: files of the unfinished run are gone; pass --restart to start again")
        run = RunContext(recipe, streamed, graphs, targets, format_, writer, partial, timer, rotation, importance)
        bar.begin(len(streamed.blocks), max(0, len(journal.entries) - 1))
        with closing(BlockQuantizer(run)) as blocks:
            _resume(blocks, journal, tokens, bar)
            for index in range(len(journal.entries) - 1, len(streamed.blocks)):
                record = blocks.quantize_block(index, bar.note)
                writer.sync()
                journal.append(record.to_json())
                bar.advance()
            if targets.of_block(HEAD) and len(journal.entries) == len(streamed.blocks) + 1:
                record = blocks.quantize_head(bar.note)
                writer.sync()
                journal.append(record.to_json())
            held_out = blocks.finish()
        bar.stage("finishing files")
        writer.finish()
        timer.mark("write")
    except (UserError, RunError) as error:
        useless = len(journal.entries) < 2 or (isinstance(error, UserError) and not isinstance(error, DiskFullError))
        if useless and not begun:
            shutil.rmtree(partial)
        raise
    if plan is None:
        write_side_files(checkpoint, partial, format_, targets, rotation)
    for name, text in beside.items():
        (partial / name).write_text(text, encoding="utf-8")
    timer.mark("write")
    records = [BlockRecord.from_json(entry) for entry in journal.entries[1:]]
    gguf = None
    if plan is not None:
        tables = map(LinearRecord.from_json, journal.entries[0]["tables"])
        gguf = plan.record(tables, None if measured is None else measured.to_json())
    report = make_report(
        run, key, _calibration(tokens), records, held_out, advice, writer.data_bytes, file_hashes(partial), gguf
    )
    write_report(partial, report)
    check_result(recipe, partial)
    journal.publish(output)
    return report


def _with_data(recipe: Recipe, calibration: Any) -> tuple[Recipe, Given | None]:
    """The recipe with its calibration data replaced by what a caller gives, and that, where it is not read by name.

    Data from memory has a name that no file has: repeating the run from its report alone is then refused.
    """
    if calibration is None:
        return recipe, None
    data = given(calibration)
    section = (recipe.calibration or Calibration()).model_copy(
        update={"data": data if isinstance(data, str) else data.name}
    )
    return recipe.model_copy(update={"calibration": section}), None if isinstance(data, str) else data


def _amount(tokens: CalibrationTokens | None) -> str:
    """What a run reads: the line that is shown when it begins."""
    if tokens is None:
        return "no calibration data is read"
    samples, seq_len = tokens.ids_ST.shape
    names = " + ".join(source.name for source in tokens.sources)
    bos = ", each begins with BOS" if tokens.bos else ""
    return f"calibrating on {samples} x {seq_len} = {samples * seq_len:,} tokens of {names}{bos}"


def _calibration(tokens: CalibrationTokens | None) -> CalibrationRecord | None:
    if tokens is None:
        return None
    samples, seq_len = tokens.ids_ST.shape
    sources = (CalibrationSource(one.name, one.sha256, one.rows, one.bytes) for one in tokens.sources)
    return CalibrationRecord(data_fingerprint(tokens.ids_ST), samples, seq_len, tokens.bos, tuple(sources))


def _resume(blocks: BlockQuantizer, journal: Journal, tokens: CalibrationTokens | None, bar: Progress) -> None:
    """Copy what lies outside the blocks, and replay the blocks in the journal, so that the next one can start."""
    if not journal.entries:
        records = blocks.copy_unquantized(None if tokens is None else tokens.ids_ST)
        blocks.run.writer.sync()
        journal.append({"block": None, "tables": [record.to_json() for record in records]})
    if tokens is not None:
        blocks.start_states(tokens.ids_ST, tokens.held_out_HT)
    for entry in journal.entries[1:]:
        blocks.replay(entry["block"])
        bar.replayed()
    bar.start_blocks()


def prepare(
    recipe: Recipe, checkpoint: Checkpoint, device: torch.device, trust_remote_code: bool, data: Given | None
) -> tuple[StreamedModel, CalibrationTokens | None, list[str]]:
    """The meta model over its checkpoint, the calibration tokens, and remarks on both for the report."""
    folder = checkpoint.folder
    config = read_config(folder, trust_remote_code=trust_remote_code)
    model = build_meta_model(config, trust_remote_code=trust_remote_code)
    remarks: list[str] = []
    tokens = None
    if recipe.calibration is not None:
        needed = not isinstance(data, GivenTokens) or any((folder / name).exists() for name in TOKENIZERS)
        tokens = token_batches(
            recipe.calibration,
            locate_tokenizer(folder, trust_remote_code) if needed else None,
            max_positions=getattr(config.get_text_config(), "max_position_embeddings", None),
            widest=widest_input(model, recipe),
            held_out=windows_for,
            notes=remarks,
            given=data,
            vocabulary=getattr(config.get_text_config(), "vocab_size", None),
        )
    # A CPU computes fastest and best in float32; without calibration nothing is computed, so nothing is widened.
    # A rotation, though, is computed in float32 at least.
    wide = (device.type == "cpu" and tokens is not None) or any(t.name == "rotation" for t in recipe.transforms)
    compute = torch.promote_types(checkpoint.dtype, torch.float32) if wide else checkpoint.dtype
    sources = weight_sources(model, checkpoint.tensors)
    remarks += settle_ties(model, sources, lambda one, other: equal_tensors(checkpoint, one, other, checkpoint.dtype))
    return StreamedModel(model, sources, checkpoint, compute, device), tokens, remarks


def rotation_for(recipe: Recipe, streamed: StreamedModel, graphs: list[BlockGraph]) -> ModelRotation | None:
    """The rotation the recipe asks for, proved; None where it asks for none."""
    options = next((t.options for t in recipe.transforms if t.name == "rotation"), None)
    return None if options is None else ModelRotation(streamed, graphs, seed=options.seed)


def trace_all(streamed: StreamedModel, *, folds: bool) -> list[BlockGraph]:
    """The graph of every block; blocks of one structure are run (and their folds proved) once."""

    def trace(_: int, block: nn.Module, hidden: Tensor, call: BlockCall) -> BlockGraph:
        if call.skipped:
            return BlockGraph([], [], [], skipped=matrices_of(block, "the model leaves this block out on a text"))
        return trace_block(block, (hidden, *call.args), call.kwargs, folds=folds)

    try:
        return once_per_structure(streamed, trace)
    except UserError:
        if streamed.dtype.itemsize >= torch.float32.itemsize:
            raise
    return once_per_structure(streamed.with_dtype(torch.float32), trace)  # some models mix in float32 what they compute


def run_key(recipe: Recipe, checkpoint: Checkpoint, ids_ST: Tensor | None, device: torch.device) -> dict[str, Any]:
    """What a run's bytes depend on: an unfinished run goes on only under an equal key.

    Where the model and the text lie does not matter, what is in them does.
    """
    return {
        "recipe": recipe.settings(),
        "model": checkpoint.fingerprint(),
        "calibration": None if ids_ST is None else data_fingerprint(ids_ST),
        "versions": versions(),
        "device": device.type,
    }
