"""The calibration section: defaults, auto, sources, and what is wrong with them."""

from typing import Any

import pytest

from quantkit.errors import UserError
from quantkit.recipe.data_sets import DATA_SETS, data_set
from quantkit.recipe.load import from_data, load, schema
from quantkit.recipe.recipe import Recipe
from quantkit.recipe.sections import Calibration, Source


def read(calibration: Any) -> Calibration:
    recipe = from_data({"calibration": calibration, "weights": {"algorithm": "gptq"}})
    assert Recipe(**recipe.resolved()) == recipe
    assert recipe.calibration is not None
    return recipe.calibration


def test_defaults() -> None:
    expected = Calibration(data="general", samples="auto", seq_len="auto", seed=0, bos="auto", column=None)
    assert read({}) == expected


@pytest.mark.parametrize(
    "data",
    [
        {"weights": {"algorithm": "gptq"}},
        {"transforms": ["awq"]},
        {"kv_cache": "fp8"},
        {"scheme": "NVFP4"},
        {"overrides": [{"match": "a", "weights": {"algorithm": "gptq"}}]},
    ],
    ids=str,
)
def test_an_absent_section_is_the_default_where_something_needs_it(data: dict[str, Any]) -> None:
    assert from_data(data).calibration == Calibration()
    with pytest.raises(UserError, match=r"calibration text: add a section like calibration: \{\}"):
        from_data(data | {"calibration": None})


def test_nothing_is_read_where_nothing_needs_it() -> None:
    assert from_data({}).calibration is None
    assert from_data({"calibration": None}).calibration is None


def test_sources_with_weights() -> None:
    several = read({"data": ["general", {"data": "a.jsonl", "weight": 3, "column": "body"}], "column": "text"})
    assert several.sources() == [
        Source(data="general", weight=1.0, column="text"),
        Source(data="a.jsonl", weight=3.0, column="body"),
    ]
    assert read({"data": "c4", "column": "x"}).sources() == [Source(data="c4", column="x")]


def test_settings() -> None:
    recipe = load("gptq-w4a16", ["calibration.data=d.txt", "calibration.samples=auto", "calibration.bos=false"])
    assert recipe.calibration == Calibration(data="d.txt", bos=False)
    recipe = load("gptq-w4a16", ["calibration.data=[{data: a.txt, weight: 2}, c4]", "calibration.data.0.weight=3"])
    assert recipe.calibration is not None
    assert recipe.calibration.sources() == [Source(data="a.txt", weight=3.0), Source(data="c4")]


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ({"samples": "atuo"}, "samples: must be a whole number or auto, got the text 'atuo'; did you mean 'auto'"),
        ({"samples": 0}, "samples: must be at least 1, got 0"),
        ({"samples": True}, "samples: must be a whole number or auto, got true"),
        ({"samples": None}, "samples: must be a whole number or auto, got nothing"),
        ({"seq_len": 7}, "seq_len: must be at least 8, got 7"),
        ({"seq_len": 1 << 21}, "seq_len: must be at most 1048576"),
        ({"bos": "yes"}, "bos: must be auto, true or false, got the text 'yes'"),
        ({"data": 3}, "data: must be text or a list of sources, got 3"),
        ({"data": ""}, "data: must be some text"),
        ({"data": []}, "data: must name at least one source"),
        ({"data": {"data": "x"}}, r"data: must be text or a list of sources like \[\{data: NAME, weight: 2\}\]"),
        ({"data": [{"data": "x", "wieght": 2}]}, r"data\.0\.wieght: unknown key; did you mean 'weight'"),
        ({"data": [{"data": "x", "weight": 0}]}, r"data\.0\.weight: must be more than 0"),
        ({"data": ["x", {"weight": 2}]}, r"data\.1\.data: this key is required"),
        ({"column": ""}, "column: must be some text"),
    ],
    ids=str,
)
def test_what_is_wrong(calibration: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(calibration)


def test_the_schema_knows_auto_and_sources() -> None:
    known = schema()["$defs"]["Calibration"]["properties"]
    assert {"const": "auto", "type": "string"} in known["samples"]["anyOf"]
    assert [kind.get("type") for kind in known["data"]["anyOf"]] == ["string", "array"]
    assert all(name in known["data"]["description"] for name in ("general", *DATA_SETS) if name != "wikitext2")


def test_names_of_data_sets() -> None:
    assert data_set("c4") == DATA_SETS["c4"]
    assert (data_set("c4:de").subset, data_set("c4:de").split) == ("de", "train")
    assert (data_set("wikitext::validation").subset, data_set("wikitext::validation").split) == (
        "wikitext-2-raw-v1",
        "validation",
    )
    found = data_set("me/mine:small:test")
    assert (found.hub_id, found.subset, found.split, found.column) == ("me/mine", "small", "test", None)
    assert data_set("wikitext2").split == "test"


@pytest.mark.parametrize(
    ("name", "near"),
    [("ultrachatt", "ultrachat"), ("wikitxt", "wikitext"), ("fineweb_edu", "fineweb-edu"), ("pile10k", "pile-10k"),
     ("genral", "general"), ("cnn-dailymail", "cnn_dailymail"), ("c44", "c4")],
)  # fmt: skip
def test_misspelt_names(name: str, near: str) -> None:
    with pytest.raises(UserError, match=f"no file and no data set '{name}'\nhint: did you mean '{near}'"):
        data_set(name)
    with pytest.raises(UserError, match="hint: write NAME, NAME:SUBSET"):
        data_set("a:b:c:d")
