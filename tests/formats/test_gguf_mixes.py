"""Mixes of GGUF: the rules against a table recorded from llama-quantize --dry-run, overrides, sizes, bad names."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import UserError
from quantkit.formats.gguf.mixes import (
    MIXES,
    TypeChoice,
    file_type,
    file_type_of,
    fitting_type,
    mix_name,
    size_by_type,
    tensor_types,
    type_choices,
)
from tests.gguf_outlines import Outline, summary

RECORDED = Path(__file__).with_name("llama_quantize_types.txt")
OUTLINES = {
    "llama32": Outline(layers=32, heads=8, keys=2),
    "llama80": Outline(layers=80, heads=8, keys=1),
    "qwen2-896": Outline("qwen2", layers=24, heads=14, keys=2, tied=True, columns=896, down=4864),
    "phi3-192": Outline("phi3", layers=18, heads=4, keys=4, columns=192, down=512),
    "mixtral": Outline(layers=17, heads=8, keys=2, experts=8),
    "qwen3moe": Outline("qwen3moe", layers=20, heads=8, keys=1, experts=128, columns=2048, down=768),
    "odd-rows": Outline(layers=6, heads=4, keys=4, tied=True, columns=48, down=320),
}


def recorded_cases() -> Iterator[tuple[str, Outline, str, bool]]:
    """Name, outline, mix, imatrix, in the order of the table."""
    for name, outline in OUTLINES.items():
        for mix in MIXES:
            yield name, outline, mix, False
            if mix in ("Q4_0", "Q5_0", "IQ4_NL", "IQ4_XS"):  # the others do not ask
                yield name, outline, mix, True


@pytest.mark.parametrize("line", range(len(OUTLINES) * (len(MIXES) + 4)))
def test_the_types_are_the_recorded_ones(line: int) -> None:
    name, outline, mix, imatrix = list(recorded_cases())[line]
    types = types_of(outline, mix.lower(), imatrix=imatrix)
    row = f"{name} {mix}{' imatrix' if imatrix else ''}: {summary(types)}"
    assert row == RECORDED.read_text().splitlines()[line]
    assert list(types) == list(outline.shapes)
    assert types["blk.0.attn_norm.weight"] == types["output_norm.weight"] == "F32"


def types_of(outline: Outline, mix: str, imatrix: bool = False, **options: Any) -> dict[str, str]:
    return tensor_types(
        mix, outline.shapes, architecture=outline.architecture, metadata=outline.metadata, imatrix=imatrix, **options
    )


SMALL = Outline(layers=12, heads=4, keys=2)


def test_pure_is_one_type_for_all_and_types_by_name_go_first() -> None:
    assert summary(types_of(SMALL, "Q4_K_M", pure=True)).count("Q4_K") == 9
    types = types_of(
        SMALL, "q4_k", pure=True, output="q8_0", token_embedding="f16",
        overrides={"token_embd": "q2_k", r"\.(\d*[13579])\.FFN_DOWN": "q5_k", "ffn_": "iq4_xs"},
    )  # fmt: skip
    assert [types[f"blk.{i}.ffn_down.weight"] for i in (0, 1, 10, 11)] == ["IQ4_XS", "Q5_K", "IQ4_XS", "Q5_K"]
    assert (types["output.weight"], types["token_embd.weight"], types["blk.0.ffn_up.weight"]) == (
        "Q8_0",
        "F16",
        "IQ4_XS",
    )


def test_tensors_given_a_type_do_not_count_as_seen() -> None:
    types = types_of(SMALL, "Q3_K_M", overrides={r"blk\.[[:digit:]]\.attn_v": "Q8_0"})
    assert summary({name: type_ for name, type_ in types.items() if "attn_v" in name}) == "attn_v Q8_0*10,Q5_K*2"


def test_the_head_of_a_tied_model_is_its_embedding() -> None:
    tied = Outline(tied=True)
    assert types_of(tied, "Q4_K_M")["token_embd.weight"] == "Q6_K"
    assert types_of(tied, "Q4_K_M", output="q8_0")["token_embd.weight"] == "Q8_0"
    assert types_of(tied, "Q4_K_M", output="q8_0", token_embedding="q5_k")["token_embd.weight"] == "Q5_K"


def test_what_does_not_fit_is_told() -> None:
    outline = Outline(layers=6, columns=192, down=40)
    choices = type_choices(
        "Q4_K_M", outline.shapes, architecture="llama", metadata=outline.metadata, imatrix=False, token_embedding="Q3_K"
    )
    assert choices["token_embd.weight"] == TypeChoice("Q3_K", "Q4_0")
    assert choices["output.weight"] == TypeChoice("Q6_K", "Q8_0")
    assert choices["blk.0.attn_q.weight"] == TypeChoice("Q4_K", "Q5_0")
    assert choices["blk.2.ffn_down.weight"] == TypeChoice("Q6_K", "F16")
    assert choices["blk.2.attn_norm.weight"] == TypeChoice("F32", "F32")
    assert [fitting_type(type_, 64) for type_ in ("IQ4_XS", "Q2_K", "Q5_K", "Q4_1", "BF16")] == [
        "IQ4_NL", "Q4_0", "Q5_1", "Q4_1", "BF16",
    ]  # fmt: skip
    assert fitting_type("BF16", 33) == "BF16"


def test_a_matrix_of_one_row_is_a_vector() -> None:
    shapes = {"blk.0.attn_q.weight": (1, 256), "blk.0.ffn_up_exps.weight": (8, 1, 256), "output.weight": (2, 256)}
    metadata = {"llama.block_count": ("u32", 1), "llama.attention.head_count": ("u32[]", [4])}
    types = tensor_types("Q4_0", shapes, architecture="llama", metadata=metadata, imatrix=False)
    assert list(types.values()) == ["F32", "Q4_0", "Q6_K"]


def test_sizes_by_type() -> None:
    shapes = {"a": (3, 256), "b": (2, 2, 512), "c": (256,), "d": (1000, 256)}
    types = {"a": "Q4_K", "b": "Q4_K", "c": "F32", "d": "Q6_K"}
    assert size_by_type(types, shapes) == {"Q6_K": (1, 210_000), "Q4_K": (2, 11 * 144), "F32": (1, 1024)}
    assert list(size_by_type(types, shapes)) == ["Q6_K", "Q4_K", "F32"]


def test_file_types() -> None:
    assert [file_type(mix) for mix in ("q4_k_m", "Q4_K", "iq4_xs", "BF16", "q2_k", "Q3_K_L")] == [
        15,
        15,
        30,
        32,
        10,
        13,
    ]
    assert file_type_of({"a": "Q3_K", "b": "Q8_0"}, {"a": (2, 256), "b": (1, 256)}) == 12
    assert file_type_of({"a": "IQ4_NL", "b": "F32"}, {"a": (2, 256), "b": (256,)}) == 25


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("q4_km", "Q4_K_M"),
        ("IQ2_XXS", "there are"),
        ("IQ4_K", "there are"),
        ("iq4xs", "IQ4_XS"),
        ("nonsense", "there are"),
        ("TQ1_0", "there are"),
        ("MXFP4_MOE", "there are"),
        ("", "there are"),
    ],
)
def test_unknown_mixes_are_refused_by_name(name: str, hint: str) -> None:
    with pytest.raises(UserError) as error:
        mix_name(name)
    assert repr(name) in str(error.value)
    assert hint in str(error.value).split("\nhint: ")[1]


@pytest.mark.parametrize("type_", ["iq2_xs", "TQ2_0", "iq4_ks", "q4_k_m", "MXFP4", "Q8_K", "I32"])
def test_types_we_do_not_write_are_refused_by_name(type_: str) -> None:
    given: list[tuple[str, dict[str, Any]]] = [
        ("tensor_types: 'attn_v'", {"overrides": {"attn_v": type_}}),
        ("output", {"output": type_}),
        ("token_embedding", {"token_embedding": type_}),
    ]
    for where, options in given:
        with pytest.raises(UserError) as error:
            types_of(SMALL, "Q4_K_M", **options)
        assert str(error.value).startswith(where)
        assert type_ in str(error.value)
        assert "hint: " in str(error.value)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("attn_vv", "did you mean `attn_v`?"),
        ("blk.12.ffn_down", "did you mean `"),
        ("mlp.gate_proj", "hint: "),
        ("attn_norm", "matches no tensor that can be quantized"),
        ("attn_(v", "no regular expression"),
        ("*attn", "no regular expression"),
    ],
)
def test_patterns_that_find_nothing_are_an_error(pattern: str, said: str) -> None:
    with pytest.raises(UserError, match="tensor_types") as error:
        types_of(SMALL, "Q4_K_M", overrides={"ffn": "q6_k", pattern: "q8_0"})
    assert said in str(error.value)
    assert repr(pattern) in str(error.value)
