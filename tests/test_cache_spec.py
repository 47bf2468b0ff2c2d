"""Formats of cached keys and values: names of the command line, what config.json holds of them, bits of an entry."""

import pytest

from quantkit.cache_spec import CacheSpec, cache_named
from quantkit.errors import UserError
from quantkit.types import KVSpec

INT8, INT4, FP8 = KVSpec(8, "int", "token"), KVSpec(4, "int", "token"), KVSpec(8, "float", "token")
BEST = KVSpec(4, "int", "token", symmetric=False, group_size=32, packed=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int8", CacheSpec(INT8, INT8)),
        (" fp8 ", CacheSpec(FP8, FP8)),
        ("int3", CacheSpec(KVSpec(3, "int", "token"), KVSpec(3, "int", "token"))),
        ("keys=int8,values=int4", CacheSpec(INT8, INT4)),
        ("values=int4, keys=int8", CacheSpec(INT8, INT4)),
        ("keys=none,values=int4", CacheSpec(None, INT4)),
        ("int4-asym-g32-packed", CacheSpec(BEST, BEST)),
        ("keys=int4-g16,values=int5-asym", CacheSpec(KVSpec(4, "int", "token", group_size=16),
                                                       KVSpec(5, "int", "token", symmetric=False))),
        ("none", None),
        ("keys=none,values=none", None),
    ],
)  # fmt: skip
def test_names(text: str, expected: CacheSpec | None) -> None:
    assert cache_named(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int9", ("'int9'", "did you mean `int8`?")),
        ("it4", ("did you mean `int4`?",)),
        ("", ("unknown format ''", "fp8, int8")),
        ("keys=int8", ("says nothing of the values", "none")),
        ("keys=int8,vlaues=int4", ("'vlaues=int4'", "did you mean `values`?")),
        ("keys=int8,keys=int4", ("each once",)),
        ("keys=int8,values=", ("unknown format ''",)),
        ("keys=int8,values=q4_0", ("unknown format 'q4_0'",)),
        ("int8,int4", ("unknown format",)),
        ("int8-asym-packed", ("zero point of 4 bits, not of 8",)),
        ("fp8-g32", ("groups", "integers")),
    ],
)
def test_other_names(text: str, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as failure:
        cache_named(text)
    for word in words:
        assert word in str(failure.value)


@pytest.mark.parametrize(
    "spec",
    [CacheSpec(INT8, INT4), CacheSpec(BEST, BEST), CacheSpec(None, INT4), CacheSpec(FP8, FP8), CacheSpec(BEST, None)],
    ids=str,
)
def test_config_and_back(spec: CacheSpec) -> None:
    assert CacheSpec.from_json(spec.to_json()) == spec


def test_one_format_is_written_as_it_always_was() -> None:
    plain = {"bits": 8, "element": "int", "per": "token", "symmetric": True, "group_size": -1}
    assert CacheSpec(INT8, INT8).to_json() == plain
    assert CacheSpec(INT8, INT4).to_json() == {"keys": plain, "values": plain | {"bits": 4}}
    assert (str(CacheSpec(INT8, INT8)), str(CacheSpec(INT8, INT4))) == (
        "int8 token",
        "keys int8 token, values int4 token",
    )


@pytest.mark.parametrize(
    "data",
    [
        None, [], "int8", {}, {"bits": 8}, {"bits": 8, "element": "int", "new": 1}, {"bits": "8", "element": "int"},
        {"bits": True, "element": "int"}, {"bits": 9, "element": "int"},
        {"bits": 8, "element": "float", "symmetric": 1},
        {"bits": 4, "element": "float"}, {"bits": 8, "element": "int", "per": "row"}, {"keys": {"bits": 8}},
        {"keys": None, "values": 3}, {"bits": 8, "element": "int", "per": "token", "group_size": 0},
    ],
    ids=str,
)  # fmt: skip
def test_a_config_that_describes_none(data: object) -> None:
    with pytest.raises(ValueError, match=r"."):
        CacheSpec.from_json(data)


@pytest.mark.parametrize(
    ("name", "features", "bits"),
    [
        ("int8", 64, 8 + 16 / 64), ("int4", 128, 4 + 16 / 128), ("int4-asym", 64, 4 + 24 / 64),
        ("int4-asym-packed", 64, 4.25), ("int4-asym-g32-packed", 64, 4.5), ("int4-asym-g32-packed", 80, 4 + 48 / 80),
        ("fp8", 64, 8.25),
    ],
)  # fmt: skip
def test_bits_of_an_entry(name: str, features: int, bits: float) -> None:
    spec = cache_named(name)
    assert spec is not None
    assert spec.shared is not None
    assert spec.shared.bits_per_entry(features) == pytest.approx(bits)
    assert KVSpec(8, "float").bits_per_entry(features) == 8
