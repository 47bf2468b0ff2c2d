"""Which recipe a name means: any spelling, a scheme's name, a word of another tool; and what is said of the others."""

from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import UserError
from quantkit.recipe.load import Flag, load
from quantkit.recipe.names import BEST, ELSEWHERE, WORDS, find, scheme_named, shipped
from quantkit.recipe.number_formats import PRESETS
from quantkit.recipe.recipe import Recipe


def test_every_scheme_has_a_recipe_of_that_scheme() -> None:
    assert set(BEST) == set(PRESETS)
    for scheme, name in BEST.items():
        recipe = load(name)
        plain = Recipe.model_validate({"scheme": scheme, "calibration": {"data": "x"}})
        assert recipe.weights.type == plain.weights.type, scheme
        for key in ("bits", "group_size", "symmetric"):
            assert getattr(recipe.weights, key) == getattr(plain.weights, key), scheme
        assert (recipe.activations is None) == (plain.activations is None), scheme
        if recipe.activations and plain.activations:
            for key in ("type", "dynamic", "group_size"):
                assert getattr(recipe.activations, key) == getattr(plain.activations, key), scheme
        assert load(None, scheme=scheme).resolved() == recipe.resolved() | {"scheme": scheme}


def test_words_name_shipped_recipes() -> None:
    assert {*WORDS.values(), *ELSEWHERE.values()} <= set(shipped())
    assert not set(WORDS) & set(shipped())


FOUND = {
    "AWQ": "awq",
    "GPTQ_W4A16": "gptq-w4a16",
    "gptq": "gptq-w4a16",
    "W4A16": "gptq-w4a16",
    "w4a16": "gptq-w4a16",
    "W4A16_ASYM": "awq-gptq-w4a16",
    "int4": "gptq-w4a16",
    "4-bit": "gptq-w4a16",
    "int8": "w8a8",
    "SmoothQuant": "w8a8",
    "fp8_dynamic": "fp8-dynamic",
    "FP8-DYNAMIC": "fp8-dynamic",
    "NVFP4": "nvfp4",
    "nvfp4a16": "nvfp4a16",
    "W3A16": "gptq-w3a16",
    "rtn": "rtn-w4a16",
    "mxfp4": "mxfp4",
}


