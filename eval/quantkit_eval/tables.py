"""The results of evaluate() as console tables and as a row of a Markdown table."""

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from quantkit_eval.results import Evaluation, Interval, TextResult

TABLE_HEADER = "| model | perplexity | KL | KL p99 | top-1 agreement | flips |\n|---|---|---|---|---|---|"


def render(result: Evaluation, console: Console) -> None:
    """Print one text's figures with their intervals, or a row for each of several texts."""
    console.print(_details(result, result.texts[0]) if len(result.texts) == 1 else _overview(result))
    tokens, windows = (sum(getattr(text, name) for text in result.texts) for name in ("tokens", "windows"))
    begins = ", each begins with the tokenizer's BOS" if result.bos else ""
    cache = "" if result.kv_cache is None else f", cache {result.kv_cache}"
    console.print(
        f"{tokens} tokens in {windows} windows of {result.context}{begins}, "
        f"{result.engine or result.dtype} on {result.device}{cache}, {result.seconds:.1f} s"
    )
    if (a := result.texts[0].acceptance) is not None:
        console.print(
            f"accepted: of its guesses at the original's greedy tokens, {a.draft_tokens} at a time, {a.new_tokens} "
            f"tokens behind each of {a.prompts} pieces of {a.prompt_tokens} tokens of the text"
        )
    for note in result.notes:
        console.print(f"note: {note}", markup=False, highlight=False)


def _details(result: Evaluation, text: TextResult) -> Table:
    divergence = text.divergence
    table = Table(title=escape(f"{result.model} on {text.name}"), title_justify="left")
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    if divergence:
        table.add_column("original", justify="right")

    def add(label: str, interval: Interval, original: Interval | None = None, *, percent: bool = False) -> None:
        show = _percent if percent else _number
        row = [label, show(interval.value), f"{show(interval.low)} .. {show(interval.high)}"]
        table.add_row(*row, *([show(original.value) if original else ""] if divergence else []))

    own, original = text.model, divergence.reference if divergence else None
    add("perplexity", own.perplexity, original and original.perplexity)
    add("bits per byte", own.bits_per_byte, original and original.bits_per_byte)
    add("top-1 accuracy", own.accuracy, original and original.accuracy, percent=True)
    if divergence:
        add("perplexity / original's", divergence.perplexity_ratio)
        add("KL(original || this), mean, nats", divergence.kl_mean)
        add("KL, 99th percentile", divergence.kl_p99)
        add("top-1 agreement", divergence.top1_agreement, percent=True)
        add("flips", divergence.flips, percent=True)
        add("  right to wrong", divergence.right_to_wrong, percent=True)
        add("  wrong to right", divergence.wrong_to_right, percent=True)
    if text.acceptance:
        add("guesses accepted as a draft", text.acceptance.rate, percent=True)
    return table


def _overview(result: Evaluation) -> Table:
    table = Table(title=escape(result.model), title_justify="left")
    table.add_column("text", overflow="fold")
    compared = result.texts[0].divergence is not None
    columns = (
        ("perplexity", "original", "KL, nats", "KL p99", "top-1 agreement")
        if compared
        else ("perplexity", "top-1 accuracy")
    )
    drafts = result.texts[0].acceptance is not None
    for column in (*columns, *(["accepted"] if drafts else []), "tokens"):
        table.add_column(column, justify="right")
    for text in result.texts:
        if (d := text.divergence) is not None:
            cells = [_number(d.reference.perplexity.value), _spread(d.kl_mean), _number(d.kl_p99.value)]
            cells.append(_percent(d.top1_agreement.value))
        else:
            cells = [_percent(text.model.accuracy.value)]
        if text.acceptance is not None:
            cells.append(_percent(text.acceptance.rate.value))
        name = text.name if len(text.name) <= 20 else Path(text.name).name
        table.add_row(escape(name), _number(text.model.perplexity.value), *cells, str(text.tokens))
    return table


def table_row(result: TextResult, name: str) -> str:
    """One row under TABLE_HEADER; a model without reference leaves the divergence columns empty."""
    cells = [name, f"{result.model.perplexity.value:.3f}"]
    if (d := result.divergence) is not None:
        cells += [_spread(d.kl_mean), _number(d.kl_p99.value)]
        cells += [_percent(d.top1_agreement.value), _percent(d.flips.value)]
    else:
        cells += [""] * 4
    return "| " + " | ".join(cells) + " |"


def _spread(interval: Interval) -> str:
    return f"{_number(interval.value)} ± {_number((interval.high - interval.low) / 2)}"


def _number(x: float) -> str:
    return f"{x:.3f}" if abs(x) >= 1 or x == 0 else f"{x:.3g}"


def _percent(x: float) -> str:
    return f"{100 * x:.2f} %"
