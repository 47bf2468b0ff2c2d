"""The report's figures, each a function of records; None where there is nothing to draw, which is not a zero."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit.report.block_records import BlockRecord
from quantkit.report.drawing import AFTER, BEFORE, INK, LINE, MUTED, WARN, drawing
from quantkit.report.measurements import OriginalOutliers, SpeedComparison, TaskResult
from quantkit.report.text_results import Divergence, Interval, PositionSurprise, TextResult
from quantkit.report.verdict import FLIPS, KL

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROW = 26  # pixels of a row of a horizontal chart
LONGEST_NAME = 22


@dataclass(frozen=True, slots=True)
class PlacedValue:
    """A value of a linear: the decoder block it lies in, its kind (self_attn.q_proj), before and after."""

    block: int
    kind: str
    before: float | None
    after: float | None


def size(before: int, after: int, text: "tuple[str, str]") -> str:
    """Two bars: bytes of the original and of the result; text: what stands behind each."""
    with drawing("size", f"Size: original {text[0]}, quantized {text[1]}", 96) as drawn:
        _bars(drawn.axes[0], "size", (before, after), text)
    return drawn.svg


def speed(found: SpeedComparison | None) -> str | None:
    """Bars of tokens per second of both models: reading a prompt, and generating."""
    if found is None:
        return None
    alt = (
        f"Tokens per second: prompt {found.reference.prefill:.0f} of the original, {found.model.prefill:.0f} here; "
        f"generating {found.reference.decode:.1f} and {found.model.decode:.1f}"
    )
    with drawing("speed", alt, 110, panels=2) as drawn:
        for axes, title, part in zip(
            drawn.axes, ("prompt, tokens/s", "generating, tokens/s"), ("prefill", "decode"), strict=True
        ):
            values = getattr(found.reference, part), getattr(found.model, part)
            _bars(axes, title, values, tuple(map(rate, values)))
        drawn.axes[1].set_yticklabels(["", ""])
    return drawn.svg


def rate(value: float) -> str:
    """Tokens per second: three digits, never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _bars(axes: "Axes", title: str, values: Sequence[float], text: Sequence[str]) -> None:
    axes.barh([0, 1], values, color=[BEFORE, AFTER], height=0.62)
    axes.set_yticks([0, 1], ["original", "quantized"], color=INK)
    axes.invert_yaxis()
    axes.set_title(title)
    axes.set_xlim(0, max(values) * 1.38 or 1)
    axes.set_xticks([])
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0)
    for row, (value, label) in enumerate(zip(values, text, strict=True)):
        axes.annotate(label, (value, row), (5, 0), textcoords="offset points", va="center", color=INK)


def divergence(texts: Sequence[TextResult]) -> str | None:
    """KL and flips on each text with their 95 % intervals, and the thresholds of the verdict."""
    compared = [(text.name, text.divergence) for text in texts if text.divergence is not None]
    if not compared:
        return None
    names = [_short(name) for name, _ in compared]
    told = "; ".join(f"{name}: KL {d.kl_mean.value:.4g}, flips {d.flips.value:.2%}" for name, d in compared)
    with drawing("divergence", f"KL and flips with intervals. {told}", 96 + ROW * len(compared), panels=2) as drawn:
        left, right = drawn.axes
        _intervals(left, "KL, nats", names, [d.kl_mean for _, d in compared], KL.recommended, KL.care)
        right.set_yticklabels([])
        _flips(right, [d for _, d in compared])
    return drawn.svg


def _intervals(
    axes: "Axes", title: str, names: Sequence[str], values: Sequence[Interval], recommended: float, care: float
) -> None:
    for row, one in enumerate(values):
        axes.plot([one.low, one.high], [row, row], color=AFTER, linewidth=2.5, solid_capstyle="round")
        axes.plot([one.value], [row], "o", color=AFTER, markersize=6)
    axes.set_yticks(range(len(names)), names, color=INK)
    _rows(axes, len(names))
    axes.set_title(title)
    most = max(one.high for one in values)
    _limits(axes, most, recommended, care)


def _flips(axes: "Axes", found: Sequence[Divergence]) -> None:
    for row, d in enumerate(found):
        one = d.flips
        axes.plot([100 * one.low, 100 * one.high], [row, row], color=AFTER, linewidth=2.5, solid_capstyle="round")
        axes.plot([100 * one.value], [row], "o", color=AFTER, markersize=6)
    axes.set_yticks(range(len(found)), [""] * len(found))
    _rows(axes, len(found))
    axes.set_title("flips, %")
    _limits(axes, 100 * max(d.flips.high for d in found), 100 * FLIPS.recommended, 100 * FLIPS.care)


def _limits(axes: "Axes", most: float, recommended: float, care: float) -> None:
    """Thresholds as dashed lines, those that lie near what is shown."""
    axes.set_xlim(0, max(most, recommended) * 1.15)
    for value, colour in ((recommended, MUTED), (care, WARN)):
        if value <= axes.get_xlim()[1]:
            axes.axvline(value, color=colour, linestyle=(0, (4, 3)), linewidth=1.2)


