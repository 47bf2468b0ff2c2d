"""Figures as inline SVG whose colours are the page's own, light or dark: the part that knows matplotlib.

Text stays text in the page's font. matplotlib writes hexadecimal colours alone, so a figure is drawn in the stand-ins
below, and each becomes a variable of the stylesheet.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from quantkit.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, LINE, BEFORE, AFTER, WARN = "#010203", "#010204", "#010205", "#010206", "#010207", "#010208"
_VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", BEFORE: "before", AFTER: "after", WARN: "warn"}
WIDTH = 400  # CSS pixels: about the width of a phone, half of a desktop's column

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names of modules and texts are no formulas
    "font.size": 11.5,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "path.simplify": True,
}


def check_installed() -> None:
    """UserError where matplotlib cannot be found; nothing is imported."""
    if find_spec("matplotlib") is None:
        raise UserError(
            "the report's figures need matplotlib, which is not installed\nhint: pip install 'quantkit[report]'"
        )


class Drawing:
    """A figure being drawn: `figure` and its `axes`; `svg` is there once the block that drew it has ended."""

    def __init__(self, figure: "Figure", axes: "list[Axes]") -> None:
        self.figure, self.axes = figure, axes
        self.svg = ""


@contextmanager
def drawing(name: str, alt: str, height: float, panels: int = 1) -> Iterator[Drawing]:
    """A figure of WIDTH x height pixels with so many panels side by side; its SVG says `alt` to who cannot see it.

    name: unique in the page, for the ids in the SVG.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context(_STYLE | {"svg.hashsalt": name}):  # pyright: ignore[reportArgumentType]
        figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(1, panels, squeeze=False)[0]
        drawn = Drawing(figure, list(axes))
        yield drawn
        raw = io.StringIO()
        figure.savefig(raw, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn.svg = _inline(raw.getvalue(), alt)


def _inline(svg: str, alt: str) -> str:
    """The SVG element alone: no XML header, no metadata, no sizes of its own, colours as variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)  # would hold for the whole page
    svg = re.sub(r' transform="rotate\(-?0 [^"]*"', "", svg)
    svg = re.sub(r"(?<=\d\.\d\d)\d+(?=[\s\"])", "", svg)  # hundredths of a pixel are enough
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in every figure, and nothing refers to them
    svg = re.sub(r"(font(?:-family)?: [^;\"]*?)(?:'[^']*', )+sans-serif", r"\1system-ui, sans-serif", svg)
    view = re.search(r'viewBox="([^"]*)"', svg)
    assert view is not None, "matplotlib writes a viewBox"
    opening = f'<svg viewBox="{view[1]}" role="img" aria-label="{escape(alt)}">'
    svg = opening + svg[svg.index(">") + 1 :]
    svg = svg.replace("xlink:href", "href")
    for colour, name in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    return re.sub(r"\n\s*", "\n", svg).strip()
