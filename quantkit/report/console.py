"""Every table the command prints: the few figures that matter; reports and --json have the rest."""

import re
from collections import Counter
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from quantkit.report.records import ConversionReport, Report

_COLOUR = {"loads": "green", "refused": "red", "unknown": "yellow", "error": "red", "warning": "yellow", "info": "dim"}

MAX_WARNINGS = 10
GIB = 1 << 30


def render_quantization(report: Report, console: Console) -> None:
    """A table of a quantization run's report."""
    transforms, weights = report.recipe["transforms"], report.recipe["weights"]
    steps = [name for item in (*transforms, weights["algorithm"]) for name in item]
    counts = Counter(record.scheme for record in report.linears)
    schemes = "; ".join(f"{scheme} ({count})" if len(counts) > 1 else scheme for scheme, count in counts.most_common())
    before, after = report.bytes_before, report.bytes_after
    table = Table(show_header=False)
    for label, value in {
        "model": report.model,
        "scheme": f"{' + '.join(steps)}, {schemes}",
        "cache": report.kv_cache,
        "coverage": report.coverage,
        "size": f"{before / 1e6:.1f} MB -> {after / 1e6:.1f} MB ({after / before:.0%})",
        "bits per weight": f"{report.bits_per_weight:.2f}",
        "seconds": f"{report.seconds_total:.1f}",
        "peak memory": f"{report.peak_memory_bytes / 2**20:.0f} MiB",
    }.items():
        if value is not None:
            table.add_row(label, escape(value))
    console.print(table)
    for warning in report.warnings[:MAX_WARNINGS]:
        console.print(f"warning: {warning}", markup=False, highlight=False)
    if (more := len(report.warnings) - MAX_WARNINGS) > 0:
        console.print(f"and {more} more warnings in quantkit-report.json")


def render_conversion(report: ConversionReport, console: Console) -> None:
    """A few lines of a conversion's report."""
    console.print(f"{report.source}: {report.source_format} -> {report.format}, {report.modules} modules", markup=False)
    for scheme, count in report.schemes.items():
        console.print(f"{count} x {scheme}", markup=False)
    rounded = report.rounded
    if rounded.scales:
        console.print(f"{rounded.scales} scales rounded, by up to {rounded.largest_change:.1e} of their size")
    else:
        console.print("codes, scales and zero points are exactly the same")


def render_plan(result: dict[str, Any], console: Console) -> None:
    """Print an estimate: what comes out, what it takes, and the verdict last."""
    total = sum(result["params"].values())
    kinds = ", ".join(f"{kind} {_count(n)}" for kind, n in sorted(result["params"].items(), key=lambda kv: -kv[1]))
    seen = "headers" if result["weights_seen"] else "config.json alone"
    console.print(f"{result['model']}: {result['model_type']}, {_count(total)} parameters ({kinds})", markup=False)
    schemes = ", ".join(f"{count} x {scheme}" for scheme, count in result["schemes"].items())
    console.print(f"{result['linears']} linears: {schemes}; sizes from {seen}", markup=False)
    table = Table("", "estimate", "free", box=None, pad_edge=False)
    before, after = result["bytes_before"], result["bytes_after"]
    table.add_row("output", f"{after / GIB:.2f} GiB of {before / GIB:.2f}", "")
    table.add_row("bits per quantized weight", f"{result['bits_per_weight']:.3f}", "")
    table.add_row("cache per token", f"{result['kv_bytes_per_token'] / 1024:.1f} KiB, {result['kv_cache']}", "")
    table.add_row(
        "peak memory", f"{result['peak_memory_bytes'] / GIB:.2f} GiB", f"{result['free_memory_bytes'] / GIB:.2f} GiB"
    )
    for part, size in result["memory"].items():
        table.add_row(f"  {part}", f"{size / GIB:.2f}", "")
    table.add_row("disk", f"{result['disk_bytes'] / GIB:.2f} GiB", f"{result['free_disk_bytes'] / GIB:.2f} GiB")
    table.add_row("time", _duration(result["seconds_total"]), f"on a CPU: {result['machine']}")
    for stage, spent in result["seconds"].items():
        table.add_row(f"  {stage}", _duration(spent), "")
    console.print(table)
    console.print("it fits" if result["fits"] else "it does not fit", style="green" if result["fits"] else "red")
    for line in result["problems"]:
        console.print(f"  {line}", markup=False)
    for line in result["advice"]:
        console.print(f"  {line}", markup=False)


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return str(number)


def _duration(spent: float) -> str:
    if spent < 120:
        return f"{spent:.1f} s"
    return f"{spent / 60:.0f} min" if spent < 7200 else f"{spent / 3600:.1f} h"


