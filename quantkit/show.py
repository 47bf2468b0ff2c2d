"""What a run and a conversion print: the few figures that matter; quantkit-report.json has the rest."""

from collections import Counter
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

MAX_WARNINGS = 10


def render(report: dict[str, Any], console: Console) -> None:
    """A table of a quantization run's report."""
    transforms, weights = report["recipe"]["transforms"], report["recipe"]["weights"]
    steps = [name for item in (*transforms, weights["algorithm"]) for name in item]
    counts = Counter(record["scheme"] for record in report["linears"])
    schemes = "; ".join(f"{scheme} ({count})" if len(counts) > 1 else scheme for scheme, count in counts.most_common())
    before, after = report["bytes_before"], report["bytes_after"]
    table = Table(show_header=False)
    for label, value in {
        "model": report["model"],
        "scheme": f"{' + '.join(steps)}, {schemes}",
        "cache": report["kv_cache"],
        "coverage": report["coverage"],
        "size": f"{before / 1e6:.1f} MB -> {after / 1e6:.1f} MB ({after / before:.0%})",
        "bits per weight": f"{report['bits_per_weight']:.2f}",
        "seconds": f"{report['seconds_total']:.1f}",
        "peak memory": f"{report['peak_memory_bytes'] / 2**20:.0f} MiB",
    }.items():
        if value is not None:
            table.add_row(label, escape(value))
    console.print(table)
    for warning in report["warnings"][:MAX_WARNINGS]:
        console.print(f"warning: {warning}", markup=False, highlight=False)
    if (more := len(report["warnings"]) - MAX_WARNINGS) > 0:
        console.print(f"and {more} more warnings in quantkit-report.json")


def render_conversion(report: dict[str, Any], console: Console) -> None:
    """A few lines of a conversion's report."""
    done = report["converted"]
    console.print(f"{done['source']}: {done['from']} -> {done['to']}, {report['modules']} modules", markup=False)
    for scheme, count in report["schemes"].items():
        console.print(f"{count} x {scheme}", markup=False)
    rounded = report["rounded"]
    if rounded["scales"]:
        console.print(f"{rounded['scales']} scales rounded, by up to {rounded['largest_change']:.1e} of their size")
    else:
        console.print("codes, scales and zero points are exactly the same")
