"""The planes layout: nothing is lost, and every word has its bits where the contract says."""

import pytest
import torch

pytest.importorskip("triton")

from quantkit_kernels.layout import PLACES, blocks, pack, pack_groups, pack_words, unpack_groups, unpack_words

CODES = {"int4": 16, "int8": 256, "fp8": 256, "fp4": 16}


@pytest.mark.parametrize("format", PLACES)
@pytest.mark.parametrize("columns", [16, 128, 200, 256, 640])
def test_round_trip(format: str, columns: int) -> None:
    codes_NK = torch.randint(0, CODES[format], (5, columns), dtype=torch.uint8)
    words = pack_words(codes_NK, format)
    assert words.shape == (blocks(columns), 5, 128 // len(PLACES[format]))
    assert words.is_contiguous()
    assert torch.equal(unpack_words(words, format, columns), codes_NK)


@pytest.mark.parametrize("format", PLACES)
def test_places_use_each_bit_once(format: str) -> None:
    bits = [bit for code in PLACES[format] for bit in code]
    assert sorted(bits) == list(range(32))


def test_worked_example_int4() -> None:
    """Word 3 of block 1 of row 0 holds the codes of columns 128 + 3, 128 + 19, ..., lowest nibble first."""
    codes_NK = torch.zeros(1, 256, dtype=torch.uint8)
    codes_NK[0, [131, 147, 163, 179, 195, 211, 227, 243]] = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8], dtype=torch.uint8)
    assert pack_words(codes_NK, "int4")[1, 0, 3].item() & 0xFFFFFFFF == 0x87654321


def test_worked_example_fp8() -> None:
    """-1.75 = 1 0111 110: its sign to bit 15, the rest to bits 10..4; the second code's to 11, 14..12 and 3..0."""
    codes_NK = torch.zeros(1, 256, dtype=torch.uint8)
    codes_NK[0, 0] = 0b10111110
    assert pack_words(codes_NK, "fp8")[0, 0, 0].item() & 0xFFFFFFFF == 0b1000001111100000
    codes_NK[0, 0], codes_NK[0, 32] = 0, 0b10111110
    assert pack_words(codes_NK, "fp8")[0, 0, 0].item() & 0xFFFFFFFF == 0b0011100000001110


def test_groups_round_trip_and_worked_place() -> None:
    values_NG = torch.arange(30.0).reshape(3, 10)  # groups of 64: 4 in a step, so 3 steps, two groups of padding
    packed = pack_groups(values_NG, 64)
    assert packed.shape == (3, 3, 4)
    assert packed[2, 1].tolist() == [18.0, 19.0, 0.0, 0.0]
    assert torch.equal(unpack_groups(packed, 10), values_NG)


def test_refusals_name_what_is_wrong() -> None:
    codes, scale = torch.zeros(4, 96, dtype=torch.uint8), torch.ones(4, 3)
    bad = [
        ({"group_size": 48}, r"group size 48; supported: \[16, 32, 64, 128\]"),
        ({"group_size": 64}, "4x96: group_size=64 does not divide 96"),
        ({"scale_NG": torch.ones(4, 2)}, r"int4 weight scale: wanted .* \[4x3\], got float32 4x2"),
        ({"codes_NK": codes.int()}, "int4 weight codes: wanted uint8"),
        ({"codes_NK": codes.t().contiguous().t()}, "not contiguous"),
        ({"dtype": torch.float32}, "bfloat16 or float16, got torch.float32"),
        ({"zero_NG": torch.zeros(4, 3)}, "int4 weight zero: wanted uint8"),
        ({"format": "fp4", "zero_NG": torch.zeros(4, 3, dtype=torch.uint8)}, "no zero points"),
    ]
    good = {"codes_NK": codes, "scale_NG": scale, "zero_NG": None, "format": "int4", "group_size": 32}
    pack(**good, dtype=torch.bfloat16)
    for change, message in bad:
        with pytest.raises(ValueError, match=message):
            pack(**{"dtype": torch.bfloat16} | good | change)
