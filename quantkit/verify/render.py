"""The result of verify_folder as a short table."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_COLOUR = {"loads": "green", "refused": "red", "unknown": "yellow", "error": "red", "warning": "yellow", "info": "dim"}


def render(result: dict[str, Any], console: Console) -> None:
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
