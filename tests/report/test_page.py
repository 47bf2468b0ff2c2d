"""The report's page: all sections in order, small, alone, escaped, and honest about what is missing."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from quantkit.report.block_records import BlockRecord, LinearRecord
from quantkit.report.document import Document
from quantkit.report.measurements import Continuation, Measurements, Sample
from quantkit.report.page import page
from quantkit.report.records import CalibrationSource
from tests.synthetic_reports import document, measurements, run, text_result

ORDER = ["Verdict", "Size and speed", "KL and flips", "Perplexity by position", "Error by layer",
         "Weight and input outliers", "Folds and fallbacks", "Tasks", "Greedy samples", "Recipe", "Versions", "Hashes",
         "The command that makes it again"]  # fmt: skip
EVIL = "<script>alert('x')</script>&\"'"


class Reader(HTMLParser):
    """The tags of a page, its text, and whether every element is closed by its own tag."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.text = ""
        self.feed(content)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if "style" not in self.stack:
            self.text += data


def bare(made: Document | None = None) -> Document:
    """A report of rounding without calibration, of which nothing was measured."""
    report = run(2)
    blocks = tuple(
        BlockRecord(b.block, (), tuple(replace(one, gptq=None, algorithm="rtn", outliers=None) for one in b.linears))
        for b in report.blocks
    )
    return document(replace(report, blocks=blocks, held_out=None, calibration=None, files={}), Measurements())


@pytest.fixture(scope="module")
def full() -> str:
    return page(document())


def test_sections_are_in_order(full: str) -> None:
    assert re.findall(r"<h2>(.*?)</h2>", full) == ORDER
    assert Reader(full).stack == []


def test_it_is_alone(full: str) -> None:
    reader = Reader(full)
    assert not {"script", "link", "img", "iframe", "object", "base"} & {tag for tag, _ in reader.tags}
    assert sum(tag == "style" for tag, _ in reader.tags) == 1
    for tag, attributes in reader.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "src"], tag
        assert (attributes.get("href") or "#").startswith("#"), attributes
    assert "url(http" not in full
    assert "@import" not in full
    assert "prefers-color-scheme:dark" in full
    assert "@media print" in full


def test_eighty_layers_are_small() -> None:
    report = run(80)
    content = page(document(report, measurements(report)))
    assert len(content.encode()) < 500_000  # the limit is 1.5 MB
    assert content.count("<svg") >= 10


def test_experts_by_the_thousand_are_small() -> None:
    report = run(2)
    many = tuple(
        LinearRecord(f"model.layers.0.mlp.experts.{e}.up_proj", "int4", (64, 64), "rtn", 0.01, note="x" * 60)
        for e in range(20_000)
    )
    content = page(document(replace(report, blocks=(BlockRecord(0, (), many),)), Measurements()))
    assert len(content.encode()) < 1_000_000
    assert "The 1000 worst of 20000 linears" in content


def test_figures_have_ids_of_their_own(full: str) -> None:
    ids = re.findall(r' id="([^"]+)"', full)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', full)) <= set(ids)
    assert not re.findall(r"#01020\d", full), "a stand-in for a colour is left"


def test_all_text_is_escaped() -> None:
    report = run(1)
    linear = replace(report.linears[0], name=f"model.layers.0.{EVIL}", scheme=EVIL, note=EVIL)
    assert report.calibration is not None
    evil = replace(
        report,
        model=EVIL,
        model_revision=EVIL,
        recipe={"model": EVIL, EVIL: [EVIL], "weights": {"algorithm": {EVIL: {}}}},
        calibration=replace(report.calibration, sources=(CalibrationSource(EVIL, "f" * 64),)),
        versions={EVIL: EVIL},
        coverage=EVIL,
        kv_cache=EVIL,
        blocks=(BlockRecord(0, (replace(report.folds[0], producer=EVIL, consumers=(EVIL,)),), (linear,)),),
        skipped=(replace(report.skipped[0], name=EVIL, reason=EVIL),),
        folds_rejected=(replace(report.folds_rejected[0], pair=EVIL, reason=EVIL),),
        rotation={EVIL: EVIL},
        warnings=(EVIL,),
        files={EVIL: EVIL},
    )
    side = Continuation(EVIL, EVIL, EVIL)
    base = measurements(evil)
    measured = replace(
        base,
        device=EVIL,
        texts=tuple(replace(text, name=EVIL) for text in base.texts),
        samples=(Sample(EVIL, 9, 1, side, side),),
        tasks=tuple(replace(task, task=EVIL, metric=EVIL, verdict=EVIL) for task in base.tasks),
        engines=tuple(replace(engine, reason=EVIL) for engine in base.engines),
        notes=(EVIL,),
    )
    reader = Reader(page(replace(document(evil, measured), folder=f"out/{EVIL.replace('/', '')}")))
    assert "script" not in {tag for tag, _ in reader.tags}
    assert reader.stack == []
    assert reader.text.count("<script>alert('x')</script>") > 20


def test_odd_characters_are_no_harm() -> None:
    sample = Sample(
        "\x00\x1b[31m\ud800 \u202e", 4, 1, Continuation("\x07", "\ufffd", "$x^2$"), Continuation("", "", "")
    )
    report = run(1)
    content = page(document(report, measurements(report, samples=(sample,))))
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202e]", content)
    content.encode("utf-8")


def test_what_is_missing_is_said() -> None:
    content = page(bare())
    text = Reader(content).text
    for words in (
        "speed beside the original was not measured",
        "KL, flips and perplexity were not measured",
        "Perplexity by position was not measured",
        "The error before is recorded only where GPTQ",
        "Weight outliers are not known",
        "Input outliers are not known",
        "No results of tasks were given",
        "No text was generated beside the original",
        "no hashes of its files",
    ):
        assert words in text, words
    drawn = re.findall(r'aria-label="([^"]*)"', content)
    assert len([label for label in drawn if label != "Sections"]) == 3, drawn  # size, errors by layer, errors by kind
    assert "rounded to nearest</text>" not in content  # no series for what nobody computed
    held = page(document(measured=Measurements()))
    assert "without an interval" in held


def test_a_part_that_is_missing_is_not_drawn_as_zero() -> None:
    report = run(3)
    first, *rest = report.blocks
    partly = BlockRecord(0, (), tuple(replace(one, outliers=None) for one in first.linears))
    content = page(document(replace(report, blocks=(partly, *rest)), Measurements()))
    alt = next(label for label in re.findall(r'aria-label="([^"]*)"', content) if label.startswith("Weight outliers"))
    assert "largest in layer" in alt
    assert "original" not in alt
    assert "The original&#x27;s own outliers, before folds and rotations, were not measured." in content


def test_a_text_without_an_original() -> None:
    """Perplexity alone: no divergence, no line of an original, no ratio."""
    text = text_result()
    places = tuple(replace(one, reference=None, ratio=None) for one in text.positions)
    alone = replace(text, divergence=None, positions=places)
    content = page(document(run(1), Measurements(texts=(alone,), context=512)))
    labels = [label for label in re.findall(r'aria-label="([^"]*)"', content) if "erplexity" in label]
    assert len(labels) == 1, labels
    assert "KL, flips" not in Reader(content).text  # the run's own held-out figures are there
    assert "Intervals, flips and perplexity were not measured" in Reader(content).text
