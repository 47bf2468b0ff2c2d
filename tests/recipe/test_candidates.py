"""Names of candidates: group sizes that are all meant, those that are given, and the recipe keys that come of them."""

import pytest

from quantkit.errors import UserError
from quantkit.recipe.candidates import DEFAULT, GROUPS, candidates
from quantkit.recipe.load import from_data
from quantkit.recipe.number_formats import Weights
from quantkit.sizes import limit_of


def weights(name: str) -> Weights:
    (found,) = candidates([name])
    return from_data({"calibration": {}, **found.keys}).weights


def test_a_format_without_its_group_size_stands_for_all_of_them() -> None:
    names = [one.name for one in candidates(["W3A16", " w3a16:64 ", "FP8_DYNAMIC"])]
    assert names == ["W3A16:g32", "W3A16:g64", "W3A16:g128", "W3A16:channel", "FP8_DYNAMIC"]
    assert len(candidates()) == len(DEFAULT) * len(GROUPS)


@pytest.mark.parametrize(("name", "bits", "size", "symmetric"), [
    ("W5A16:g64", 5, 64, True),
    ("W4A16_ASYM:channel", 4, "channel", False),
    ("W4A8:g32", 4, 32, True),
    ("W8A8", 8, "channel", True),
])  # fmt: skip
def test_what_a_name_stands_for(name: str, bits: int, size: int | str, symmetric: bool) -> None:
    found = weights(name)
    assert (found.bits, found.group_size, found.symmetric, found.algorithm) == (bits, size, symmetric, "gptq")


def test_floats_are_rounded() -> None:
    assert weights("fp8_dynamic").algorithm == "rtn"
    assert weights("MXFP4").type == "mxfp4"


@pytest.mark.parametrize("name", ["W4A61", "W9A16", "", "W4A16:", "W4A16:x", "W4A16:g-3", "NVFP4:g16"])
def test_names_that_are_none(name: str) -> None:
    if name == "W4A16:":
        assert len(candidates([name])) == len(GROUPS)  # nothing after the colon: no group size
        return
    with pytest.raises(UserError, match="--candidates"):
        candidates([name])


@pytest.mark.parametrize(("text", "bits", "nbytes"), [
    ("4.5bpw", 4.5, None), (" 4 BPW ", 4.0, None), ("3.6MB", None, 3_600_000), ("5GB", None, 5 * 10**9),
    ("1GiB", None, 2**30), ("1000", None, 1000),
])  # fmt: skip
def test_limits(text: str, bits: float | None, nbytes: int | None) -> None:
    found = limit_of(text)
    assert (found.bits_per_weight, found.nbytes) == (bits, nbytes)


@pytest.mark.parametrize("text", ["", "bpw", "0bpw", "4,5bpw", "-1MB", "4 bits", "5 gigabytes", "nanbpw"])
def test_what_is_no_limit(text: str) -> None:
    with pytest.raises(UserError, match="is no size"):
        limit_of(text)