def _rows(axes: "Axes", count: int) -> None:
    axes.set_ylim(count - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.locator_params(axis="x", nbins=4)


def positions(text: TextResult) -> str | None:
    """Perplexity of both models by the position in a window, with 95 % bands."""
    found = text.positions
    if len(found) < 2:
        return None
    middles = [(one.first + one.last) / 2 for one in found]
    with drawing(f"positions of {text.name}", _positions_alt(text), 250) as drawn:
        axes = drawn.axes[0]
        references = [one.reference for one in found if one.reference is not None]
        if len(references) == len(found):
            _band(axes, middles, references, BEFORE, "original", "--")
        _band(axes, middles, [one.perplexity for one in found], AFTER, "quantized", "-")
        axes.set_title(f"perplexity by position, {_short(text.name)}")
        axes.set_xlabel("tokens before the predicted one")
        axes.legend()
    return drawn.svg


def position_ratios(text: TextResult) -> str | None:
    """The quantized model's perplexity by the original's, by position, with 95 % bands of the paired difference."""
    ratios = [one.ratio for one in text.positions if one.ratio is not None]
    if len(ratios) < 2 or len(ratios) != len(text.positions):
        return None
    alt = f"Perplexity by the original's: {ratios[0].value:.4g} at the beginning, {ratios[-1].value:.4g} at the end"
    with drawing(f"ratios of {text.name}", alt, 250) as drawn:
        axes = drawn.axes[0]
        axes.axhline(1, color=BEFORE, linestyle="--", linewidth=1.5, label="original")
        _band(axes, [(one.first + one.last) / 2 for one in text.positions], ratios, AFTER, "quantized", "-")
        axes.set_title(f"perplexity by the original's, {_short(text.name)}")
        axes.set_xlabel("tokens before the predicted one")
        axes.legend()
    return drawn.svg


def _positions_alt(text: TextResult) -> str:
    first, last = text.positions[0], text.positions[-1]

    def said(one: PositionSurprise) -> str:
        return f"{one.perplexity.value:.3g} behind {one.first} to {one.last} tokens"

    return f"Perplexity by position: quantized {said(first)}, {said(last)}"


def _band(axes: "Axes", x: Sequence[float], values: Sequence[Interval], colour: str, label: str, line: str) -> None:
    axes.fill_between(x, [one.low for one in values], [one.high for one in values], color=colour, alpha=0.16, lw=0)
    axes.plot(x, [one.value for one in values], line, color=colour, marker="o", markersize=3.5, label=label)


def errors_by_layer(blocks: Sequence[BlockRecord]) -> str | None:
    """Output error of each block's linears, rounded to nearest and as quantized: mean, and the range of the linears."""
    placed = placed_errors(blocks)
    alt = "Output error by layer, before and after"
    return _by_layer("errors by layer", alt, "output error by layer", placed, ("rounded to nearest", "as quantized"))


def errors_by_kind(blocks: Sequence[BlockRecord]) -> str | None:
    """The same by kind of linear: the median over the blocks."""
    return _by_kind("errors by kind", "output error by kind of linear, median", placed_errors(blocks))


def placed_errors(blocks: Sequence[BlockRecord]) -> list[PlacedValue]:
    """Errors of all quantized linears; before: of rounding to nearest, None where it was not computed."""
    return [
        PlacedValue(block.block, kind_of(one.name), one.gptq.rounding if one.gptq else None, one.error)
        for block in blocks
        for one in block.linears
    ]


def weight_outliers(blocks: Sequence[BlockRecord], original: Sequence[OriginalOutliers]) -> str | None:
    """The largest |w| over the root mean square by layer, of the original and of what was rounded."""
    placed = placed_outliers(blocks, original, "weight")
    title = "weights: largest over root mean square"
    return _by_layer("weight outliers", "Weight outliers by layer", title, placed, ("original", "as it was rounded"))


def input_outliers(blocks: Sequence[BlockRecord], original: Sequence[OriginalOutliers]) -> str | None:
    """The largest input channel over the median one by layer, of the original and of what was rounded."""
    placed = placed_outliers(blocks, original, "input")
    title = "inputs: largest channel over median"
    return _by_layer("input outliers", "Input outliers by layer", title, placed, ("original", "as it was rounded"))


def placed_outliers(
    blocks: Sequence[BlockRecord], original: Sequence[OriginalOutliers], part: str
) -> list[PlacedValue]:
    """Peaks of weights or inputs (`part`) that are known."""
    known = {one.name: getattr(one, part) for one in original}
    return [
        PlacedValue(
            block.block, kind_of(one.name), known.get(one.name), getattr(one.outliers, part) if one.outliers else None
        )
        for block in blocks
        for one in block.linears
    ]


def _by_layer(name: str, alt: str, title: str, placed: Sequence[PlacedValue], labels: tuple[str, str]) -> str | None:
    series = {label: _of_layers(placed, part) for label, part in zip(labels, ("before", "after"), strict=True)}
    series = {label: values for label, values in series.items() if values}
    if not series:
        return None
    with drawing(name, f"{alt}: {'; '.join(_told(label, values) for label, values in series.items())}", 250) as drawn:
        axes = drawn.axes[0]
        for label, values in series.items():
            colour, line = (BEFORE, "--") if label == labels[0] else (AFTER, "-")
            x = list(values)
            axes.fill_between(x, [min(v) for v in values.values()], [max(v) for v in values.values()],
                              color=colour, alpha=0.16, lw=0)  # fmt: skip
            means = [sum(v) / len(v) for v in values.values()]
            axes.plot(x, means, line, color=colour, marker="o", markersize=4 if len(x) < 40 else 2.5, label=label)
        every = [v for values in series.values() for one in values.values() for v in one]
        if min(every) > 0 and max(every) > 4 * min(every):
            _log(axes.yaxis, every)
        axes.set_title(title)
        axes.set_xlabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[attr-defined]
        axes.legend()
    return drawn.svg


def _of_layers(placed: Sequence[PlacedValue], part: str) -> dict[int, list[float]]:
    found: dict[int, list[float]] = defaultdict(list)
    for one in placed:
        if (value := getattr(one, part)) is not None and math.isfinite(value):
            found[one.block].append(value)
    return dict(sorted(found.items()))


def _told(label: str, values: dict[int, list[float]]) -> str:
    means = {layer: sum(v) / len(v) for layer, v in values.items()}
    worst = max(means, key=lambda layer: means[layer])
    return f"{label}, mean {sum(means.values()) / len(means):.3g}, largest in layer {worst}, {means[worst]:.3g}"


def _by_kind(name: str, title: str, placed: Sequence[PlacedValue]) -> str | None:
    kinds: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for one in placed:
        for values, value in zip(kinds[one.kind], (one.before, one.after), strict=True):
            if value is not None and math.isfinite(value):
                values.append(value)
    rows = [(kind, _median(before), _median(after)) for kind, (before, after) in kinds.items()]
    rows = [(kind, before, after) for kind, before, after in rows if after is not None][:24]
    if not rows:
        return None
    alt = "; ".join(f"{kind}: {'' if b is None else f'{b:.3g} to '}{a:.3g}" for kind, b, a in rows)
    with drawing(name, f"{title}. {alt}", 66 + 22 * len(rows)) as drawn:
        axes = drawn.axes[0]
        for row, (_, before, after) in enumerate(rows):
            if before is not None:
                axes.plot([before, after], [row, row], color=LINE, linewidth=3, solid_capstyle="round")
                axes.plot([before], [row], "o", color=BEFORE, fillstyle="none", markersize=6.5, markeredgewidth=1.6)
            axes.plot([after], [row], "o", color=AFTER, markersize=6.5)
        axes.set_yticks(range(len(rows)), [_short(kind) for kind, *_ in rows], color=INK)
        _rows(axes, len(rows))
        every = [value for _, *values in rows for value in values if value is not None]
        if min(every) > 0 and max(every) > 4 * min(every):
            _log(axes.xaxis, every)
        axes.set_title(title)
    return drawn.svg


def tasks(found: Sequence[TaskResult]) -> str | None:
    """Paired difference from the original on each task, with its 95 % interval."""
    shown = [(task.task, task.difference) for task in found if task.difference is not None]
    if not shown:
        return None
    told = "; ".join(f"{name} {100 * one.value:+.1f} points" for name, one in shown)
    with drawing("tasks", f"Quantized less original. {told}", 70 + ROW * len(shown)) as drawn:
        axes = drawn.axes[0]
        axes.axvline(0, color=MUTED, linewidth=1.2)
        for row, (_, one) in enumerate(shown):
            ends = [100 * one.low, 100 * one.high]
            axes.plot(ends, [row, row], color=AFTER, linewidth=2.5, solid_capstyle="round")
            axes.plot([100 * one.value], [row], "o", color=AFTER, markersize=6)
        axes.set_yticks(range(len(shown)), [_short(name) for name, _ in shown], color=INK)
        _rows(axes, len(shown))
        axes.set_title("quantized less original, points, 95 %")
    return drawn.svg


def kind_of(name: str) -> str:
    """model.layers.3.mlp.up_proj -> mlp.up_proj; experts of one kind together."""
    parts = name.split(".")
    numbers = [at for at, part in enumerate(parts) if part.isdigit()]
    rest = parts[numbers[0] + 1 :] if numbers else parts
    return ".".join("*" if part.isdigit() else part for part in rest) or name


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def _short(name: str) -> str:
    """The end of a long name, which tells it from others."""
    return name if len(name) <= LONGEST_NAME else "…" + name[1 - LONGEST_NAME :]


def _log(axis, values: Sequence[float]) -> None:
    """A logarithmic axis whose ticks are plain numbers, few of them."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis._set_axes_scale("log")
    low, high = math.log10(min(values)), math.log10(max(values))
    steps = (1, 2, 5) if high - low < 2 else (1,) if high - low > 3 else (1, 3)
    ticks = [step * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for step in steps]
    ticks = [tick for tick in ticks if 0.9 * min(values) <= tick <= 1.1 * max(values)]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}" if value >= 1e-4 else f"{value:.0e}"))
