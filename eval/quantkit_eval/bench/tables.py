"""A benchmark as tables."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from quantkit_eval.bench.regime import SHARES, Regime
from quantkit_eval.bench.results import Benchmark, Measured
from quantkit_eval.bench.statistics import PERCENTILES

METRICS = ("ttft", "tpot", "itl", "e2e")


def render(result: Benchmark, console: Console) -> None:
    """Print a table for each scenario, what limits it, and llama.cpp's figures."""
    for scenario in result.scenarios:
        console.print(_speeds(result, scenario))
        console.print(_latencies(scenario))
        for line in evidence(result, scenario):
            console.print(line, markup=False, highlight=False)
    if result.llama_bench:
        table = Table(title="llama-bench, one sequence", title_justify="left")
        for column in ("model", "MB", "prompt tokens/s", "decode tokens/s"):
            table.add_column(column, justify="left" if column == "model" else "right")
        for row in result.llama_bench:
            speeds = ["" if speed is None else f"{speed:.0f}" for speed in (row.prompt, row.decode)]
            table.add_row(escape(row.name), f"{row.bytes / 1e6:.1f}", *speeds)
        console.print(table)
    for part in result.profile:
        console.print(f"{part.share:6.1%} {part.seconds:8.3f} s  {part.kind}", markup=False, highlight=False)
    console.print(
        f"{result.dtype} on {result.device}, {result.threads} thread{'' if result.threads == 1 else 's'}, cache "
        f"{result.kv_cache}; peak here: {result.peak.flops / 1e9:.1f} GFLOP/s, copies "
        f"{result.peak.copy_bytes / 1e9:.1f} GB/s; {result.seconds:.0f} s",
        markup=False,
        highlight=False,
    )
    for note in result.notes:
        console.print(f"note: {note}", markup=False, highlight=False)


def _speeds(result: Benchmark, scenario: Measured) -> Table:
    s = scenario.scenario
    rate = result.options.get("rate")
    arrivals = "" if rate is None else f", {rate:g} a second"
    many = "" if s.requests == 1 else "s"
    title = f"{result.model}: {s.requests} request{many}{arrivals}, {s.input} tokens in, {s.output} out"
    table = Table(title=escape(title), title_justify="left")
    table.add_column("", overflow="fold")
    for column in ("tokens/s", "engine over it", "by processor time", "same outputs"):
        table.add_column(column, justify="right")
    table.add_row("engine", f"{scenario.tokens_per_second:.0f}", "", "", "")
    for each in scenario.baselines:
        figures = (f"{each.sample.tokens_per_second:.0f}", f"{each.speedup:.2f}", f"{each.processor_ratio:.2f}")
        table.add_row(escape(each.name), *figures, f"{each.same} of {s.requests}")
    return table


def _latencies(scenario: Measured) -> Table:
    table = Table(title="milliseconds", title_justify="left")
    table.add_column("", overflow="fold")
    for percent in PERCENTILES:
        table.add_column(f"P{percent}", justify="right")
    every = {"engine": scenario.latencies} | {each.name: each.latencies for each in scenario.baselines}
    for metric in METRICS:
        for name, latencies in every.items():
            spread = getattr(latencies, metric)
            if spread is not None:
                values = [f"{getattr(spread, f'p{percent}') * 1e3:.4g}" for percent in PERCENTILES]
                table.add_row(escape(f"{metric.upper()} {name}"), *values)
    return table


def evidence(result: Benchmark, scenario: Measured) -> list[str]:
    """What limits prefill and decode, and what the cache held."""
    lines = [_regime(name, found) for name, found in (("prefill", scenario.prefill), ("decode", scenario.decode))]
    hits = f", {scenario.hits} prompt tokens found in it" if scenario.hits else ""
    again = f", {scenario.preemptions} preemptions" if scenario.preemptions else ""
    guesses = "" if scenario.acceptance is None else f"; {scenario.acceptance:.0%} of {scenario.drafted} guesses right"
    cache = scenario.blocks * scenario.block_bytes / 1e6
    lines.append(
        f"memory {scenario.memory / 1e6:.0f} MB; cache {scenario.blocks} of {scenario.cache_blocks} blocks of "
        f"{scenario.block_size} tokens, {cache:.1f} MB{hits}{again}{guesses}"
    )
    return lines


def _regime(phase: str, found: Regime) -> str:
    if found.name is None:
        return f"{phase}: no step of it"
    shares = ", ".join(f"{share} {getattr(found, share):.0%}" for share in SHARES)
    milliseconds = found.seconds / found.steps * 1e3
    return (
        f"{phase}: {found.tokens / found.seconds:.0f} tokens/s, {found.steps} steps of {milliseconds:.2f} ms, "
        f"limited by {found.name} ({shares})"
    )
