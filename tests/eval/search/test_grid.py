"""Grids: how they are written, which combinations there are, and every refusal with its place."""

from pathlib import Path

import pytest
from quantkit_eval.search.grid import Checked, check_grid, parse_grid, split_values
from quantkit_eval.search.search_space import DEFAULT, check_space, range_of

from quantkit.errors import UserError

BASE = "# a base\nweights:\n  bits: 4\n  group_size: 128\n  algorithm: rtn\n"


@pytest.fixture
def base(tmp_path: Path) -> str:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return str(path)


def check(base: str, *given: str) -> Checked:
    return check_grid(base, "org/model", parse_grid(given))


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("3,4", ["3", "4"]),
        (" 3 , channel ", ["3", "channel"]),
        ("rtn,{gptq: {sweeps: 2, refit: false}}", ["rtn", "{gptq: {sweeps: 2, refit: false}}"]),
        ("[],[awq, smoothquant]", ["[]", "[awq, smoothquant]"]),
        ('"a,b.txt",c.txt', ['"a,b.txt"', "c.txt"]),
        ("{data: 'a,b'},it's", ["{data: 'a,b'}", "it's"]),
        ("[re:.*{2,3}],x", ["[re:.*{2,3}]", "x"]),
    ],
)
def test_values_are_cut_at_commas_outside_of_brackets_and_quotes(text: str, values: list[str]) -> None:
    assert split_values(text) == values


def test_all_combinations_in_order(base: str) -> None:
    found = check(base, "weights.bits=3,8", "weights.group_size=32,channel", "weights.algorithm=rtn,gptq")
    assert len(found.combinations) == 8
    assert not found.impossible
    assert found.combinations[1].label == "weights.bits=3 weights.group_size=32 weights.algorithm=gptq"
    assert found.combinations[-1].recipe.weights.group_size == "channel"
    assert found.combinations[-1].recipe.weights.algorithm == "gptq"
    assert found.combinations[-1].recipe.model == "org/model"


def test_equal_recipes_are_folded(base: str) -> None:
    found = check(base, "weights.group_size=channel,-1,64,64", "weights.bits=4, 4,8")
    assert [one.label for one in found.combinations] == [
        f"weights.group_size={size} weights.bits={bits}" for size in ("channel", "64") for bits in ("4", "8")
    ]
    assert found.folded == 2


def test_impossible_combinations_have_their_reason(base: str) -> None:
    found = check(
        base, "weights.bits=4,8", "weights.group_size=128,tensor", "calibration=null,{}", "weights.algorithm=gptq"
    )
    assert len(found.combinations) == 3
    reasons = {one.label: one.reason for one in found.impossible}
    assert len(reasons) == 5
    tensor = reasons["weights.bits=4 weights.group_size=tensor calibration={} weights.algorithm=gptq"]
    assert "symmetric integers of 8 bits" in tensor
    needs = reasons["weights.bits=4 weights.group_size=128 calibration=null weights.algorithm=gptq"]
    assert "gptq needs calibration text" in needs


def test_schemes_can_be_swept_over_a_base_with_weights(base: str) -> None:
    found = check(base, "scheme=W4A16,W8A16,FP8_DYNAMIC")
    assert [one.recipe.weights.bits for one in found.combinations] == [4, 8, 8]


@pytest.mark.parametrize(
    ("given", "line", "meant"),
    [
        ("weights.bit=3", 3, "weights.bits"),
        ("wieghts.bits=3", 3, "weights.bits"),
        ("bits=3", 3, "weights.bits"),
        ("weights.groupsize=32", 4, "weights.group_size"),
        ("weights.algorithm.gptq.damp=0.1", 5, "weights.algorithm.gptq.damping"),
        ("calibration.sample=8", 1, "calibration.samples"),
    ],
)
def test_a_key_that_no_recipe_has(base: str, given: str, line: int, meant: str) -> None:
    with pytest.raises(UserError) as refusal:
        check(base, given)
    assert str(refusal.value).startswith(f"{base}:{line}: ")
    assert f"did you mean `{meant}`?" in str(refusal.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["weights.bits="], "no values"),
        (["weights.bits=3,,4"], "an empty value"),
        (["weights.bits"], "KEY=VALUES"),
        (["=3"], "KEY=VALUES"),
        (["weights.bits=3", "weights.bits=4"], "is given twice"),
        (["weights={bits: 3}", "weights.bits=4"], "set the same keys"),
        (["model=a,b"], "of one model"),
        (["weights.bits=3,four"], "--grid weights.bits=four: weights.bits: must be a whole number"),
        (["weights.bits=[3,4]"], "must be a whole number, got a list"),
        (["weights.bits=9"], "must be at most 8"),
        (["weights.symmetric=maybe"], "must be true or false"),
        (["weights.algorithm=gtpq"], "did you mean 'gptq'"),
        (["weights.group_size=0"], "positive whole number"),
        (["weights.bits={3"], "not a YAML value"),
    ],
)
def test_what_is_wrong_by_itself_is_refused(base: str, given: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("[", r"\[").replace("?", r"\?")):
        check(base, *given)


def test_all_wrong_values_at_once(base: str) -> None:
    with pytest.raises(UserError) as refusal:
        check(base, "weights.bits=3,x,99", "weights.symmetric=1")
    assert all(f"--grid weights.{one}: " in str(refusal.value) for one in ("bits=x", "bits=99", "symmetric=1"))


def test_a_mistake_of_the_base_is_no_impossible_combination(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("weights:\n  bitz: 4\n")
    with pytest.raises(UserError, match=r"broken.yaml:2: weights.bitz: unknown key"):
        check(str(path), "weights.bits=3,4")


def test_a_search_takes_ranges(base: str) -> None:
    found = range_of("weights.algorithm.gptq.damping", ("0.001..0.1",))
    assert found is not None
    assert (found.least, found.most, found.whole, found.logarithmic) == (0.001, 0.1, False, True)
    assert range_of("weights.group_size", ("32", "64")) is None
    assert check_space(base, None, {}) == DEFAULT
    space = {"weights.bits": ("2..8",), "weights.symmetric": ("true", "false")}
    assert check_space(base, None, space) == space


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("weights.bits", ("2..9",), "at most 8"),
        ("weights.bits", ("4..3",), "LEAST..MOST"),
        ("weights.bits", ("2.5..4",), "whole numbers"),
        ("weights.bits", ("3..4", "8"), "stands alone"),
        ("weights.type", ("1..2",), "takes no numbers"),
        ("weights.bitz", ("1..2",), "did you mean"),
    ],
)
def test_a_range_that_is_none(base: str, key: str, values: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_space(base, None, {key: values})


def test_no_default_space_for_floats(tmp_path: Path) -> None:
    path = tmp_path / "base.yaml"
    path.write_text("scheme: FP8_DYNAMIC\n")
    with pytest.raises(UserError, match="no default space for fp8"):
        check_space(str(path), None, {})
