"""The harm of each unit under each of its candidates: KL of the model's output with that unit alone quantized.

Codes are chosen as a run chooses them, from the inputs that the original model's blocks see; the KL is taken on windows
that the choice did not see, so that GPTQ's fit to its calibration text does not count as quality.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from quantkit.formats import FORMATS
from quantkit.grids.dequantize import dequantize
from quantkit.model.block_graph import BlockGraph
from quantkit.model.matmul_tracing import TraceMatmuls
from quantkit.model.streamed_model import StreamedModel
from quantkit.quantization.allocation.units import Unit
from quantkit.quantization.calibration import hidden_states as cal
from quantkit.quantization.calibration.input_ranges import InputRanges, is_static
from quantkit.quantization.calibration.statistics import Statistic
from quantkit.quantization.gguf_measured import whole_model
from quantkit.quantization.held_out import Ranges, input_rounding
from quantkit.quantization.linear_quantizer import block_columns, needs_hessian, quantize_group
from quantkit.quantization.output_divergence import OutputDivergence
from quantkit.quantization.resources import return_pages
from quantkit.quantization.targets import LinearTarget

Harms = dict[str, dict[str, float]]  # unit -> candidate -> nats per token


class HarmMeter:
    """Measures one block after the other; the original model is whole in memory."""

    def __init__(
        self,
        streamed: StreamedModel,
        graphs: Sequence[BlockGraph],
        ids_ST: Tensor,
        measured_HT: Tensor,
        format_name: str,
        folder: Path,
    ) -> None:
        """ids_ST: int64 tokens that codes are chosen on; measured_HT: those whose next-token distributions count."""
        self.graphs, self.format = graphs, FORMATS[format_name]
        self.states = cal.HiddenStates(streamed, ids_ST, folder)
        self.meter = OutputDivergence(whole_model(streamed), measured_HT)

    def skip(self) -> None:
        """Pass over a block that was measured before."""
        self.states.advance(self.meter.blocks[self.meter.block], self.meter.block)
        self._next()

    def measure(self, units: Sequence[Unit], note: Callable[[str], None]) -> Harms:
        """The harms of the next block's units; note: is shown which candidate's turn it is."""
        index, harms = self.meter.block, Harms()
        by_candidate: dict[str, list[LinearTarget]] = {}
        for unit in units:
            harms[unit.name] = {}
            for option in unit.options:
                by_candidate.setdefault(option.candidate, []).extend(option.targets)
        ranges = {name: InputRanges(self._groups(targets)) for name, targets in by_candidate.items()}
        statistics = self._statistics(by_candidate, ranges)
        for candidate, targets in by_candidate.items():
            note(candidate)
            rounded, inputs = self._quantized(targets, statistics, ranges[candidate])
            for unit in units:
                option = next((o for o in unit.options if o.candidate == candidate), None)
                if option is not None:
                    harms[unit.name][candidate] = self._harm(option.targets, rounded, inputs)
        return_pages()
        assert index == self.meter.block
        self._next()
        return harms

    def _next(self) -> None:
        if self.meter.block + 1 < len(self.meter.blocks):
            self.meter.advance()

    def _groups(self, targets: Sequence[LinearTarget]) -> list[tuple[int, list[LinearTarget]]]:
        """The linears by the input they share."""
        groups: dict[int, list[LinearTarget]] = {}
        for target in targets:
            groups.setdefault(self.graphs[target.block].group_of(target.site.name), []).append(target)
        return sorted(groups.items())

    def _statistics(
        self, by_candidate: Mapping[str, list[LinearTarget]], ranges: Mapping[str, InputRanges]
    ) -> dict[int, Statistic]:
        """What the inputs of the block are, by group; the states are those behind the block afterwards."""
        index, statistics = self.meter.block, dict[int, Statistic]()
        every = self._groups([target for targets in by_candidate.values() for target in targets])
        wanted = {group: (needs_hessian(members), block_columns(members)) for group, members in every}

        def observe(group: int, tokens: slice, x_MK: Tensor) -> None:
            if group not in statistics:
                hessian, block = wanted[group]
                statistics[group] = Statistic.empty(x_MK, hessian=hessian, block=block)
            statistics[group].add(x_MK)
            for each in ranges.values():
                each.add(group, x_MK)

        cal.run(self.states, self.meter.blocks[index], self.graphs[index], index, set(wanted), observe, advance=True)
        for statistic in statistics.values():
            statistic.finish()
        return statistics

    def _quantized(
        self, targets: Sequence[LinearTarget], statistics: Mapping[int, Statistic], ranges: InputRanges
    ) -> tuple[dict[str, Tensor], Ranges]:
        """Each linear's weight [N, K] as quantized, and the static range of its input."""
        rounded, inputs, block = dict[str, Tensor](), Ranges(), self.meter.blocks[self.meter.block]
        for group, members in self._groups(targets):
            statistic = statistics.get(group)
            if statistic is not None and statistic.hessian_KK is not None:  # algorithms may use up its memory
                statistic = replace(statistic, hessian_KK=statistic.hessian_KK.clone())
            weights = {target.name: target.view(block) for target in members}
            signed = self.format.SIGNED_SCALES
            for result in quantize_group(weights, members, statistic, {}, signed=signed, calibrated=True):
                target = result.linear
                rounded[target.name] = dequantize(result.quantized)
                inputs[target.name] = ranges.range_of(target, group) if is_static(target) else None
        return rounded, inputs

    def _harm(self, targets: Sequence[LinearTarget], rounded: Mapping[str, Tensor], inputs: Ranges) -> float:
        """KL in nats per token with these linears alone quantized."""
        if not targets:
            return 0.0
        block = self.meter.blocks[self.meter.block]
        rounds = any(target.scheme.activations is not None for target in targets)
        rounding = TraceMatmuls(block, input_rounding(targets, inputs)) if rounds else nullcontext()
        with _replaced([(target.view(block), rounded[target.name]) for target in targets]), rounding:
            return self.meter.measure()


@contextmanager
def _replaced(weights: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Inside, these live weights hold other values."""
    kept = [live_NK.clone() for live_NK, _ in weights]
    try:
        for live_NK, value_NK in weights:
            live_NK.copy_(value_NK)
        yield
    finally:
        for (live_NK, _), before_NK in zip(weights, kept, strict=True):
            live_NK.copy_(before_NK)
