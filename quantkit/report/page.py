"""A report as one HTML page: no script, no network, one stylesheet, figures as inline SVG."""

from collections.abc import Callable
from pathlib import Path

from quantkit.report import appendix, at_work, sections
from quantkit.report.document import SCHEMA, Document
from quantkit.report.markup import Markup, element, join, text

GENERATOR = "quantkit report"  # by this a page is known to be ours, to be made again

SECTIONS: dict[str, tuple[str, Callable[[Document], Markup]]] = {
    "verdict": ("Verdict", sections.verdict),
    "size": ("Size and speed", sections.size_and_speed),
    "divergence": ("KL and flips", sections.divergence),
    "positions": ("Perplexity by position", sections.positions),
    "errors": ("Error by layer", appendix.errors),
    "outliers": ("Weight and input outliers", appendix.outliers),
    "folds": ("Folds and fallbacks", appendix.folds),
    "tasks": ("Tasks", at_work.tasks),
    "samples": ("Greedy samples", at_work.samples),
    "recipe": ("Recipe", appendix.recipe),
    "versions": ("Versions", appendix.versions),
    "hashes": ("Hashes", appendix.hashes),
    "command": ("The command that makes it again", appendix.command),
}


def page(document: Document) -> str:
    """The whole page. UserError where matplotlib is not installed."""
    from quantkit.report.drawing import check_installed

    check_installed()
    name = Path(document.folder).resolve().name
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    links = element(
        "nav", *(element("a", title, href=f"#{key}") for key, (title, _) in SECTIONS.items()), aria_label="Sections"
    )
    made_of = document.report.model or "a module in memory"
    head = element("header", element("h1", name), element("p", f"quantized from {made_of}: {_scheme(document)}"), links)
    body = (element("section", element("h2", title), draw(document), id=key) for key, (title, draw) in SECTIONS.items())
    foot = element(
        "footer", f"quantkit {document.report.quantkit}, schema {SCHEMA}. The same figures: quantkit-evaluation.json."
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<meta name="generator" content="{GENERATOR}">\n'
        f"<title>{text(name)}: quantization report</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"{join([head, element('main', *body), foot], chr(10))}\n</body>\n</html>\n"
    )


def _scheme(document: Document) -> str:
    """Transforms, algorithm and the schemes of the linears."""
    recipe = document.report.recipe
    steps = [name for item in (*(recipe.get("transforms") or ()), (recipe.get("weights") or {}).get("algorithm") or {})
             for name in item]  # fmt: skip
    schemes = list(dict.fromkeys(one.scheme for one in document.report.linears))
    return f"{' + '.join(steps)}, {'; '.join(schemes[:4])}{' …' if len(schemes) > 4 else ''}"
