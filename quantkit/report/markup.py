"""HTML in which every text is escaped unless it was made here: pieces of the report's page."""

from collections.abc import Iterable, Sequence
from html import escape


class Markup(str):
    """HTML that is safe as it is. Any other string is text, and is escaped where it meets one of these functions."""

    __slots__ = ()


def text(value: object) -> Markup:
    """The value as HTML: escaped, unless it is markup already. Characters that no page may hold become visible."""
    if isinstance(value, Markup):
        return value
    shown = "".join(
        c if c in "\n\t" or c.isprintable() or c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in str(value)
    )
    return Markup(escape(shown.encode("utf-8", "replace").decode("utf-8")))


def element(tag: str, *content: object, **attributes: str) -> Markup:
    """<tag attributes>content</tag>; `class_` stands for class."""
    given = "".join(f' {name.rstrip("_").replace("_", "-")}="{escape(value)}"' for name, value in attributes.items())
    return Markup(f"<{tag}{given}>{join(content)}</{tag}>")


def join(parts: Iterable[object], between: str = "") -> Markup:
    """The parts one behind the other; None is left out."""
    return Markup(between.join(text(part) for part in parts if part is not None))


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], numeric: Sequence[int] = (), *, stack: bool = False
) -> Markup:
    """A table that scrolls by itself where it is wider than the page.

    numeric: columns set flush right; stack: on a phone each row becomes a block, its cells below each other
    """

    def cell(content: object, at: int) -> Markup:
        named = {"data-label": columns[at]} if stack else {}
        return element("td", content, **({"class_": "n"} if at in numeric else {}), **named)

    head = element("tr", *(element("th", name, class_="n") if at in numeric else element("th", name)
                           for at, name in enumerate(columns)))  # fmt: skip
    body = element("tbody", *(element("tr", *(cell(content, at) for at, content in enumerate(row))) for row in rows))
    kind = {"class_": "stack"} if stack else {}
    return element("div", element("table", element("thead", head), body, **kind), class_="wide", tabindex="0")


def pairs(rows: Iterable[tuple[object, object]]) -> Markup:
    """Names and values, a row each; rows without a value are left out."""
    shown = (
        element("tr", element("th", name, scope="row"), element("td", value))
        for name, value in rows
        if value is not None
    )
    return element("div", element("table", element("tbody", *shown), class_="pairs"), class_="wide", tabindex="0")


def figure(svg: str | None, caption: object) -> Markup | None:
    """A drawing with its caption; None without a drawing."""
    return None if svg is None else element("figure", Markup(svg), element("figcaption", caption))


def figures(*shown: Markup | None) -> Markup | None:
    """Those that are there, side by side where the page is wide enough."""
    there = [one for one in shown if one is not None]
    return element("div", *there, class_="figures") if there else None


def missing(what: object, command: str | None = None) -> Markup:
    """A note that something is not known, and the command that would find it out."""
    how = None if command is None else element("code", command)
    return element("p", element("strong", "Missing. "), what, None if how is None else " ", how, class_="missing")


def details(summary: object, content: object) -> Markup:
    """Content that is shown when it is asked for: long tables, which paper does without."""
    return element("details", element("summary", summary), content)


def code(content: str) -> Markup:
    """Text as it is, in lines."""
    return element("pre", element("code", content), tabindex="0")
