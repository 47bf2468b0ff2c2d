"""The parts of the report's page, second half: what the run did to which linear, and how to repeat it."""

import io
from collections import Counter, defaultdict
from typing import Any

from ruamel.yaml import YAML

from quantkit.report import figures
from quantkit.report.block_records import FoldRecord, LinearRecord
from quantkit.report.console import duration_text, family, size_text
from quantkit.report.document import Document
from quantkit.report.figures import kind_of
from quantkit.report.markup import Markup, code, details, element, figure, join, missing, pairs, table
from quantkit.report.markup import figures as side_by_side
from quantkit.report.sections import measure_command, number, percent

MOST_ROWS = 1000  # of a table: a mixture of experts has tens of thousands of linears
ROUNDED = "no calibration token reached"


def errors(document: Document) -> Markup:
    """Output error by layer and by kind, before and after; a table of every linear."""
    blocks = document.report.blocks
    parts: list[Markup | None] = [
        element(
            "p",
            "Squared error of a linear's output over the output's energy, on calibration inputs where there were any.",
        )
    ]
    hollow = "Hollow: rounded to nearest. " if any(one.gptq for one in document.report.linears) else ""
    caption = "Lines are means over the layer's linears, bands reach from the least to the largest."
    drawn = side_by_side(
        figure(figures.errors_by_layer(blocks), caption),
        figure(figures.errors_by_kind(blocks), f"{hollow}Filled: as quantized. Medians over the layers."),
    )
    if drawn is None:
        return missing("The run quantized no linear of a decoder block.")
    parts.append(drawn)
    linears = document.report.linears
    if not any(one.gptq for one in linears):
        searched = any(fold.loss_unscaled is not None for fold in document.report.folds)
        more = " What folding gained is under “folds and fallbacks”." if searched else ""
        what = "The error before is recorded only where GPTQ, which computes it, was the algorithm."
        parts.append(missing(what + more))
    elif not all(one.gptq for one in linears):
        count = sum(one.gptq is None for one in linears)
        parts.append(missing(f"Of {count} of {len(linears)} linears, which were rounded, there is no error before."))
    worse = [one for one in linears if one.gptq is not None and one.error > one.gptq.rounding]
    if worse:
        words = f"{len(worse)} of {len(linears)} linears have a larger error than rounding to nearest would have: "
        parts.append(element("p", words + ", ".join(one.name for one in worse[:5]) + (" …" if len(worse) > 5 else "")))
    shown = sorted(linears, key=lambda one: -one.error)[:MOST_ROWS]
    rows = [_linear_row(one) for one in shown]
    columns = (
        "linear",
        "scheme",
        "rows x columns",
        "algorithm",
        "rounded",
        "as quantized",
        "weight peak",
        "input peak",
    )
    which = (
        f"All {len(linears)} linears"
        if len(shown) == len(linears)
        else f"The {len(shown)} worst of {len(linears)} linears"
    )
    parts.append(details(f"{which}, largest error first", table(columns, rows, numeric=range(4, 8))))
    return join(parts)


def _linear_row(one: LinearRecord) -> tuple[object, ...]:
    peaks = (None, None) if one.outliers is None else (one.outliers.weight, one.outliers.input)
    return (
        one.name,
        one.scheme,
        f"{one.shape[0]} x {one.shape[1]}",
        one.algorithm,
        "missing" if one.gptq is None else percent(one.gptq.rounding),
        percent(one.error),
        *("missing" if peak is None else f"{peak:.1f}" for peak in peaks),
    )


def outliers(document: Document) -> Markup:
    """Peaks of weights and inputs by layer; which linears stand out most."""
    blocks, original = document.report.blocks, document.measured.original_outliers
    caption = "Means over the layer's linears, bands from least to largest."
    weights, inputs = figures.weight_outliers(blocks, original), figures.input_outliers(blocks, original)
    words = (
        "One large weight stretches the scale of its whole group, and one large input channel that of a whole token: "
        "folds and rotations can make both smaller before anything is rounded."
    )
    parts: list[Markup | None] = [element("p", words), side_by_side(figure(weights, caption), figure(inputs, caption))]
    for name, drawn in (("weight", weights), ("input", inputs)):
        if drawn is None:
            parts.append(missing(f"{name.capitalize()} outliers are not known.", measure_command(document)))
    seen = [one for one in document.report.linears if one.outliers is not None and one.outliers.input is not None]
    if not original:
        parts.append(
            missing(
                "The original's own outliers, before folds and rotations, were not measured.", measure_command(document)
            )
        )
    worst = sorted(seen, key=lambda one: -(one.outliers.input or 0) if one.outliers else 0)[:5]
    if worst:
        rows = [(one.name, f"{one.outliers.input:.1f}", f"{one.outliers.weight:.1f}") for one in worst if one.outliers]
        parts.append(element("h3", "Largest input channels"))
        parts.append(table(("linear", "input peak", "weight peak"), rows, numeric=(1, 2)))
    return join(parts)


