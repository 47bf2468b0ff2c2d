"""Statistics of experts that few calibration tokens reach: those of all experts of their layer."""

from collections.abc import Sequence
from dataclasses import replace

from quantkit.model.block_graph import BlockGraph
from quantkit.model.fold_search import family
from quantkit.quantization.calibration.statistics import Statistic, merged


def side_by_side(graph: BlockGraph, groups: Sequence[int]) -> list[list[int]]:
    """Those of the input groups that are experts, by what they stand for: the gates of a layer, its downs."""
    found: dict[tuple, list[int]] = {}
    for group in groups:
        stage = graph.stage_of(group)
        if len(stage) > 1:
            found.setdefault((stage, family(graph.inputs[group][0])), []).append(group)
    return [members for members in found.values() if len(members) > 1]


def share(statistics: dict[int, Statistic], experts: Sequence[Sequence[int]], below: int) -> dict[int, int]:
    """How many tokens reached each expert, by input group; fewer than `below`: it gets the statistics of its layer.

    experts: the groups that stand for the same thing, as `side_by_side` finds them. `statistics`, finished ones by
    group, is changed in place; groups no token reached may be missing, and stay so where none of their layer has any.
    """
    tokens: dict[int, int] = {}
    for members in experts:
        own = {group: statistics[group].count if group in statistics else 0 for group in members}
        tokens |= own
        few = [group for group in members if own[group] < below]
        reached = [statistics[group] for group in members if group in statistics]
        if not few or not reached:
            continue
        whole = merged([_copied(reached[0]), *reached[1:]])
        for group in few:
            statistics[group] = _copied(whole)
    return tokens


def _copied(statistic: Statistic) -> Statistic:
    """The same sums in memory of their own: an algorithm may use that of a Hessian."""
    tensors = {
        name: value.clone()
        for name in ("square_sum_K", "abs_sum_K", "hessian_KK", "blocks_Bbb")
        if (value := getattr(statistic, name)) is not None
    }
    return replace(statistic, **tensors)
