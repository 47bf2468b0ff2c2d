"""Every table the command prints: the few figures that matter; reports and --json have the rest."""

import re
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from quantkit.report.conversion_record import ConversionReport, ImatrixReport
from quantkit.report.plan import Plan
from quantkit.report.records import HeldOutRecord, Report

_COLOUR = {"loads": "green", "refused": "red", "unknown": "yellow", "error": "red", "warning": "yellow", "info": "dim"}

MAX_WARNINGS = 10
SERVE = {
    "vllm": "vllm serve {}",
    "sglang": "python -m sglang.launch_server --model-path {}",
    "tensorrt-llm": "trtllm-serve {}",
}


def render_quantization(report: Report, output: Path, engines: Sequence[str], console: Console) -> None:
    """What a run made and where, how good it is, and what to do with it next.

    output   the folder that was written; engines: those that load it
    """
    transforms, weights = report.recipe["transforms"], report.recipe["weights"]
    steps = [name for item in (*transforms, weights["algorithm"]) for name in item]
    counts = Counter(record.scheme for record in report.linears)
    schemes = "; ".join(f"{scheme} ({count})" if len(counts) > 1 else scheme for scheme, count in counts.most_common())
    before, after = report.bytes_before, report.bytes_after
    table = Table(show_header=False)
    for label, value in {
        "model": report.model or "a module in memory",
        "output": str(output),
        "size": f"{size_text(after)}, {after / before:.0%} of {size_text(before)}",
        "scheme": f"{' + '.join(steps)}, {schemes}",
        "bits per weight": _bits_text(report),
        "cache": report.kv_cache,
        "coverage": report.coverage,
        "calibration": _calibration_text(report),
        "output error": f"{report.output_error:.2%} of the energy, mean of {len(report.linears)} linears",
        "KL on held-out text": None if report.held_out is None else _held_out_text(report.held_out),
        "time and memory": f"{duration_text(report.seconds_total)}, {size_text(report.peak_memory_bytes)}",
    }.items():
        if value is not None:
            table.add_row(label, escape(value))
    console.print(table)
    for warning in report.warnings[:MAX_WARNINGS]:
        console.print(f"warning: {warning}", markup=False, highlight=False)
    if (more := len(report.warnings) - MAX_WARNINGS) > 0:
        console.print(f"and {more} more warnings in quantkit-report.json")
    console.print("next:")
    for line in _next_lines(report, output, engines):
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


def _calibration_text(report: Report) -> str | None:
    found = report.calibration
    if found is None:
        return None
    names = ", ".join(source.name for source in found.sources) or "given tokens"
    bos = ", each window after BOS" if found.bos else ""
    return f"{names}, {found.samples} x {found.seq_len} tokens{bos}"


def _bits_text(report: Report) -> str:
    whole = "" if report.gguf is None else f" of the linears, {report.gguf.bits_per_weight:.2f} of the whole file"
    return f"{report.bits_per_weight:.2f}{whole}"


def _held_out_text(found: HeldOutRecord) -> str:
    return f"{found.kl:.4f} nats, same likeliest token {found.top1_agreement:.1%} ({found.tokens} tokens)"


def _next_lines(report: Report, output: Path, engines: Sequence[str]) -> list[str]:
    """Commands to copy; engines without one of their own, and those that refuse the folder, have none."""
    folder = shlex.quote(str(output))
    ref = "" if report.model is None else f" --ref {shlex.quote(report.model)}"
    lines = [f"quantkit eval {folder}{ref}"]
    if report.gguf is not None:
        file = shlex.quote(str(output / min(name for name in report.files if name.endswith(".gguf"))))
        return [*lines, f"llama-server -m {file}", f"python: model = quantkit.load({str(output)!r})"]
    lines += [command.format(folder) for engine, command in SERVE.items() if engine in engines]
    return [*lines, f"python: model = quantkit.load({str(output)!r})"]


