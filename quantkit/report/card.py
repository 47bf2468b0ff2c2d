"""A report as the model card of the Hub: README.md with metadata as YAML, and the figures as a table.

Format: https://huggingface.co/docs/hub/model-cards (checked by the parser of huggingface_hub).
"""

import hashlib
import re
import shlex
from pathlib import Path
from typing import Any

from quantkit.report.console import SERVE, size_text
from quantkit.report.document import Document
from quantkit.report.text_results import Interval, TextResult

CARD = "README.md"
KEPT = ("license", "license_name", "license_link", "language")  # of the original's card
_MARK = re.compile(r"<!-- quantkit report, sha256 ([0-9a-f]{64}): made again by quantkit until it is edited -->\n")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


def model_card(document: Document, original: Path | None, card: str | None) -> str:
    """README.md. original: the folder of the original, None where it is not on this machine; card: its README.md."""
    from huggingface_hub import ModelCardData

    kept, base = carried_over(card), base_model(document.report.model, original)
    data = ModelCardData(
        base_model=base,
        library_name="gguf" if document.report.gguf else "transformers",
        tags=_tags(document),
        pipeline_tag="text-generation",
        model_name=_name(document),
        eval_results=_results(document) or None,
        base_model_relation="quantized",
        **kept,
    )
    body = _body(document, base or "a module in memory", licensed="license" in kept)
    content = f"---\n{data.to_yaml()}\n---\n\n{body}"
    head, _, rest = content.partition("\n---\n\n")
    return f"{head}\n---\n\n{_mark(content)}{rest}"


def _mark(content: str) -> str:
    digest = hashlib.sha256(content.encode("utf-8", "backslashreplace")).hexdigest()
    return f"<!-- quantkit report, sha256 {digest}: made again by quantkit until it is edited -->\n"


def card_is_ours(content: str) -> bool:
    """Whether a README.md was written here, and not edited since."""
    found = _MARK.search(content)
    return found is not None and _mark(content[: found.start()] + content[found.end() :]) == found[0]


def base_model(model: str | None, original: Path | None) -> str | None:
    """The Hub's name of the original: as it was given, or as its config.json has it; else the folder's own name."""
    if model is not None and _HUB_ID.fullmatch(model) and not Path(model).exists():
        return model
    if original is None:
        return Path(model).name if model else None
    if original.parent.name == "snapshots" and original.parent.parent.name.startswith("models--"):
        return original.parent.parent.name.removeprefix("models--").replace("--", "/")
    return original.resolve().name


def carried_over(card: str | None) -> dict[str, Any]:
    """License and language by the text of the original's card; {} where it says neither, or is no card."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError  # what huggingface_hub reads metadata with

    try:
        found = {} if card is None else ModelCard(card, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, YAMLError):  # its metadata is no mapping, or no YAML
        return {}
    return {key: found[key] for key in KEPT if found.get(key)}


def _name(document: Document) -> str:
    return Path(document.folder).resolve().name


def _tags(document: Document) -> list[str]:
    report = document.report
    recipe = report.recipe
    steps = [name for item in (*(recipe.get("transforms") or ()), (recipe.get("weights") or {}).get("algorithm") or {})
             for name in item]  # fmt: skip
    layout = (recipe.get("output") or {}).get("format")
    schemes = [one.scheme.split()[0] for one in report.linears]
    found = ["quantized", "quantkit", *([layout] if layout else []), *steps, *schemes]
    return list(dict.fromkeys(str(tag) for tag in found))


def _results(document: Document) -> list[Any]:
    """One entry of model-index for each metric: of texts and of tasks; nothing for what was not measured."""
    from huggingface_hub import EvalResult

    found = []
    for text in document.measured.texts:
        for kind, name, value in _metrics(text):
            found.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=_file_name(text.name),  # the parser puts results of one type together
                    dataset_name=_file_name(text.name),
                    metric_type=kind,
                    metric_name=name,
                    metric_value=round(value.value, 6),
                    dataset_args={"sha256": text.sha256},
                )
            )
    for task in document.measured.tasks:
        found.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=task.task,
                dataset_name=task.task,
                metric_type=task.metric,
                metric_name=task.metric,
                metric_value=round(task.value, 6),
            )
        )
    return found


def _metrics(text: TextResult) -> list[tuple[str, str, Interval]]:
    found = [("perplexity", "perplexity", text.model.perplexity)]
    if (d := text.divergence) is not None:
        found += [
            ("kl_divergence", "KL from the original, nats", d.kl_mean),
            ("top1_agreement", "same likeliest token as the original", d.top1_agreement),
            ("flip_rate", "tokens that only one of the two predicts", d.flips),
        ]
    return found


def _file_name(name: str) -> str:
    """A text's name without the folders of whoever measured: a card is for all to read."""
    return Path(name).name


def _body(document: Document, base: str, *, licensed: bool) -> str:
    report, verdict = document.report, document.verdict
    after, before = size_text(report.bytes_after), size_text(report.bytes_before)
    parts = [
        f"# {_plain(_name(document))}",
        f"{_plain(base)} quantized by quantkit {report.quantkit}: "
        f"{report.bits_per_weight:.2f} bits per quantized weight, {after} of {before}.",
        f"**{verdict.level}**: {_plain(verdict.reason)}.",
        _table(document),
    ]
    if not licensed:
        parts.append("License: missing here; that of the original holds.")
    parts += ["## Use", _use(document), "## Recipe", _recipe(document)]
    return "\n\n".join(parts) + "\n"


def _table(document: Document) -> str:
    rows = ["| figure | measured | recommended | with care | says |", "|---|---|---|---|---|"]
    for one in document.verdict.criteria:
        limits = ["", ""]
        show = "{:.4g}"
        if (threshold := one.threshold) is not None:
            sign = "at least" if threshold.more_is_better else "at most"
            show = "{:.2%}" if threshold.percent else show
            unit = "{:g} %" if threshold.percent else "{:g}"
            factor = 100 if threshold.percent else 1
            limits = [f"{sign} {unit.format(factor * limit)}" for limit in (threshold.recommended, threshold.care)]
        value = "missing" if one.value is None and one.threshold is not None else _plain(one.remark)
        if one.value is not None:
            value = show.format(one.value.value)
            if one.value.low != one.value.high:
                value += f" ({show.format(one.value.low)} to {show.format(one.value.high)})"
        rows.append(f"| {one.name} | {value} | {limits[0]} | {limits[1]} | {one.outcome} |")
    return "\n".join(rows)


def _use(document: Document) -> str:
    folder = shlex.quote(_name(document))
    loading = {one.engine for one in document.measured.engines if one.verdict == "loads"}
    lines = [
        command.format(folder) for engine, command in SERVE.items() if engine in loading and not document.report.gguf
    ]
    lines.append(f'python -c "import quantkit; model = quantkit.load({_name(document)!r})"')
    return "\n".join(["```bash", *lines, "```"])


def _recipe(document: Document) -> str:
    return "\n".join(
        [
            "`quantkit-report.json` holds the recipe and every figure of the run; this makes the folder again:",
            "",
            "```bash",
            "quantkit quantize --recipe quantkit-report.json --output again",
            "```",
        ]
    )


def _plain(words: str) -> str:
    """Text that Markdown takes for text, in one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(words.split()))
