"""The Pareto front of size against KL, with its plot. Points whose intervals overlap are not called different.

One run dominates another where it is neither larger nor of higher KL, and is smaller or of clearly lower KL: its whole
interval lies below the other's. So of two runs of one size whose intervals overlap, neither dominates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from quantkit_eval.results import Interval

NO_PLOT = "no plot: matplotlib is not installed (pip install 'quantkit[report]')"


@dataclass(frozen=True, slots=True)
class Point:
    """A run on the plane of size and harm. size: bytes of the result; kl: in nats, with its 95 % interval."""

    name: str
    label: str
    size: int
    kl: Interval


def clearly_lower(one: Point, other: Point) -> bool:
    """Whether the whole interval of `one` lies below that of `other`."""
    return one.kl.high < other.kl.low


def dominates(one: Point, other: Point) -> bool:
    """Whether nobody would take `other`. A partial order: what is dominated once stays so, whatever comes."""
    no_worse = one.size <= other.size and one.kl.value <= other.kl.value
    return no_worse and (one.size < other.size or clearly_lower(one, other))


def pareto(points: Sequence[Point]) -> list[Point]:
    """The points that no other one dominates, smallest first."""
    found = [point for point in points if not any(dominates(other, point) for other in points)]
    return sorted(found, key=lambda point: (point.size, point.kl.value, point.label))


def best(points: Sequence[Point]) -> Point | None:
    """The smallest point of the front whose interval overlaps that of the lowest KL; None without points."""
    front = pareto(points)
    if not front:
        return None
    lowest = min(front, key=lambda point: point.kl.value)
    return next(point for point in front if not clearly_lower(lowest, point))


def like_the_one_before(front: Sequence[Point]) -> list[bool]:
    """For each point of a front, whether its KL cannot be told from that of the next smaller one."""
    pairs = zip(front[1:], front, strict=False)
    return [False, *(not clearly_lower(one, before) and not clearly_lower(before, one) for one, before in pairs)][
        : len(front)
    ]


def write_plot(points: Sequence[Point], path: Path, title: str) -> str | None:
    """Draw size against KL with intervals into an SVG file; returns why not, where matplotlib is absent."""
    if find_spec("matplotlib") is None:
        return NO_PLOT
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    front = pareto(points)
    names = {point.name for point in front}
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    for on_front, colour, text in ((False, "#999999", "dominated"), (True, "#1b6ca8", "on the front")):
        drawn = [point for point in points if (point.name in names) == on_front]
        if drawn:
            below = [max(0.0, point.kl.value - point.kl.low) for point in drawn]
            above = [max(0.0, point.kl.high - point.kl.value) for point in drawn]
            sizes, values = [point.size / 1e6 for point in drawn], [point.kl.value for point in drawn]
            axes.errorbar(sizes, values, yerr=[below, above], fmt="o", color=colour, capsize=3, label=text)
    axes.step([point.size / 1e6 for point in front], [point.kl.value for point in front], where="post", color="#1b6ca8")
    for point in front:
        axes.annotate(
            point.label.replace("$", r"\$"), (point.size / 1e6, point.kl.value), xytext=(5, 5),
            textcoords="offset points", fontsize=7,
        )  # fmt: skip
    if points and min(point.kl.low for point in points) > 0:
        axes.set_yscale("log")
    axes.set_xlabel("size, MB")
    axes.set_ylabel("KL from the original, nats (95 % interval)")
    axes.set_title(title.replace("$", r"\$"))
    if points:
        axes.legend()
    axes.grid(alpha=0.3)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="svg")
    temporary.replace(path)
    return None
