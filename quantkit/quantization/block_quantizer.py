"""What happens to each decoder block of a run, and the two streams of calibration states that pass through them.

states:   what the blocks see behind the quantized ones before them (or the original ones, `propagate: original`).
original: what the original model's blocks see, kept only where the re-fit needs it as its target.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import Tensor

from quantkit.grids.activations import UNCALIBRATED, KVRange, stored_scale
from quantkit.grids.dequantize import dequantize
from quantkit.model.streamed_model import release
from quantkit.quantization.block_files import copy_unquantized, fill_written, round_rest, write_quantized, write_rest
from quantkit.quantization.calibration import hidden_states as cal
from quantkit.quantization.calibration.expert_statistics import share, side_by_side
from quantkit.quantization.calibration.input_ranges import InputRanges, is_static
from quantkit.quantization.calibration.kv_scales import cache_places, calibrate
from quantkit.quantization.calibration.spill import allocate
from quantkit.quantization.calibration.staged_forward import StagedForward, fits
from quantkit.quantization.calibration.statistics import OutputDrift, Statistic, rows_of
from quantkit.quantization.gguf_output import GgufOutput
from quantkit.quantization.gguf_tables import quantized_ends, write_tables
from quantkit.quantization.head import head_statistic, head_weight, written_head
from quantkit.quantization.held_out import HeldOut, Ranges
from quantkit.quantization.linear_quantizer import ExpertTokens, block_columns, needs_hessian, needs_of, quantize_group
from quantkit.quantization.resources import return_pages
from quantkit.quantization.run_context import BlockContext, RunContext
from quantkit.quantization.targets import HEAD, LinearTarget
from quantkit.quantization.transforms.scale_folding import TRANSFORMS
from quantkit.report.block_records import BlockRecord, FoldRecord, LinearRecord
from quantkit.report.records import HeldOutRecord
from quantkit.types import QuantizedWeight

Members = tuple[int, list[LinearTarget]]  # an input group of a block and its linears
Note = Callable[[str], None]  # shows what is being done


class BlockQuantizer:
    """One run; blocks are quantized or replayed strictly in order."""

    def __init__(self, run: RunContext) -> None:
        self.run = run
        self.states: cal.HiddenStates | None = None
        self.original: cal.HiddenStates | None = None
        self._kept: dict[int, Tensor] = {}
        self._threads: StagedForward | None = None
        self._cache_places = cache_places(run.streamed) if run.targets.kv is not None else []
        self._held_out: HeldOut | None = None
        self._other_embedding = False  # whether the states begin with a quantized embedding

    def close(self) -> None:
        """End the threads of the run."""
        if self._threads is not None:
            self._threads.close()

    def copy_unquantized(self, ids_ST: Tensor | None) -> list[LinearRecord]:
        """Write every tensor that belongs to no block's parameter; returns the records of quantized ones (of a GGUF).

        ids_ST  the calibration tokens, None without any
        """
        copy_unquantized(self.run)
        records = write_tables(self.run, ids_ST) if isinstance(self.run.writer, GgufOutput) else []
        self.run.timer.mark("copy")
        return records

    def start_states(self, ids_ST: Tensor | None, held_out_ST: Tensor | None = None) -> None:
        """Compute what reaches block 0 from the calibration tokens and the held-out ones, [samples, seq] each."""
        if ids_ST is None:
            return
        if held_out_ST is not None:
            self._held_out = HeldOut(self.run, held_out_ST, self._cache_places)
        streamed, _ = quantized_ends(self.run) if self._propagates else (self.run.streamed, None)
        self.states = cal.HiddenStates(streamed, ids_ST, self.run.folder)
        self._other_embedding = streamed is not self.run.streamed
        if self._propagates and any(needs_of(linear).original_inputs for linear in self.run.targets.linears):
            if self._other_embedding:
                self.original = cal.HiddenStates(self.run.streamed, ids_ST, self.run.folder)
            else:
                self.original = self.states.fork(self.run.folder)
        self.run.timer.mark("embed")

    def replay(self, index: int) -> None:
        """Run a block finished before a kill again, from the written tensors: the states go on as they were."""
        if self.states is None or index >= len(self.run.streamed.blocks):  # the head: nothing is behind it
            return
        context = self._fill(index)
        if self.original is not None:
            self.original.advance(context.block, index)
        if self._held_out is not None:
            self._held_out.run_original(context)
        if not self._propagates:
            self.states.advance(context.block, index)
        if self._propagates or self._held_out is not None:
            ranges = fill_written(self.run, context)
            if self._held_out is not None:
                self._held_out.run_quantized(context, ranges, self._written_cache_scales(index))
        if self._propagates:
            self.states.advance(context.block, index)
        release(context.block)
        self.run.timer.mark("replay")

    def quantize_block(self, index: int, note: Note) -> BlockRecord:
        """Transform, quantize and write one block; returns its records for the report."""
        context = self._fill(index)
        self.run.timer.mark("read")
        originals = self._run_original(context)
        if self._held_out is not None:
            self._held_out.run_original(context)
            self.run.timer.mark("held-out")
        folds = self.transform_block(context, originals, note)
        stages = self._stages(context)
        staged = self._begin_staged(context, stages)
        linears, input_ranges = self.quantize_stages(context, stages, staged, originals, note)
        self.calibrate_cache(context)
        self.propagate(context, staged)
        if self._held_out is not None:
            self._held_out.run_quantized(context, input_ranges, self._written_cache_scales(index))
            self.run.timer.mark("held-out")
        write_rest(self.run, context)
        self.run.timer.mark("write")
        release(context.block)
        return_pages()
        return BlockRecord(index, tuple(folds), tuple(linears))

    def transform_block(self, context: BlockContext, originals: dict[int, Tensor], note: Note) -> list[FoldRecord]:
        """Apply the recipe's transforms in order; `originals`, inputs to compare with, are scaled alike."""
        folds: list[FoldRecord] = []
        for transform in self.run.recipe.transforms:
            if transform.name in TRANSFORMS:  # a rotation is not: the block was rotated when it was read
                assert self.states is not None, "transforms require calibration (validated in the recipe)"
                note(transform.name)
                done = TRANSFORMS[transform.name](transform.options, self.states, context)
                folds += done.records
                for group in originals.keys() & done.scales.keys():
                    originals[group] /= done.scales[group].to(originals[group])
            round_rest(self.run, context)
            self.run.timer.mark(transform.name)
        return folds

    def quantize_stages(
        self,
        context: BlockContext,
        stages: list[list[Members]],
        staged: StagedForward | None,
        originals: dict[int, Tensor],
        note: Note,
    ) -> tuple[list[LinearRecord], Ranges]:
        """Quantize and write the block's linears, each stage behind everything quantized before it.

        Returns their records, and the ranges of their inputs by name.
        """
        records: list[LinearRecord] = []
        input_ranges: Ranges = {}
        for stage in stages:
            note(stage[0][1][0].site.name)
            drifts = _drifts(context, stage, originals)
            ranges = InputRanges(stage)
            statistics = self._statistics(context, stage, staged, drifts, ranges)
            # An importance matrix says more of an expert than the tokens of others do.
            below = 0 if self.run.importance else self.run.recipe.experts.share_below
            reached = share(statistics, side_by_side(context.graph, [group for group, _ in stage]), below)
            for group, linears in stage:
                drift = drifts.pop(group).finish() if group in drifts else {}
                tokens = ExpertTokens(reached[group], reached[group] < below) if group in reached else None
                for record, q in self._quantize_group(
                    context, group, linears, statistics.pop(group, None), drift, ranges, tokens
                ):
                    records.append(record)
                    input_ranges[record.name] = q.input
            self.run.timer.mark("quantize")
        return records, input_ranges

    def calibrate_cache(self, context: BlockContext) -> None:
        """Write the static scales of the block's keys and values, as its quantized weights make them."""
        targets, options = self.run.targets, self.run.recipe.kv_cache
        if targets.kv is None or not targets.kv.calibrated:
            return
        assert self.states is not None, "static caches require calibration (validated in the recipe)"
        assert options is not None
        index = context.index
        found = calibrate(self.states, context.block, index, self._cache_places[index], targets.kv, options)
        scales = [scale for scale in found if scale is not None]
        for layout, scale in zip(targets.kv_scales[index], scales, strict=True):
            self.run.writer.write(layout.name, scale.reshape(layout.shape))
        self.run.timer.mark("cache")

    def propagate(self, context: BlockContext, staged: StagedForward | None) -> None:
        """Replace the states by the quantized block's outputs, where another block will see them."""
        if self.states is not None and self._propagates and self._goes_on(context.index):
            staged.finish() if staged is not None else self.states.advance(context.block, context.index)
            self.run.timer.mark("propagate")
        elif staged is not None:
            staged.drop()

    def quantize_head(self, note: Note) -> BlockRecord:
        """Quantize and write the head, behind the last block; returns its record."""
        linears = self.run.targets.of_block(HEAD)
        note(linears[0].name)
        statistic = None
        if self.states is not None:
            needs = {"hessian": needs_hessian(linears), "block": block_columns(linears)}
            statistic = head_statistic(self.run, self.states, **needs)
        weights = {linear.name: head_weight(self.run, linear) for linear in linears}
        signed = self.run.format.SIGNED_SCALES
        records = []
        for linear, q, record in quantize_group(weights, linears, statistic, {}, signed=signed):
            write_quantized(self.run, linear, q)
            records.append(record)
        self.run.timer.mark("head")
        return BlockRecord(len(self.run.streamed.blocks), (), tuple(records))

    def finish(self) -> HeldOutRecord | None:
        """How the quantized model does on the held-out windows, behind the last block; None where there are none."""
        if self._held_out is None:
            return None
        found = self._held_out.finish(written_head(self.run))
        self.run.timer.mark("held-out")
        return found

    def _written_cache_scales(self, index: int) -> KVRange:
        """What was written for a block's cache."""
        kv = self.run.targets.kv
        if kv is None or not kv.calibrated:
            return UNCALIBRATED
        read = (stored_scale(self.run.writer.read(layout.name)) for layout in self.run.targets.kv_scales[index])
        sides = (kv.keys, kv.values)
        return KVRange(*(next(read).to(self.run.streamed.device) if s and s.calibrated else None for s in sides))

    def _goes_on(self, index: int) -> bool:
        """Whether anything is calibrated on what leaves this block."""
        return index + 1 < len(self.run.streamed.blocks) or bool(self.run.targets.of_block(HEAD))

    @property
    def _propagates(self) -> bool:
        """Whether blocks see the outputs of quantized ones."""
        return self.run.recipe.propagate == "quantized"

    def _fill(self, index: int) -> BlockContext:
        block = self.run.streamed.fill(index)
        return BlockContext(index, block, self.run.graphs[index], self.run.targets.of_block(index))

    def _run_original(self, context: BlockContext) -> dict[int, Tensor]:
        """Advance the original stream; returns the inputs [tokens, K] of every group that will be re-fitted."""
        if self.original is None:
            return {}
        states = self.original
        wanted = {
            group
            for group, members in context.groups()
            # An expert's tokens differ between the two streams, so there is no pair to compare.
            if any(needs_of(linear).original_inputs for linear in members) and members[0].site.index is None
        }
        if context.index == 0 and not self._other_embedding:
            wanted -= {0}  # nothing is quantized before it: both streams are the same
        inputs: dict[int, Tensor] = {}

        def keep(group: int, tokens: slice, x_MK: Tensor) -> None:
            rows = rows_of(tokens, len(x_MK))
            if rows is None:  # no pair to compare
                return
            if group not in inputs:
                each = (rows.stop - rows.start) // (tokens.stop - tokens.start)
                inputs[group] = self._array(group, (each * states.tokens, x_MK.shape[1]), x_MK)
            inputs[group][rows] = x_MK.cpu()

        if wanted:
            cal.run(states, context.block, context.graph, context.index, wanted, keep, advance=True)
        else:
            states.advance(context.block, context.index)
        self.run.timer.mark("original")
        return inputs

    def _array(self, group: int, shape: tuple[int, int], like: Tensor) -> Tensor:
        """Room for a group's original inputs, the same in every block."""
        kept = self._kept.get(group)
        if kept is None or kept.shape != shape:
            kept = self._kept[group] = allocate(shape, like.dtype, self.run.folder)
        return kept

    def _stages(self, context: BlockContext) -> list[list[Members]]:
        """Groups in execution order, those that may share one run of the block together.

        A Hessian is gathered behind the quantized groups before it; rounding needs no such order, nor does
        `propagate: original`. All experts of a layer run side by side.
        """
        groups = context.groups()
        if self.states is None or not self._propagates or not needs_hessian(context.linears):
            return [groups] if groups else []
        stages = [[(group, members) for group, members in groups if group in stage] for stage in context.graph.stages]
        return [stage for stage in stages if stage]

    def _begin_staged(self, context: BlockContext, stages: list[list[Members]]) -> StagedForward | None:
        """Batches that halt at each stage, where they fit into memory; None: every stage runs the block again."""
        widest = max((linear.shape[1] for linear in context.linears), default=0)
        if self.states is None or len(stages) < 2 or not fits(self.states, context.graph, widest):
            return None
        self._threads = self._threads or StagedForward(self.states)
        self._threads.begin(context.block, context.graph, context.index)
        return self._threads

    def _statistics(
        self,
        context: BlockContext,
        stage: list[Members],
        staged: StagedForward | None,
        drifts: dict[int, OutputDrift],
        ranges: InputRanges,
    ) -> dict[int, Statistic]:
        """What the algorithms of a stage ask for, by input group; drifts and ranges see the same inputs."""
        statistics: dict[int, Statistic] = {}
        if self.states is None:
            return statistics
        wanted = {group: (needs_hessian(members), block_columns(members)) for group, members in stage}

        def observe(group: int, tokens: slice, x_MK: Tensor) -> None:
            if group not in statistics:
                hessian, block = wanted[group]
                statistics[group] = Statistic.empty(x_MK, hessian=hessian, block=block)
            statistics[group].add(x_MK)
            ranges.add(group, x_MK)
            if group in drifts:
                drifts[group].add(x_MK, tokens)

        if staged is not None:
            staged.stop_at(stage[0][0], observe)
        else:
            advance = not self._propagates and self._goes_on(context.index)
            cal.run(self.states, context.block, context.graph, context.index, set(wanted), observe, advance=advance)
        for statistic in statistics.values():
            statistic.finish()
        self.run.timer.mark("statistics")
        return statistics

    def _quantize_group(
        self,
        context: BlockContext,
        group: int,
        linears: list[LinearTarget],
        statistic: Statistic | None,
        drift: dict[str, Tensor],
        ranges: InputRanges,
        expert: ExpertTokens | None,
    ) -> Iterator[tuple[LinearRecord, QuantizedWeight]]:
        """Quantize the linears of one input, write them, and leave the quantized weights in the block."""
        weights, calibrated = {linear.name: linear.view(context.block) for linear in linears}, self.states is not None
        signed = self.run.format.SIGNED_SCALES
        results = quantize_group(
            weights,
            linears,
            statistic,
            drift,
            signed=signed,
            calibrated=calibrated,
            importance=self.run.importance,
            expert=expert if calibrated else None,
        )
        for linear, q, record in results:
            if is_static(linear):
                q = replace(q, input=ranges.range_of(linear, group))
            if calibrated:
                linear.view(context.block).copy_(dequantize(q))
            write_quantized(self.run, linear, q)
            yield record, q


def _drifts(context: BlockContext, stage: list[Members], originals: dict[int, Tensor]) -> dict[int, OutputDrift]:
    """Sums of what the outputs of a stage's linears lost in the layers before, by input group; consumes originals."""
    return {
        group: OutputDrift(
            {linear.name: linear.view(context.block) for linear in members if needs_of(linear).original_inputs},
            originals.pop(group),
        )
        for group, members in stage
        if group in originals
    }
