"""Caches as a recipe writes them: one format, or keys and values each their own; what is wrong with them."""

from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import UserError
from quantkit.recipe.load import RecipeError, from_data, load
from quantkit.recipe.recipe import Recipe

SIDE = {"type": "int8", "per": None, "symmetric": True, "group_size": None, "observer": "minmax"}
LATER = {"packed": False, "channels": False}


def cached(text: str) -> Recipe:
    return load("rtn-w4a16", [f"kv_cache={text}", "output.engine=null"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int8", SIDE),
        ("int5", SIDE | {"type": "int5"}),
        ("{type: int4, group_size: 32}", SIDE | {"type": "int4", "group_size": 32}),
        ("{type: int4, channels: true}", SIDE | {"type": "int4", "channels": True}),
        ("{keys: int8, values: int4}", {"keys": SIDE | LATER, "values": SIDE | LATER | {"type": "int4"}}),
        ("{keys: int8, values: null}", {"keys": SIDE | LATER, "values": None}),
    ],
)
def test_caches(text: str, expected: dict[str, Any]) -> None:
    """What has no keys and values of its own is reported as it always was, and what is reported is a recipe."""
    recipe = cached(text)
    assert recipe.resolved()["kv_cache"] == expected
    assert from_data(recipe.resolved()).resolved()["kv_cache"] == expected


def test_sides_of_a_cache() -> None:
    def scopes(text: str) -> list[tuple[str, str] | None]:
        cache = cached(text).kv_cache
        assert cache is not None
        return [None if side is None else (side.type, side.scope) for side in cache.sides]

    assert scopes("fp8") == scopes("{keys: fp8, values: fp8}") == [("fp8", "tensor")] * 2
    assert scopes("{keys: fp8, values: int4}") == [("fp8", "token"), ("int4", "token")]
    assert scopes("{keys: null, values: fp8}") == [None, ("fp8", "token")]
    assert scopes("{keys: {type: fp8, per: head}, values: {type: fp8, per: head}}") == [("fp8", "head")] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int9", "kv_cache.type: unknown value 'int9'; did you mean 'int8'?"),
        ("{keys: int8, valeus: int4}", "kv_cache.valeus: unknown key; did you mean 'values'?"),
        ("{keys: itn8, values: int4}", "kv_cache.keys.type: unknown value 'itn8'; did you mean 'int8'?"),
        ("{keys: {symetric: false}, values: int4}", "kv_cache.keys.symetric: unknown key; did you mean 'symmetric'?"),
        ("{keys: {keys: int8}, values: int4}", "kv_cache.keys.keys: unknown key"),
        ("{keys: int8}", "kv_cache: keys and values are given together; values is missing"),
        ("{keys: int8, values: int4, type: int4}", "kv_cache: type is for keys and values alike"),
        ("{keys: null, values: null}", "kv_cache: neither keys nor values are quantized"),
        ("{keys: {type: fp8, per: head}, values: int4}", "kv_cache: fp8 with calibrated scales per tensor or head is"),
        ("{keys: {type: fp8, per: head}, values: fp8}", "kv_cache: fp8 with calibrated scales per tensor or head is"),
        ("{type: int8, per: head}", "kv_cache: only fp8 caches have static scales per tensor or head"),
        ("{type: int5, symmetric: false, packed: true}", "kv_cache: packed scales have room for a zero point of 4"),
        ("{type: fp8, channels: true}", "kv_cache: fp8 caches have no groups, no zero points, no packed scales and no"),
        ("{keys: {type: int4, group_size: 4}, values: int4}", "kv_cache.keys.group_size: must be at least 8, got 4"),
        ("{keys: 8, values: int4}", "kv_cache.keys: must be a mapping of keys, got 8"),
    ],
)
def test_impossible_caches(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as failure:
        cached(text)
    assert f": {message}" in str(failure.value)
    assert len(failure.value.problems) == 1


def test_a_mistake_in_a_cache_is_shown_at_its_line(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("scheme: W4A16\nkv_cache:\n  keys: int8\n  values:\n    type: int4\n    goup_size: 32\n")
    with pytest.raises(
        RecipeError, match=r"r\.yaml:6: kv_cache\.values\.goup_size: unknown key; did you mean 'group_size'"
    ):
        load(file)


@pytest.mark.parametrize(
    ("cache", "what"),
    [
        ("fp8", "static scales"),
        ({"keys": "fp8", "values": "fp8"}, "static scales"),
        ({"type": "int4", "channels": True}, "channel constants"),
        ({"keys": {"type": "int4", "channels": True}, "values": "int8"}, "channel constants"),
        ({"keys": "fp8", "values": "int4"}, None),
        ({"type": "fp8", "per": "token"}, None),
        ({"keys": "int8", "values": None}, None),
    ],
    ids=str,
)
def test_which_caches_need_calibration(cache: Any, what: str | None) -> None:
    found = from_data({"kv_cache": cache}).calibration
    assert (found is not None) == (what is not None)
    if what is not None:
        with pytest.raises(UserError, match=f"kv_cache: .*{what}.* calibration text"):
            from_data({"kv_cache": cache, "calibration": None})
