"""The report's page in a real browser: on a phone and a desktop, light and dark, and on paper."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from quantkit.report.measurements import Continuation, Measurements, Sample
from quantkit.report.page import page
from tests.chromium import CHROMIUM, Browser, browser
from tests.synthetic_reports import document, measurements, run

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]
SCRIPT = "<script>document.title = 'taken'</script>"
WORD = "x" * 400  # nothing to break it at
SIZES = """[...document.querySelectorAll('figure')].map(figure => {
    const box = figure.querySelector('svg').getBoundingClientRect(); return [box.width, box.height]; })"""
UNREADABLE = """(() => {
    const light = colour => { const [r, g, b] = colour.match(/[\\d.]+/g).map(Number); return (2 * r + 5 * g + b) / 8; };
    const page = light(getComputedStyle(document.body).backgroundColor);
    return [...document.querySelectorAll('svg text, h1, h2, p, td, th, figcaption, summary, code')]
        .filter(e => e.getClientRects().length && !e.closest('mark'))
        .map(e => [e.textContent.slice(0, 40),
                   light(getComputedStyle(e)[e.closest('svg') ? 'fill' : 'color'])])
        .filter(([_, shade]) => Math.abs(shade - page) < 70); })()"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page with everything, one with texts that try to be HTML or wider than the page, and one with nothing."""
    report = run(4)
    sample = Sample(SCRIPT, 9, 2, Continuation(SCRIPT, WORD, "</p><img src=x>"), Continuation("", SCRIPT, WORD))
    measured = measurements(report, samples=(sample,), notes=(SCRIPT, WORD))
    odd = replace(report, model=SCRIPT + WORD, warnings=(WORD,), recipe=report.recipe | {"note": SCRIPT + WORD})
    folder = tmp_path_factory.mktemp("pages")
    made = {
        "everything": document(report),
        "odd": replace(document(odd, measured), folder=f"out/{WORD[:200]}"),
        "nothing": document(replace(report, held_out=None, blocks=(), files={}), Measurements()),
    }
    for name, one in made.items():
        (folder / f"{name}.html").write_text(page(one), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in made}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["everything", "odd", "nothing"])
def test_it_is_drawn(chromium: Browser, pages: dict[str, Path], name: str, width: int, dark: bool) -> None:
    chromium.open(pages[name], width=width, dark=dark)
    assert chromium.problems == []
    assert chromium.ask("document.documentElement.scrollWidth") <= width
    assert chromium.ask("document.title").endswith("quantization report")
    assert chromium.ask("document.scripts.length") == 0
    sizes = chromium.ask(SIZES)
    assert len(sizes) >= (1 if name == "nothing" else 10)
    assert all(height > 60 and 200 < wide <= width for wide, height in sizes), sizes
    background = chromium.ask("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") != dark
    assert chromium.ask(UNREADABLE) == []


def test_a_script_is_shown_as_text(chromium: Browser, pages: dict[str, Path]) -> None:
    chromium.open(pages["odd"], width=1280)
    shown = chromium.ask("document.querySelector('.sample').innerText")
    assert shown.count(SCRIPT) == 3
    assert "</p><img src=x>" in shown


def test_the_first_token_that_differs_is_marked(chromium: Browser, pages: dict[str, Path]) -> None:
    chromium.open(pages["everything"], width=390)
    assert chromium.ask("[...document.querySelectorAll('mark')].map(mark => mark.textContent)") == [" **", " *"]


def test_paper_is_white_and_as_wide_as_it_is(chromium: Browser, pages: dict[str, Path]) -> None:
    chromium.open(pages["everything"], width=794, dark=True, media="print")
    assert chromium.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert chromium.ask("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert chromium.ask("document.documentElement.scrollWidth") <= 794
    assert chromium.problems == []
