"""Timing on a GPU: CUDA graphs, inputs beyond the L2 cache, candidates interleaved, medians and raw samples kept."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_COPIES = 48


@dataclass(frozen=True, slots=True)
class Samples:
    """Microseconds of one call, one figure a round."""

    microseconds: list[float]

    @property
    def median(self) -> float:
        """The figure to report."""
        return statistics.median(self.microseconds)

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        quarters = statistics.quantiles(self.microseconds, n=4)
        return (quarters[2] - quarters[0]) / self.median


def copies_beyond_cache(bytes_read: int, device: torch.device) -> int:
    """How many sets of inputs to rotate so that together they are 2.5 times the L2 cache."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MOST_COPIES, max(2, math.ceil(2.5 * cache / bytes_read)))


def time_calls(candidates: dict[str, Sequence[Callable[[], object]]], rounds: int = 50) -> dict[str, Samples]:
    """Time each candidate's calls (one for each set of inputs), a captured graph of them replayed once a round.

    Candidates take turns within a round, so that clocks and neighbours touch all of them alike.
    """
    graphs = {}
    for name, calls in candidates.items():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                calls[0]()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graphs[name] = graph
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 3):
        for name, graph in graphs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            if turn >= 3:
                samples[name].append(start.elapsed_time(stop) * 1000 / len(candidates[name]))
    return {name: Samples(values) for name, values in samples.items()}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a device copy of 1 GiB."""
    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device=device) for _ in range(2))
    samples = time_calls({"copy": [lambda: target.copy_(source)]}, rounds=20)
    return 2 * source.numel() / (samples["copy"].median * 1e-6)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Of norms; infinite where something is not finite."""
    if not bool(got.isfinite().all()):
        return math.inf
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()
