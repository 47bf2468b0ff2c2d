"""A serving plan as tables for a terminal."""

from rich.console import Console
from rich.table import Table

from quantkit.report.console import count_text, size_text
from quantkit.report.serving_plan import SchemeServing, ServingPlan

REASON = 120  # characters of why a scheme is impossible; JSON has all of it
SHORT = {  # of prefill and decode, side by side
    "compute": "compute",
    "memory bandwidth": "memory",
    "interconnect bandwidth": "links",
    "interconnect latency": "latency",
    "host overhead": "host",
    "capacity": "capacity",
    "scheduler": "scheduler",
}


def render_serving(plan: ServingPlan, console: Console) -> None:
    """Print a serving plan: what is served where, the schemes, and what to take last."""

    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    split = f"{plan.tp * plan.pp} x " if plan.tp * plan.pp > 1 else ""
    where = f"{split}{plan.device.name}" + (f" (tp {plan.tp}, pp {plan.pp})" if split else "")
    active = "" if plan.active_parameters == plan.parameters else f", {count_text(plan.active_parameters)} active"
    say(f"{plan.model}: {count_text(plan.parameters)} parameters{active}, served by {plan.engine} on {where}")
    say(
        f"{plan.concurrency} x {plan.context} tokens, prompts of {plan.prompt}, answers of {plan.output}"
        + (f", {plan.profile}" if plan.profile else "")
    )
    figures = plan.device
    ridges = ", ".join(f"{kind} {peak / 1e12:.4g}" for kind, peak in figures.peaks.items())
    say(
        f"{figures.name}: {figures.memory_bytes / 2**30:.0f} GiB, {figures.bandwidth / 1e12:.3g} TB/s, "
        f"{ridges} TFLOP/s, {figures.ridge['bf16']:.0f} FLOP/B in bf16; {figures.source}"
    )
    caches = Table("cache", "a token", *(f"{n} tokens" for n in plan.kv["bf16"].bytes_by_context), "all", box=None)
    for name, size in plan.kv.items():
        lengths = (_binary(each) for each in size.bytes_by_context.values())
        caches.add_row(name, f"{size.bytes_per_token:,.0f} B", *lengths, _binary(size.bytes_of_all))
    console.print(caches)
    if (links := plan.all_reduce) is not None:
        say(
            f"{links.count} all-reduces of {links.bytes_per_token / 2**20:.3g} MiB a token over {figures.link}: "
            f"{links.decode_seconds * 1e6:.0f} us a decode step ({links.decode_share:.1%}), "
            f"{links.prefill_seconds * 1e3:.2f} ms a prompt"
        )
    console.print(_schemes(plan))
    price = "" if plan.price is None else f"; cost: of a million output tokens, at {plan.price:g} a device and hour"
    say(f"  most: sequences of {plan.context} tokens with a cache of 16/8 bits{price}", "dim")
    for line in (f"{each.scheme}: {each.refused}" for each in plan.schemes if not each.able):
        say(f"  not on {plan.engine} there: {line}", "dim")
    for scheme, reason in plan.impossible.items():
        say(f"  not of this model: {scheme}: {reason[:REASON]}{'...' if len(reason) > REASON else ''}", "dim")
    for line in plan.unknown:
        say(f"  not known: {line}", "dim")
    say("assumed: " + "; ".join(plan.assumptions), "dim")
    if plan.take is None:
        say(f"nothing fits: {plan.take_why}", "red")
    else:
        cache = "" if plan.take.kv_cache == "bf16" else f" with an {plan.take.kv_cache} cache"
        by = "" if plan.take.recipe is None else f" (recipe {plan.take.recipe})"
        say(f"take {plan.take.scheme}{cache}{by}: {plan.take_why}", "green" if plan.fits else "yellow")
    for row in plan.advice[1:]:
        say(f"  {row.rule}: {row.change}: {row.why}")


def _schemes(plan: ServingPlan) -> Table:
    """One row a scheme; `most`: sequences that fit with a cache of 16 and of 8 bits; cost: of a million tokens."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    titles = ["scheme", "weights", "most", "TTFT", "a token", "tokens/s", "bound by"]
    for title in titles + ([] if plan.price is None else ["cost"]):
        table.add_column(title, no_wrap=True)
    for each in plan.schemes:
        if each.able:
            table.add_row(*_row(each))
    return table


def _row(each: SchemeServing) -> list[str]:
    cost = [] if each.cost_per_million_output_tokens is None else [f"{each.cost_per_million_output_tokens:.3g}"]
    return [
        each.scheme,
        size_text(each.weight_bytes),
        f"{each.max_concurrency['bf16']}/{each.max_concurrency['fp8']}",
        _time(each.ttft_seconds),
        _time(each.token_seconds),
        _rate(each.tokens_per_second),
        f"{SHORT[each.prefill.regime]}, {SHORT[each.decode.regime]}",
        *cost,
    ]


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _rate(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _binary(nbytes: float) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size:
            return f"{nbytes / size:.4g} {unit}"
    return f"{nbytes:.0f} B"