@pytest.mark.parametrize("given", FOUND)
def test_a_recipe_is_found_in_any_spelling(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find(given).stem == FOUND[given]
    if given not in shipped():
        (tmp_path / given).mkdir()  # a folder of that name is no recipe
        assert find(given).stem == FOUND[given]
        (tmp_path / given).rmdir()
        (tmp_path / given).write_text("weights: {bits: 4}")  # a file is
        assert find(given) == Path(given)


MIXES = ("q4_k_m", "q5_k_m", "q3_k_m", "q4_0", "q8_0", "iq4_xs", "4.5bpw")
SPELLINGS = {"q4_k_m": "q4_k_m", "Q4_K_M": "q4_k_m", "gguf:q4_k_m": "q4_k_m", "GGUF:Q4_K_M": "q4_k_m"}
SPELLINGS |= {"gguf-q4-k-m": "q4_k_m", "gguf_q5_k_m": "q5_k_m", "gguf-q5_k_m": "q5_k_m", "Q8_0": "q8_0"}
SPELLINGS |= {"Q4_K": "q4_k_m", "IQ4_XS": "iq4_xs", "4.5bpw": "4.5bpw", "gguf:Q3_K": "q3_k_m", "q4-0": "q4_0"}


@pytest.fixture
def with_gguf(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the recipes of GGUF were the only ones of that kind, whichever are shipped."""
    known = {name: path for name, path in shipped().items() if not name.startswith("gguf-")}
    known |= {f"gguf-{mix}": Path(f"/recipes/gguf-{mix}.yaml") for mix in MIXES}
    monkeypatch.setattr("quantkit.recipe.names.shipped", lambda: known)


@pytest.mark.usefixtures("with_gguf")
@pytest.mark.parametrize("given", SPELLINGS)
def test_mixes_of_gguf_are_recipes_in_any_spelling(given: str) -> None:
    assert find(given).stem == f"gguf-{SPELLINGS[given]}"
    with pytest.raises(UserError, match=f"no scheme named `{given}`\nhint: pass `--recipe gguf-{SPELLINGS[given]}`"):
        scheme_named(given)


SET = "`--recipe gguf-q4_k_m --set gguf.mix={}`"
WITHOUT_RECIPE = {
    "q6_k": ("no recipe is shipped for `q6_k`", SET.format("q6_k")),
    "Q4_K_S": ("no recipe is shipped for `Q4_K_S`", SET.format("q4_k_s")),
    "gguf-iq4_nl": ("no recipe is shipped", SET.format("iq4_nl")),
    "gguf:f16": ("is not a mix", "`--recipe gguf-q4_k_m`"),
    "3.5bpw": ("no recipe is shipped for 3.5 bits", "--set 'gguf.mix={bits_per_weight: 3.5}'`"),
    "gguf": ("is a file format", "`--recipe gguf-q4_k_m`"),
    "IQ3_XXS": ("`IQ3_XXS` is a lattice type", "`--recipe gguf-q3_k_m`"),
    "iq2_m": ("`iq2_m` is a lattice type", SET.format("q2_k")),
    "IQ1_S": ("`IQ1_S` is a lattice type", SET.format("q2_k")),
    "TQ1_0": ("`TQ1_0` is a ternary type", SET.format("q2_k")),
    "IQ4_K": ("`IQ4_K` is a type of ik_llama.cpp's", "`--recipe gguf-q4_k_m`"),
    "iq2_kt": ("`iq2_kt` is a type of ik_llama.cpp's", SET.format("q2_k")),
    "IQ5_KS_R4": ("is a type of ik_llama.cpp's", "`--recipe gguf-q5_k_m`"),
    "q4_k_r4": ("is a type of ik_llama.cpp's", "`--recipe gguf-q4_k_m`"),
    "UD-Q4_K_XL": ("is another maker's mix", "`--recipe gguf-q4_k_m`"),
    "gguf:mxfp4_moe": ("`quantkit convert DIR OUT.gguf` carries", "`--recipe gguf-q4_k_m`"),
    "gguf-q4_k_n": ("is not a mix", "`--recipe gguf-q4_k_m`"),
}


@pytest.mark.usefixtures("with_gguf")
@pytest.mark.parametrize("given", WITHOUT_RECIPE)
def test_other_types_of_gguf_are_told_apart(given: str) -> None:
    what, hint = WITHOUT_RECIPE[given]
    for call in (find, scheme_named):
        with pytest.raises(UserError) as caught:
            call(given)
        message, found = str(caught.value).split("\nhint: ")
        assert what in message
        assert hint in found


@pytest.mark.parametrize(
    ("given", "suggested"),
    [
        ("awq.yaml", "awq"),
        ("./AWQ.yml", "awq"),
        ("nf4", "gptq-w4a16"),
        ("AutoRound", "gptq-w4a16"),
        ("gptq-w4a61", "gptq-w4a16"),
        ("fp8-dynamc", "fp8-dynamic"),
    ],
)
def test_others_are_suggested(given: str, suggested: str) -> None:
    with pytest.raises(UserError, match=rf"`{given}`.*\nhint: .*`{suggested}`"):
        find(given)


def test_a_name_like_no_other(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hint: `quantkit recipes` lists the names"):
        find("zzzzzzzz")
    (tmp_path / "quantkit-report.json").touch()
    with pytest.raises(UserError, match=f"is a folder, not a recipe file\nhint: `{tmp_path}/quantkit-report.json`"):
        find(tmp_path)


SCHEMES = {
    "w4a17": "did you mean `W4A16`",
    "gptq": "`--scheme W4A16`, or `--recipe gptq-w4a16`",
    "W3A16": "`--recipe gptq-w3a16`",
    "INT8": "`--scheme W8A8`",
    "mxfp4a16": "`--recipe mxfp4a16`",
    "zzzz": "there are W4A16, ",
}


@pytest.mark.parametrize("given", SCHEMES)
def test_schemes_that_do_not_exist(given: str) -> None:
    with pytest.raises(UserError) as caught:
        scheme_named(given)
    assert str(caught.value).startswith(f"no scheme named `{given}`\nhint: ")
    assert SCHEMES[given] in str(caught.value)


@pytest.mark.parametrize("given", ["w4a16", "W4A16", "fp8-dynamic", "FP8_dynamic"])
def test_schemes_in_any_spelling(given: str) -> None:
    assert scheme_named(given) in ("W4A16", "FP8_DYNAMIC")


def test_a_scheme_replaces_that_of_a_recipe() -> None:
    recipe = load("awq", scheme="w8a8")
    assert (recipe.scheme, recipe.weights.bits, recipe.weights.group_size) == ("W8A8", 8, "channel")
    assert recipe.resolved() == load("awq", ["scheme=W8A8"]).resolved()


def test_neither_recipe_nor_scheme() -> None:
    for name in (None, ""):
        with pytest.raises(
            UserError, match=r"no recipe and no scheme.*\nhint: pass --scheme W4A16 .* or --recipe NAME"
        ):
            load(name)


def test_flags_are_settings() -> None:
    flags = [
        Flag("--bits", "weights.bits", "3"),
        Flag("--group-size", "weights.group_size", "channel"),
        Flag("--calibration", "calibration.data", "a: 1.txt", literal=True),
        Flag("--seq-len", "calibration.seq_len", "256"),
    ]
    recipe = load("gptq-w4a16", flags=flags)
    assert (recipe.weights.bits, recipe.weights.group_size) == (3, "channel")
    assert recipe.calibration is not None
    assert (recipe.calibration.data, recipe.calibration.seq_len) == ("a: 1.txt", 256)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"flags": [Flag("--bits", "weights.bits", "four")]}, "--bits four: weights.bits: must be a whole number"),
    ({"flags": [Flag("--bits", "weights.bits", "9")]}, "--bits 9: weights.bits: must be at most 8, got 9"),
    (
        {"flags": [Flag("--samples", "calibration.samples", "0")]},
        "--samples 0: calibration.samples: must be at least 1",
    ),
    ({"flags": [Flag("--bits", "weights.bits", "8")], "scheme": "W4A16"}, "--bits 8: weights.bits: 8 contradicts"),
    ({"model": "a", "sets": ["model=b"]}, "--model a and --set model=b differ: give one of them"),
    (
        {"flags": [Flag("--bits", "weights.bits", "8")], "sets": ["weights.bits=4"]},
        "--bits 8 and --set weights.bits=4 differ: give one of them",
    ),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_flags_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(None if "scheme" in options else "gptq-w4a16", **options)
    assert message in str(caught.value)
