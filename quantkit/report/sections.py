"""The parts of the report's page, first half: how good the model is. Each says what is missing."""

import shlex

from quantkit.report import figures
from quantkit.report.console import size_text
from quantkit.report.document import Document
from quantkit.report.markup import Markup, element, figure, join, missing, pairs, table
from quantkit.report.markup import figures as side_by_side
from quantkit.report.text_results import Interval, TextResult
from quantkit.report.verdict import Criterion, Threshold

TONES = {"recommended": "good", "with care": "fair", "no": "bad", "not measured": "unknown"}
ANSWERS = {
    "recommended": "Recommended",
    "with care": "To be used with care",
    "no": "Not recommended",
}


def number(value: float) -> str:
    """Three significant digits, or three decimals of what is at least 1."""
    return f"{value:.3f}" if 1 <= abs(value) < 1000 else f"{value:.3g}"


def percent(value: float) -> str:
    """With two decimals below 10 %."""
    return f"{100 * value:.2f} %" if abs(value) < 0.1 else f"{100 * value:.1f} %"


def spread(value: Interval, *, as_percent: bool = False) -> str:
    """value (low to high)."""
    show = percent if as_percent else number
    return f"{show(value.value)} ({show(value.low)} to {show(value.high)})"


def measure_command(document: Document) -> str:
    """What measures that which a run alone does not know."""
    ref = document.report.model or "ORIGINAL"
    return f"quantkit report {shlex.quote(document.folder)} --ref {shlex.quote(ref)} --text TEXT"


def verdict(document: Document) -> Markup:
    """The answer, why, the figures that matter most, and every threshold."""
    found = document.verdict
    box = element(
        "div",
        element("strong", ANSWERS[found.level]),
        element("p", _sentence(found.reason)),
        class_=f"verdict {TONES[found.level]}",
    )
    rows = [
        (
            one.name,
            _value(one),
            _limit(one.threshold, "recommended"),
            _limit(one.threshold, "care"),
            element("span", one.outcome, class_=f"chip {TONES[one.outcome]}"),
            one.remark,
        )
        for one in found.criteria
    ]
    columns = ("figure", "measured", "recommended", "with care", "says", "because")
    limits = table(columns, rows, numeric=(1, 2, 3), stack=True)
    return join([box, tiles(document), element("h3", "The thresholds behind it"), limits])


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:] + "."


def _value(one: Criterion) -> str:
    if one.value is None:
        return "not measured" if one.outcome == "not measured" else ""
    exact = one.value.low == one.value.high
    show = percent if one.threshold is not None and one.threshold.percent else number
    return show(one.value.value) if exact else spread(one.value, as_percent=show is percent)


def _limit(threshold: Threshold | None, which: str) -> str:
    if threshold is None:
        return ""
    value = getattr(threshold, which)
    sign = "≥" if threshold.more_is_better else "≤"
    return f"{sign} {100 * value:g} %" if threshold.percent else f"{sign} {value:g}"


def tiles(document: Document) -> Markup:
    """The figures that a reader looks for first."""
    report, measured = document.report, document.measured
    shown: list[tuple[str, str]] = [
        (
            f"{report.bytes_after / max(1, report.bytes_before):.0%}",
            f"of the original's size: {size_text(report.bytes_after)}",
        ),
        (f"{report.bits_per_weight:.2f}", "bits per quantized weight"),
    ]
    compared = next((one.divergence for one in measured.texts if one.divergence is not None), None)
    if compared is not None:
        shown += [
            (number(compared.kl_mean.value), "KL from the original, nats"),
            (percent(compared.top1_agreement.value), "same likeliest token"),
            (percent(compared.flips.value), "answers flipped"),
            (f"{compared.perplexity_ratio.value:.3f}", "times the original's perplexity"),
        ]
    elif (held := report.held_out) is not None:
        shown += [
            (number(held.kl), "KL on the run's held-out text"),
            (percent(held.top1_agreement), "same likeliest token there"),
        ]
    if measured.speed is not None:
        shown.append(
            (f"{measured.speed.model.decode / measured.speed.reference.decode:.2f}", "times the original's speed here")
        )
    return element(
        "div", *(element("div", element("b", a), element("span", b), class_="tile") for a, b in shown), class_="tiles"
    )