def render_conversion(report: ConversionReport, console: Console) -> None:
    """A few lines of a conversion's report."""
    console.print(f"{report.source}: {report.source_format} -> {report.format}, {report.modules} modules", markup=False)
    for scheme, count in report.schemes.items():
        console.print(f"{count} x {scheme}", markup=False)
    for note in report.notes:
        console.print(note, markup=False)
    rounded = report.rounded
    if report.requantized is not None:
        console.print(f"all weights rounded again, onto {report.requantized}")
    elif rounded.scales:
        console.print(f"{rounded.scales} scales rounded, by up to {rounded.largest_change:.1e} of their size")
    elif report.modules:
        console.print("codes, scales and zero points are exactly the same")


def render_imatrix(report: ImatrixReport, console: Console) -> None:
    """What an importance matrix holds, and which experts it knows nothing of."""
    tokens = f"{report.samples} x {report.seq_len} = {report.samples * report.seq_len:,} tokens"
    console.print(f"{report.output}: {report.entries} tensors, {tokens} of {' + '.join(report.sources)}", markup=False)
    for name, count in report.unreached.items():
        console.print(f"{name}: no token reached {count} experts; their importance is 1", markup=False)


def render_plan(plan: Plan, console: Console) -> None:
    """Print an estimate: what comes out, what it takes, and the verdict last."""
    total = sum(plan.params.values())
    kinds = ", ".join(f"{kind} {count_text(n)}" for kind, n in sorted(plan.params.items(), key=lambda kv: -kv[1]))
    seen = "headers" if plan.weights_seen else "config.json alone"
    console.print(f"{plan.model}: {plan.model_type}, {count_text(total)} parameters ({kinds})", markup=False)
    schemes = ", ".join(f"{count} x {scheme}" for scheme, count in plan.schemes.items())
    console.print(f"{plan.linears} linears: {schemes}; sizes from {seen}", markup=False)
    table = Table("", "estimate", "free", box=None, pad_edge=False)
    table.add_row("output", f"{size_text(plan.bytes_after)} of {size_text(plan.bytes_before)}", "")
    for name, (count, held) in (plan.types or {}).items():
        table.add_row(f"  {name}", f"{size_text(held)} in {count} tensors", "")
    table.add_row("bits per quantized weight", f"{plan.bits_per_weight:.3f}", "")
    table.add_row("cache per token", f"{size_text(plan.kv_bytes_per_token)}, {plan.kv_cache}", "")
    if (text := plan.calibration) is not None:
        table.add_row("calibration", f"{text.samples} x {text.seq_len} = {text.tokens:,} tokens", "")
    table.add_row("peak memory", size_text(plan.peak_memory_bytes), size_text(plan.free_memory_bytes))
    for part, held in plan.memory.items():
        table.add_row(f"  {part}", size_text(held), "")
    table.add_row("disk", size_text(plan.disk_bytes), size_text(plan.free_disk_bytes))
    table.add_row("time", duration_text(plan.seconds_total), f"on a CPU: {plan.machine}")
    for stage, spent in plan.seconds.items():
        table.add_row(f"  {stage}", duration_text(spent), "")
    console.print(table)
    for line in plan.warnings[:MAX_WARNINGS]:
        console.print(f"warning: {line}", markup=False)
    console.print("it fits" if plan.fits else "it does not fit", style="green" if plan.fits else "red")
    for line in (*plan.problems, *plan.advice):
        console.print(f"  {line}", markup=False)