def folds(document: Document) -> Markup:
    """Transforms, what could not be folded, what was rounded in place of its algorithm, what stays dense, warnings."""
    report = document.report
    parts: list[Markup | None] = [element("h3", "Folds")]
    parts.append(_fold_table(report.folds) if report.folds else element("p", "No scales were folded."))
    if report.rotation is not None:
        facts = ((name, value) for name, value in report.rotation.items() if not isinstance(value, dict | list))
        parts += [element("h3", "Rotation"), pairs((name.replace("_", " "), str(value)) for name, value in facts)]
    if report.folds_rejected:
        counts = Counter((family(one.pair), one.reason) for one in report.folds_rejected)
        rows = [(pair, reason, str(count)) for (pair, reason), count in counts.most_common(MOST_ROWS)]
        parts.append(
            details(
                f"{len(report.folds_rejected)} pairs that cannot be folded",
                table(("pair", "reason", "count"), rows, numeric=(2,)),
            )
        )
    parts.append(element("h3", "Fallbacks"))
    fallen = fallbacks(report.recipe, report.linears)
    if fallen:
        rows = [(one.name, one.algorithm, why) for one, why in fallen[:MOST_ROWS]]
        parts.append(table(("linear", "done by", "why"), rows))
    else:
        parts.append(element("p", "None: every linear was quantized by the algorithm that the recipe names."))
    reasons = Counter((family(one.name), one.reason) for one in report.skipped)
    if reasons:
        rows = [(name, reason, str(count)) for (name, reason), count in reasons.most_common(MOST_ROWS)]
        parts += [element("h3", "Not quantized"), table(("linear", "reason", "count"), rows, numeric=(2,))]
    notes = (*report.warnings, *document.measured.notes)
    if notes:
        shown = [element("li", note) for note in notes[:50]]
        more = element("li", f"and {len(notes) - 50} more in quantkit-report.json") if len(notes) > 50 else None
        parts += [element("h3", "Warnings and remarks"), element("ul", *shown, more)]
    return join(parts)


def fallbacks(recipe: dict[str, Any], linears: tuple[LinearRecord, ...]) -> list[tuple[LinearRecord, str]]:
    """Linears that were not quantized as the recipe says, or only with more damping, and why."""
    weights = recipe.get("weights") or {}
    asked = {name for part in (weights, *((o.get("weights") or {}) for o in recipe.get("overrides") or []))
             for name in (part.get("algorithm") or {})}  # fmt: skip
    found = []
    for one in linears:
        if one.note is not None:
            found.append((one, one.note))
        elif asked and one.algorithm not in asked:
            found.append((one, f"the recipe names {', '.join(sorted(asked))}"))
    return found


def _fold_table(found: tuple[FoldRecord, ...]) -> Markup:
    """Folds of one kind in a row: how many, and the mean loss without and with the scale."""
    kinds: dict[tuple[str, str], list[FoldRecord]] = defaultdict(list)
    for fold in found:
        kinds[kind_of(fold.producer), ", ".join(map(kind_of, fold.consumers[:4]))].append(fold)

    def mean(values: list[float | None]) -> str:
        known = [value for value in values if value is not None]
        return number(sum(known) / len(known)) if known else "missing"

    rows = [
        (
            producer,
            readers,
            str(len(members)),
            mean([one.loss_unscaled for one in members]),
            mean([one.loss for one in members]),
            mean([one.exponents[0] if one.alpha is None and one.exponents else one.alpha for one in members]),
        )
        for (producer, readers), members in kinds.items()
    ]
    columns = ("producer", "readers", "layers", "loss unscaled", "loss scaled", "exponent")
    return table(columns, rows[:MOST_ROWS], numeric=(2, 3, 4, 5))


def recipe(document: Document) -> Markup:
    """The recipe as YAML, and what calibrated."""
    out = io.StringIO()
    writer = YAML()
    writer.default_flow_style = False
    writer.width = 100
    writer.dump(document.report.recipe, out)
    report, calibration = document.report, document.report.calibration
    rows: list[tuple[object, object]] = [("model", report.model or "a module in memory")]
    if calibration is None:
        rows.append(("calibration", "none"))
    else:
        sources = ", ".join(source.name for source in calibration.sources) or "given tokens"
        rows.append(("calibration", f"{calibration.samples} x {calibration.seq_len} tokens of {sources}"))
    rows += [
        ("time", f"{duration_text(report.seconds_total)} on {report.device}"),
        ("peak memory", size_text(report.peak_memory_bytes)),
    ]
    return join([pairs(rows), code(out.getvalue())])


def versions(document: Document) -> Markup:
    """Of the packages that made the files, and of those that measured them."""
    report, measured = document.report, document.measured
    parts: list[Markup | None] = [element("h3", "The run"), pairs(list(report.versions.items()))]
    if measured.versions:
        parts += [element("h3", "The measurements"), pairs(list(measured.versions.items()))]
    else:
        parts.append(missing("Nothing was measured after the run."))
    if measured.engines:
        rows = [(one.engine, one.verdict, one.reason) for one in measured.engines]
        parts += [element("h3", "Engines that load it, by quantkit verify"), table(("engine", "verdict", "why"), rows)]
    return join(parts)


def hashes(document: Document) -> Markup:
    """sha256 of what went in and of what came out."""
    report = document.report
    rows: list[tuple[object, object]] = [
        ("original", element("code", report.model_fingerprint) if report.model_fingerprint else "missing"),
        ("its revision on the Hub", report.model_revision),
    ]
    if report.calibration is not None:
        rows.append(("calibration tokens", element("code", report.calibration.sha256)))
        rows += [
            (source.name, element("code", source.sha256)) for source in report.calibration.sources if source.sha256
        ]
    rows += [(f"text {one.name}", element("code", one.sha256)) for one in document.measured.texts]
    files = [(name, element("code", value)) for name, value in sorted(report.files.items())]
    files_part = pairs(files[:MOST_ROWS]) if files else missing("The run left no hashes of its files.")
    return join([element("h3", "What went in"), pairs(rows), element("h3", "Files that came out"), files_part])


def command(document: Document) -> Markup:
    """What makes the same bytes again."""
    if document.command is None:
        return missing("The model was a module in memory, so no command makes the files again.")
    words = "The same recipe, model, text and versions on the same kind of device make the same bytes."
    return join([element("p", words), code(document.command)])
