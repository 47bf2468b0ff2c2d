"""A benchmark as one SVG picture: speed by batch size, or how many requests had ended after how long."""

from collections.abc import Mapping, Sequence
from html import escape
from math import ceil, floor, log10
from pathlib import Path

from quantkit.errors import UserError
from quantkit_eval.bench.results import Benchmark

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 440, 70, 40, 20, 60
COLOURS = ("#1b6ca8", "#d1495b", "#2e933c", "#8e5572", "#edae49", "#555555")
Points = Sequence[tuple[float, float]]


def write_plot(result: Benchmark, path: Path) -> None:
    """Write the picture; UserError where the file cannot be written."""
    if len(result.scenarios) > 1:
        names = [compared.name for compared in result.scenarios[0].baselines]
        lines: dict[str, Points] = {
            "engine": [(s.scenario.requests, s.tokens_per_second) for s in result.scenarios],
        }
        for at, name in enumerate(names):
            speeds = [(s.scenario.requests, s.baselines[at].sample.tokens_per_second) for s in result.scenarios]
            lines[name] = speeds
        text = svg(f"{result.model}: tokens a second", "sequences at a time", "tokens/s", lines)
    else:
        only = next(iter(result.scenarios))
        lines = {"engine": _ended([sample.requests for sample in only.samples])}
        lines |= {compared.name: _ended([compared.sample.requests]) for compared in only.baselines}
        text = svg(f"{result.model}: requests ended", "seconds from arrival", "share of requests", lines)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--plot {path}: cannot be written: {error.strerror}") from error


def _ended(samples: Sequence[Sequence[tuple[float, float, float]]]) -> Points:
    times = sorted(last - arrival for sample in samples for arrival, _, last in sample)
    return [(max(moment, 1e-6), (rank + 1) / len(times)) for rank, moment in enumerate(times)]


def svg(title: str, x_label: str, y_label: str, lines: Mapping[str, Points]) -> str:
    """Lines through points over a logarithmic x axis and a y axis from 0."""
    points = [point for line in lines.values() for point in line]
    low, high = log10(min(x for x, _ in points)), log10(max(x for x, _ in points))
    low, high = (low, high) if high - low > 0.05 else (low - 0.1, high + 0.1)
    top = max(y for _, y in points) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (log10(x) - low) / (high - low) * (WIDTH - LEFT - RIGHT)
        return round(across, 1), round(HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="15">{escape(title)}</text>',
        f'<text x="{WIDTH // 2}" y="{HEIGHT - 14}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text x="16" y="{HEIGHT // 2}" text-anchor="middle" transform="rotate(-90 16 {HEIGHT // 2})">'
        f"{escape(y_label)}</text>",
    ]
    for mark in _marks(low, high):
        x, base = at(mark, 0)
        parts.append(f'<path d="M{x} {TOP}V{base}" stroke="#ddd"/>')
        parts.append(f'<text x="{x}" y="{base + 16}" text-anchor="middle">{mark:g}</text>')
    for share in range(5):
        y = at(10**low, top * share / 4)[1]
        parts.append(f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{top * share / 4:.3g}</text>')
    for index, (name, line) in enumerate(lines.items()):
        colour = COLOURS[index % len(COLOURS)]
        path = " ".join(f"{x},{y}" for x, y in (at(*point) for point in line))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>' for x, y in (at(*point) for point in line)]
        parts.append(f'<text x="{LEFT + 12}" y="{TOP + 16 + 16 * index}" fill="{colour}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _marks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between 10**low and 10**high."""
    every = [digit * 10.0**power for power in range(floor(low), ceil(high) + 1) for digit in (1, 2, 5)]
    return [mark for mark in every if low - 1e-9 <= log10(mark) <= high + 1e-9]