def count_text(number: int) -> str:
    """A number of parameters, in short."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return str(number)


def duration_text(spent: float) -> str:
    """Seconds, minutes or hours."""
    if spent < 0.05:
        return "under 0.1 s"
    if spent < 120:
        return f"{spent:.1f} s"
    return f"{spent / 60:.0f} min" if spent < 7200 else f"{spent / 3600:.1f} h"


def render_inspection(found: dict[str, Any], console: Console) -> None:
    """Print what inspection found: sizes, schemes, kinds of tensors, what is not quantized, shards."""
    if found.get("format") == "gguf" and "keys" in found:
        _render_gguf(found, console)
        return
    bits = found["bits_per_weight"]
    console.print(f"{found['path']}: {found['architecture']}, {found['method'] or 'not quantized'}", markup=False)
    if found["note"]:
        console.print(found["note"], markup=False)
    size = f"{size_text(found['bytes'])} of tensors"
    if found["bf16_bytes"]:
        share = 100 * found["bytes"] / found["bf16_bytes"]
        size += f", {share:.1f} % of {size_text(found['bf16_bytes'])} in bf16; {bits['model']:.3f} bits per parameter"
    console.print(size)
    if found["modules"]:
        console.print(f"{len(found['modules'])} quantized linears, {bits['quantized']:.3f} bits per weight with scales")
        console.print(_table(["scheme", "modules", "bits per weight", "count"], _scheme_rows(found["modules"])))
    rows = [[kind, str(x["tensors"]), size_text(x["bytes"])] for kind, x in found["kinds"].items()]
    console.print(_table(["kind", "tensors", "size"], rows))
    console.print(_table(["not quantized", "reason", "count", "size"], _unquantized_rows(found["unquantized"])))
    rows = [[shard["file"], str(shard["tensors"]), size_text(shard["bytes"])] for shard in found["shards"]]
    console.print(_table(["shard", "tensors", "size"], rows))


def _render_gguf(found: dict[str, Any], console: Console) -> None:
    """What a GGUF file holds: types, keys, and what is odd."""
    bits, share = found["bits_per_weight"], 100 * found["bytes"] / max(1, found["bf16_bytes"])
    said = f"GGUF v{found['version']}, {found['mix'] or 'no mix named'}"
    console.print(f"{found['path']}: {found['architecture']}, {said}", markup=False, highlight=False, soft_wrap=True)
    size = f"{size_text(found['bytes'])} of tensors, {share:.1f} % of {size_text(found['bf16_bytes'])} in bf16"
    model = "" if bits["model"] is None else f"; {bits['model']:.3f} bits per parameter"
    console.print(f"{size}{model}")
    if bits["quantized"] is not None:
        console.print(f"{bits['quantized']:.3f} bits per quantized weight with scales")
    rows = [
        [name, str(x["tensors"]), f"{x['bits_per_weight']:.4g}", size_text(x["bytes"])]
        for name, x in found["types"].items()
    ]
    console.print(_table(["type", "tensors", "bits per weight", "size"], rows))
    tensors = [[kind, *cells] for kind, cells in _tensor_rows(found["tensors"])]
    console.print(_table(["tensors", "type", "count", "size"], tensors))
    console.print(_table(["key", "value"], [[key, _value_text(value)] for key, value in found["keys"].items()]))
    if len(found["shards"]) > 1:
        rows = [[shard["file"], str(shard["tensors"]), size_text(shard["bytes"])] for shard in found["shards"]]
        console.print(_table(["shard", "tensors", "size"], rows))
    for finding in found["odd"]:
        place = f"{finding['where']}: " if finding["where"] else ""
        text = f"odd: {place}{finding['message']}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _tensor_rows(tensors: dict[str, dict[str, Any]]) -> list[tuple[str, list[str]]]:
    groups: dict[tuple[str, str], list[int]] = {}
    for name, tensor in tensors.items():
        groups.setdefault((family(name), tensor["type"]), []).append(tensor["bytes"])
    return [(name, [type_, str(len(sizes)), size_text(sum(sizes))]) for (name, type_), sizes in groups.items()]


def _value_text(value: Any) -> str:
    if isinstance(value, dict):  # a long array
        return f"{value['length']} entries: {', '.join(map(repr, value['first']))}, ..."
    return repr(value) if isinstance(value, str) else str(value)


def size_text(count: float) -> str:
    """Bytes in powers of ten, as disks count: 512 B, 4.62 MB, 1.33 GB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= 0.9995 * size:  # what rounds to 1000 of a unit is 1 of the next
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def _scheme_rows(modules: dict[str, dict[str, Any]]) -> list[list[str]]:
    groups: dict[tuple[str, str, str], int] = {}
    for name, module in modules.items():
        key = (module["scheme"], family(name), f"{module['bits_per_weight']:.3f}")
        groups[key] = groups.get(key, 0) + 1
    return [[*key, str(count)] for key, count in groups.items()]


def _unquantized_rows(entries: list[dict[str, Any]]) -> list[list[str]]:
    groups: dict[tuple[str, str], list[int]] = {}
    for entry in entries:
        groups.setdefault((family(entry["name"]), entry["reason"]), []).append(entry["bytes"])
    return [[*key, str(len(sizes)), size_text(sum(sizes))] for key, sizes in groups.items()]


def family(name: str) -> str:
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
