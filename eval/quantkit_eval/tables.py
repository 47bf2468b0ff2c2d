"""The results of evaluate() as a console table and as a row of a Markdown table."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from quantkit_eval.bootstrap import Interval

TABLE_HEADER = "| model | perplexity | KL | KL p99 | top-1 agreement | flips |\n|---|---|---|---|---|---|"


def render(result: dict[str, Any], console: Console) -> None:
    """Print a short table: each estimate, its 95 % interval, and the reference's where there is one."""
    reference = result.get("reference")
    table = Table(title=f"{result['path']} on {result['text']['path']}", title_justify="left")
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    if reference:
        table.add_column("original", justify="right")

    def add(label: str, interval: Interval, original: Interval | None = None, *, percent: bool = False) -> None:
        show = _percent if percent else _number
        row = [label, show(interval["value"]), f"{show(interval['low'])} .. {show(interval['high'])}"]
        table.add_row(*row, *([show(original["value"]) if original else ""] if reference else []))

    original = reference or {}
    add("perplexity", result["perplexity"], original.get("perplexity"))
    add("bits per byte", result["bits_per_byte"], original.get("bits_per_byte"))
    add("top-1 accuracy", result["accuracy"], original.get("accuracy"), percent=True)
    if reference:
        add("perplexity / original's", result["perplexity_ratio"])
        add("KL(original || this), mean, nats", result["kl"]["mean"])
        add("KL, 99th percentile", result["kl"]["p99"])
        add("top-1 agreement", result["top1_agreement"], percent=True)
        add("flips", result["flips"]["rate"], percent=True)
        add("  right to wrong", result["flips"]["right_to_wrong"], percent=True)
        add("  wrong to right", result["flips"]["wrong_to_right"], percent=True)
    console.print(table)
    console.print(
        f"{result['tokens']} tokens in {result['windows']} windows of {result['context']}, "
        f"{result['dtype']} on {result['device']}, {result['seconds']:.1f} s"
    )


def table_row(result: dict[str, Any], name: str | None = None) -> str:
    """One row under TABLE_HEADER; a model without reference leaves the divergence columns empty."""
    cells = [name or Path(result["path"]).name, f"{result['perplexity']['value']:.3f}"]
    if result.get("reference"):
        kl = result["kl"]["mean"]
        half = (kl["high"] - kl["low"]) / 2
        cells += [f"{_number(kl['value'])} ± {_number(half)}", _number(result["kl"]["p99"]["value"])]
        cells += [_percent(result["top1_agreement"]["value"]), _percent(result["flips"]["rate"]["value"])]
    else:
        cells += [""] * 4
    return "| " + " | ".join(cells) + " |"


def _number(x: float) -> str:
    return f"{x:.3f}" if abs(x) >= 1 or x == 0 else f"{x:.3g}"


def _percent(x: float) -> str:
    return f"{100 * x:.2f} %"