def render_inspection(found: dict[str, Any], console: Console) -> None:
    """Print what inspect_folder() found: sizes, schemes, kinds of tensors, what is not quantized, shards."""
    bits = found["bits_per_weight"]
    console.print(f"{found['path']}: {found['architecture']}, {found['method'] or 'not quantized'}", markup=False)
    if found["note"]:
        console.print(found["note"], markup=False)
    size = f"{megabytes(found['bytes'])} of tensors"
    if found["bf16_bytes"]:
        share = 100 * found["bytes"] / found["bf16_bytes"]
        size += f", {share:.1f} % of {megabytes(found['bf16_bytes'])} in bf16; {bits['model']:.3f} bits per parameter"
    console.print(size)
    if found["modules"]:
        console.print(f"{len(found['modules'])} quantized linears, {bits['quantized']:.3f} bits per weight with scales")
        console.print(_table(["scheme", "modules", "bits per weight", "count"], _scheme_rows(found["modules"])))
    rows = [[kind, str(x["tensors"]), megabytes(x["bytes"])] for kind, x in found["kinds"].items()]
    console.print(_table(["kind", "tensors", "size"], rows))
    console.print(_table(["not quantized", "reason", "count", "size"], _unquantized_rows(found["unquantized"])))
    rows = [[shard["file"], str(shard["tensors"]), megabytes(shard["bytes"])] for shard in found["shards"]]
    console.print(_table(["shard", "tensors", "size"], rows))


def megabytes(count: int) -> str:
    """Bytes in powers of ten, as disks count."""
    return f"{count / 1e6:.2f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def _scheme_rows(modules: dict[str, dict[str, Any]]) -> list[list[str]]:
    groups: dict[tuple[str, str, str], int] = {}
    for name, module in modules.items():
        key = (module["scheme"], _family(name), f"{module['bits_per_weight']:.3f}")
        groups[key] = groups.get(key, 0) + 1
    return [[*key, str(count)] for key, count in groups.items()]


def _unquantized_rows(entries: list[dict[str, Any]]) -> list[list[str]]:
    groups: dict[tuple[str, str], list[int]] = {}
    for entry in entries:
        groups.setdefault((_family(entry["name"]), entry["reason"]), []).append(entry["bytes"])
    return [[*key, str(len(sizes)), megabytes(sum(sizes))] for key, sizes in groups.items()]


def _family(name: str) -> str:
    """model.layers.3.mlp.up_proj -> model.layers.*.mlp.up_proj"""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _table(columns: list[str], rows: list[list[str]]) -> Table:
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def render_verdict(result: dict[str, Any], console: Console) -> None:
    """Print the verdict of each engine, the findings that hold for it, and the kernels it uses."""
    engines = result.get("engines") or {result["engine"]: result}
    table = Table("engine", "verdict", "hardware", box=None, pad_edge=False)
    for name, one in engines.items():
        verdict = one["verdict"]
        runs = ", ".join(f"{machine} {how}" for machine, how in one["hardware"].items())
        table.add_row(name, f"[{_COLOUR[verdict]}]{verdict}[/]", escape(runs))
    console.print(f"{escape(result['path'])}" + (f", tp {result['tp']}" if result["tp"] > 1 else ""))
    console.print(table)
    seen: dict[tuple[str, ...], list[str]] = {}
    for name, one in engines.items():
        for finding in one["findings"]:
            key = tuple(finding[part] for part in ("level", "rule", "where", "message", "remedy"))
            seen.setdefault(key, []).append(name)
    order = list(_COLOUR)
    for (level, rule, where, message, remedy), names in sorted(seen.items(), key=lambda item: order.index(item[0][0])):
        only = "" if len(names) == len(engines) else f" ({', '.join(names)})"
        place = f"{where}: " if where else ""
        console.print(
            f"[{_COLOUR[level]}]{level}[/] {escape(f'[{rule}]')}{only} {escape(place + message)}", soft_wrap=True
        )
        if remedy:
            console.print(f"    {escape(remedy)}", soft_wrap=True)
    for name, one in engines.items():
        for row in one["kernels"]:
            by_kernel: dict[str, list[str]] = {}
            for machine, kernel in row["kernel"].items():
                by_kernel.setdefault(kernel, []).append(machine)
            served = "; ".join(f"{kernel} on {', '.join(machines)}" for kernel, machines in by_kernel.items())
            if served:
                console.print(f"{name}: {row['count']} x {escape(row['scheme'])}: {served} ({escape(row['modules'])})")