def size_and_speed(document: Document) -> Markup:
    """Bytes before and after; tokens per second of both, or that nobody measured them."""
    report, speed = document.report, document.measured.speed
    after = f"{size_text(report.bytes_after)}, {report.bytes_after / max(1, report.bytes_before):.0%}"
    bars = figures.size(report.bytes_before, report.bytes_after, (size_text(report.bytes_before), after))
    drawn = side_by_side(
        figure(bars, "Bytes of all tensors, those that stay as they are included."),
        figure(
            figures.speed(speed),
            speed
            and f"Batch size 1, both models in turn on {speed.device} in {speed.dtype} with quantkit's own loader: "
            f"medians of {speed.prompts} prompts of {speed.prompt_tokens} tokens with {speed.new_tokens} new ones. "
            "An engine on other hardware has other figures.",
        ),
    )
    absent = None if speed else missing("The speed beside the original was not measured.", measure_command(document))
    rows = pairs(
        [
            ("bits per quantized weight", f"{report.bits_per_weight:.3f}, scales and zero points included"),
            ("coverage", f"{report.coverage}; {percent(report.weights_quantized)} of the decoder's weights"),
            ("key-value cache", report.kv_cache or "as the model computes it"),
            ("whole file", None if report.gguf is None else f"{report.gguf.bits_per_weight:.3f} bits per weight"),
        ]
    )
    return join([drawn, rows, absent])


def divergence(document: Document) -> Markup:
    """KL, agreement, flips and perplexity of each text with intervals."""
    measured = document.measured
    texts = [one for one in measured.texts if one.divergence is not None]
    words = element(
        "p",
        "KL is how far the distribution of the next token lies from the original's, in nats. A flip is a token that "
        "one of the two models predicts rightly and the other does not. Intervals: 95\N{NO-BREAK SPACE}%, by a "
        "bootstrap over windows.",
    )
    if not texts:
        return join([words, _held_out(document)])
    caption = (
        "Points are estimates, lines their 95 % intervals; dashed: the thresholds for “recommended” and “with care”."
    )
    drawn = side_by_side(figure(figures.divergence(texts), caption))
    columns = [_text_column(one) for one in texts]
    rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
    shown = table(("", *(one.name for one in texts)), rows, numeric=range(1, len(texts) + 1))
    bos = ", each behind the BOS token" if measured.bos else ""
    setting = f"Windows of {measured.context} tokens{bos}, {measured.dtype} on {measured.device}."
    return join([words, drawn, shown, element("p", setting, class_="muted")])


def _held_out(document: Document) -> Markup:
    """The run's own two figures, and what they lack."""
    held = document.report.held_out
    what = "Intervals, flips and perplexity" if held else "KL, flips and perplexity"
    absent = missing(f"{what} were not measured: no original was given.", measure_command(document))
    if held is None:
        return absent
    known = pairs(
        [
            ("KL, nats", f"{number(held.kl)}, without an interval"),
            ("same likeliest token", percent(held.top1_agreement)),
            ("measured on", f"{held.tokens} tokens that the run itself held out of its calibration text"),
        ]
    )
    return join([known, absent])


def _text_column(one: TextResult) -> dict[str, str]:
    d = one.divergence
    assert d is not None
    return {
        "KL, nats, mean": spread(d.kl_mean),
        "KL, 99th percentile": spread(d.kl_p99),
        "same likeliest token": spread(d.top1_agreement, as_percent=True),
        "flips": spread(d.flips, as_percent=True),
        "right to wrong": spread(d.right_to_wrong, as_percent=True),
        "wrong to right": spread(d.wrong_to_right, as_percent=True),
        "perplexity": spread(one.model.perplexity),
        "perplexity of the original": spread(d.reference.perplexity),
        "perplexity by the original's": spread(d.perplexity_ratio),
        "tokens": f"{one.tokens:,} in {one.windows} windows",
    }


def positions(document: Document) -> Markup:
    """Perplexity by position in the window, of each text."""
    shown = []
    for one in document.measured.texts:
        shown.append(figure(figures.positions(one), f"{one.windows} windows; bands are 95 % intervals."))
        paired = "The same by the original's, paired by window: texts differ more than the two models do."
        shown.append(figure(figures.position_ratios(one), paired))
    if (drawn := side_by_side(*shown)) is None:
        return missing("Perplexity by position was not measured.", measure_command(document))
    words = "What is lost can grow with the text before a token, above all where the cache is quantized."
    return join([element("p", words), drawn])
