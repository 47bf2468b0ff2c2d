"""One run over the decoder blocks: two streams of calibration states, and what happens to a block.

states:   what the blocks see behind the quantized ones before them (or the original ones, `propagate: original`).
original: what the original model's blocks see, kept only where the re-fit needs it as its target.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.checkpoint.writer import ShardWriter
from quantkit.formats.interface import Format
from quantkit.grids.dequantize import (
    dequantize,
)
from quantkit.model.block_graph import BlockGraph
from quantkit.model.streamed_model import StreamedModel, check_finite, release
from quantkit.model.weight_sources import TensorSlice
from quantkit.quantization.calibration import hidden_states as cal
from quantkit.quantization.calibration.input_ranges import InputRanges, is_static
from quantkit.quantization.calibration.kv_scales import cache_places, calibrate
from quantkit.quantization.calibration.staged_forward import StagedForward, fits
from quantkit.quantization.calibration.statistics import (
    OutputDrift,
    Statistic,
)
from quantkit.quantization.linear_quantizer import needs_of, quantize_group
from quantkit.quantization.resources import (
    StageTimer,
    return_pages,
)
from quantkit.quantization.targets import LinearTarget, Targets
from quantkit.quantization.transforms.rotation import ModelRotation
from quantkit.quantization.transforms.scale_folding import TRANSFORMS
from quantkit.recipe.recipe import Recipe
from quantkit.report.records import FoldRecord, LinearRecord

Members = tuple[int, list[LinearTarget]]  # an input group of a block and its linears


class BlockQuantizer:
    """The parts of one run; blocks are quantized or replayed strictly in order."""

    def __init__(
        self,
        recipe: Recipe,
        streamed: StreamedModel,
        graphs: list[BlockGraph],
        targets: Targets,
        format_: Format,
        writer: ShardWriter,
        folder: Path,
        timer: StageTimer,
        rotation: ModelRotation | None = None,
    ) -> None:
        self.recipe, self.streamed, self.graphs, self.targets = recipe, streamed, graphs, targets
        self.format, self.writer, self.folder, self.timer = format_, writer, folder, timer
        self.rotation = rotation
        self.states: cal.HiddenStates | None = None
        self.original: cal.HiddenStates | None = None
        self._kept: dict[int, Tensor] = {}
        self._lockstep: StagedForward | None = None
        self._cache_places = cache_places(streamed) if targets.kv_scales else []

    def close(self) -> None:
        """Let go of everything that would outlive the run."""
        if self._lockstep is not None:
            self._lockstep.close()

    def copy_unquantized(self) -> None:
        """Copy every tensor that belongs to no block's parameter, bytes as they are, NaN and Inf refused."""
        checkpoint = self.streamed.checkpoint
        in_blocks = {
            piece.name
            for index, block in enumerate(self.streamed.blocks)
            for name, _ in block.named_parameters()
            for piece in self.streamed.sources[self.streamed.prefix(index) + name]
        }
        rotation = self.rotation
        turned = set(rotation.sources) if rotation is not None else set[str]()
        for name in turned:
            assert rotation is not None
            for start, rows in rotation.chunks(name):
                self.writer.write_rows(name, start, rows)
        for name, info in checkpoint.tensors.items():
            if name in in_blocks or name in turned:
                continue
            if len(info.shape) == 2:
                step = max(1, (64 << 20) // max(1, info.shape[1] * info.dtype.itemsize))
                for start in range(0, info.shape[0], step):
                    check_finite(checkpoint.rows(name, torch.arange(start, min(start + step, info.shape[0]))), name)
            else:
                check_finite(checkpoint.read(name), name)
            self.writer.copy_from(checkpoint, name, name)
        self.timer.mark("copy")

    def start_states(self, ids_ST: Tensor | None) -> None:
        """Compute what reaches block 0 from the calibration tokens [samples, seq]."""
        if ids_ST is None:
            return
        self.states = cal.HiddenStates(self.streamed, ids_ST, self.folder)
        if self.recipe.propagate == "quantized" and any(
            needs_of(linear).original_inputs for linear in self.targets.linears
        ):
            self.original = self.states.fork(self.folder)
        self.timer.mark("embed")

    def replay(self, index: int) -> None:
        """Run a block finished before a kill again, from the written tensors: the states go on as they were."""
        if self.states is None:
            return
        block = self.streamed.fill(index)
        if self.original is not None:
            self.original.advance(block, index)
        if self.recipe.propagate == "quantized":
            self._fill_written(block, index)
        self.states.advance(block, index)
        release(block)
        self.timer.mark("replay")

    def quantize_block(self, index: int, note: Callable[[str], None]) -> dict[str, Any]:
        """Transform, quantize and write one block; returns its lines for the report."""
        block, graph, linears = self.streamed.fill(index), self.graphs[index], self.targets.of_block(index)
        self.timer.mark("read")
        originals = self._run_original(block, graph, index, linears)
        folds: list[FoldRecord] = []
        for transform in self.recipe.transforms:
            if transform.name not in TRANSFORMS:
                self._round_plain(block, index)
                continue  # rotation: the block came rotated
            assert self.states is not None, "transforms require calibration (validated in the recipe)"
            note(transform.name)
            done = TRANSFORMS[transform.name](transform.options, self.states, block, graph, index, linears)
            folds += done.records
            for group in originals.keys() & done.scales.keys():
                originals[group] /= done.scales[group].to(originals[group])
            self._round_plain(block, index)
            self.timer.mark(transform.name)
        last = index + 1 == len(self.streamed.blocks)
        stages = self._stages(graph, linears)
        widest = max((linear.shape[1] for linear in linears), default=0)
        runs: StagedForward | None = None
        if self.states is not None and len(stages) > 1 and fits(self.states, graph, widest):
            runs = self._lockstep = self._lockstep or StagedForward(self.states)
            runs.begin(block, graph, index)
        records = []
        for stage in stages:
            note(stage[0][1][0].site.name)
            records += self._quantize_stage(block, graph, index, stage, originals, runs)
        self._calibrate_cache(block, index)
        if self.states is not None and self.recipe.propagate == "quantized" and not last:
            runs.finish() if runs is not None else self.states.advance(block, index)
            self.timer.mark("propagate")
        elif runs is not None:
            runs.drop()
        for piece, value in self._plain_pieces(block, index):
            dtype = self.streamed.checkpoint.tensors[piece.name].dtype
            if piece.part:  # one of several parameters in one tensor of the file
                whole = self.writer.read(piece.name)
                piece.of(whole).copy_(value)
                self.writer.write(piece.name, whole)
            else:
                self.writer.write(piece.name, (value.mT if piece.transposed else value).to(dtype))
        self.timer.mark("write")
        release(block)
        return_pages()
        return {
            "folds": [record.to_json() for record in folds],
            "linears": [record.to_json() for record in records],
        }

    def _calibrate_cache(self, block: nn.Module, index: int) -> None:
        """Write the static scales of the block's keys and values, as its quantized weights make them."""
        if not self.targets.kv_scales:
            return
        assert self.states is not None, "static caches require calibration (validated in the recipe)"
        assert self.targets.kv is not None
        assert self.recipe.kv_cache is not None
        place = self._cache_places[index]
        scales = calibrate(self.states, block, index, place, self.targets.kv, self.recipe.kv_cache)
        for layout, scale in zip(self.targets.kv_scales[2 * index : 2 * index + 2], scales, strict=True):
            self.writer.write(layout.name, scale)
        self.timer.mark("cache")

    def _run_original(
        self, block: nn.Module, graph: BlockGraph, index: int, linears: list[LinearTarget]
    ) -> dict[int, Tensor]:
        """Advance the original stream; returns the inputs [tokens, K] of every group that will be re-fitted."""
        if self.original is None:
            return {}
        states = self.original
        wanted = {
            group
            for group, members in _by_group(graph, linears)
            # An expert's tokens differ between the two streams, so there is no pair to compare.
            if any(needs_of(linear).original_inputs for linear in members) and members[0].site.index is None
        }
        if index == 0:
            wanted -= {0}  # nothing is quantized before it: both streams are the same
        inputs: dict[int, Tensor] = {}

        def keep(group: int, tokens: slice, x_MK: Tensor) -> None:
            if group not in inputs:
                inputs[group] = self._array(group, (states.tokens, x_MK.shape[1]), x_MK.dtype)
            inputs[group][tokens] = x_MK.cpu()

        if wanted:
            cal.run(states, block, graph, index, wanted, keep, advance=True)
        else:
            states.advance(block, index)
        self.timer.mark("original")
        return inputs

    def _array(self, group: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Room for a group's original inputs, the same in every block."""
        kept = self._kept.get(group)
        if kept is None or kept.shape != shape:
            kept = self._kept[group] = cal.allocate(shape, dtype, self.folder)
        return kept

    def _stages(self, graph: BlockGraph, linears: list[LinearTarget]) -> list[list[Members]]:
        """Groups in execution order, those that may share one run of the block together.

        GPTQ wants each group to see the quantized ones before it; rounding does not look, nor does
        `propagate: original`. All experts of a layer run side by side.
        """
        groups = _by_group(graph, linears)
        if (
            self.states is None
            or self.recipe.propagate == "original"
            or not any(needs_of(linear).sequence for linear in linears)
        ):
            return [groups]
        stages = [[(group, members) for group, members in groups if group in stage] for stage in graph.stages]
        return [stage for stage in stages if stage]

    def _quantize_stage(
        self,
        block: nn.Module,
        graph: BlockGraph,
        index: int,
        stage: list[Members],
        originals: dict[int, Tensor],
        runs: StagedForward | None,
    ) -> list[LinearRecord]:
        """Gather the statistics of a stage's groups behind everything quantized so far, quantize and write them."""
        statistics: dict[int, Statistic] = {}
        ranges = InputRanges(stage)
        drifts = {
            group: OutputDrift(
                {linear.name: linear.view(block) for linear in members if needs_of(linear).original_inputs},
                originals.pop(group),
            )
            for group, members in stage
            if group in originals
        }
        if self.states is not None:
            hessian = {group for group, members in stage if any(needs_of(linear).hessian for linear in members)}
            sizes = {group: _block_size(members) for group, members in stage}

            def observe(group: int, tokens: slice, x_MK: Tensor) -> None:
                if group not in statistics:
                    statistics[group] = Statistic.empty(x_MK, hessian=group in hessian, block=sizes[group])
                statistics[group].add(x_MK)
                ranges.add(group, x_MK)
                if group in drifts:
                    drifts[group].add(x_MK, tokens)

            advance = self.recipe.propagate == "original" and index + 1 < len(self.streamed.blocks)
            if runs is not None:
                runs.stop_at(stage[0][0], observe)
            else:
                cal.run(self.states, block, graph, index, {group for group, _ in stage}, observe, advance=advance)
            for statistic in statistics.values():
                statistic.finish()
            self.timer.mark("statistics")
        records = []
        for group, linears in stage:
            drift = drifts.pop(group).finish() if group in drifts else {}
            weights = {linear.name: linear.view(block) for linear in linears}
            statistic = statistics.pop(group, None)
            for result in quantize_group(weights, linears, statistic, drift, signed=self.format.SIGNED_SCALES):
                linear, q = result.linear, result.quantized
                if is_static(linear):
                    q = replace(q, input=ranges.range_of(linear, group))
                if self.states is not None:
                    linear.view(block).copy_(dequantize(q))
                for suffix, tensor in self.format.pack(q, linear.scheme).items():
                    self.writer.write(f"{linear.name}.{suffix}", tensor.cpu())
                if self.states is not None and statistic is None:
                    note = "no calibration token reached it: rounded on the range of its weights alone"
                    result = replace(result, record=replace(result.record, note=note))
                records.append(result.record)
        self.timer.mark("quantize")
        return records

    def _plain_pieces(self, block: nn.Module, index: int) -> Iterator[tuple[TensorSlice, Tensor]]:
        """Every piece of a checkpoint tensor of the block that stays unquantized, with its live values."""
        quantized = {f"{linear.name}.weight" for linear in self.targets.of_block(index)}
        for name, param in block.named_parameters():
            for piece in self.streamed.sources[self.streamed.prefix(index) + name]:
                if piece.name not in quantized:
                    yield piece, param.data[piece.where] if piece.where else param.data

    def _round_plain(self, block: nn.Module, index: int) -> None:
        """Round transformed norms and biases to what the file will hold, so that calibration sees the same."""
        for piece, value in self._plain_pieces(block, index):
            value.copy_(value.to(self.streamed.checkpoint.tensors[piece.name].dtype))

    def _fill_written(self, block: nn.Module, index: int) -> None:
        for piece, value in self._plain_pieces(block, index):
            value.copy_(piece.of(self.writer.read(piece.name)))
        for linear in self.targets.of_block(index):
            layout = self.format.layout(linear.shape, linear.scheme, linear.scale_dtype)
            tensors = {suffix: self.writer.read(f"{linear.name}.{suffix}") for suffix in layout}
            linear.view(block).copy_(dequantize(self.format.unpack(tensors, linear.scheme)))


def _by_group(graph: BlockGraph, linears: list[LinearTarget]) -> list[Members]:
    """The block's linears by the input they share, in execution order."""
    groups: dict[int, list[LinearTarget]] = {}
    for linear in linears:
        groups.setdefault(graph.group_of(linear.site.name), []).append(linear)
    return sorted(groups.items())


def _block_size(linears: list[LinearTarget]) -> int | None:
    """Columns of the hessian's diagonal blocks that serve all linears which round by their groups' output error."""
    sizes = [size for linear in linears if (size := needs_of(linear).block)]
    return math.lcm(*sizes) if sizes and linears[0].shape[1] % math.lcm(*sizes) == 0 else max(sizes, default=None)
