"""Bytes of GGUF's blocks against the gguf package's own decoder, to the last bit."""

from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.errors import RunError
from quantkit.formats.gguf.block_bytes import (
    LAYOUTS,
    dequantize_bytes,
    float_bytes,
    pack,
    unpack,
)
from quantkit.ggml_types import GGML_TYPES, QUANTIZED
from quantkit.grids.block_types import BLOCK_TYPES
from quantkit.grids.dequantize import dequantize
from quantkit.types import BlockScales, QuantizedWeight, TensorSpec, block_spec

MXFP4 = TensorSpec(4, 32, element="float", scale_format="e8m0")
NVFP4 = TensorSpec(4, 16, element="float", scale_format="e4m3")


def random_weight(name: str, seed: int, N: int = 3, G: int = 2) -> QuantizedWeight:
    """Codes and integers from all that the type has, float16 scales of all sizes and both signs."""
    type_, random = BLOCK_TYPES[name], torch.Generator().manual_seed(seed)
    K, S = G * type_.columns, G * type_.columns // type_.span

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (N, S), generator=random).float()

    def halves() -> Tensor:
        bits = torch.randint(-(2**15), 2**15, (N, G), generator=random, dtype=torch.int32).to(torch.int16)
        return bits.view(torch.float16).float().nan_to_num(1.5, 65504.0, -65504.0)

    codes_NK = torch.randint(0, type_.top + 1, (N, K), generator=random, dtype=torch.int32).to(torch.uint8)
    offset_NG = halves() if type_.sub_offset else torch.zeros(N, G)
    sub_offset_NS = integers(0, type_.sub_offset) if type_.sub_offset > 1 else torch.ones(N, S)
    blocks = BlockScales(offset_NG, integers(*type_.sub_scale), sub_offset_NS)
    return QuantizedWeight(codes_NK, halves(), None, block_spec(name), blocks=blocks)


def same_bits(ours: Tensor, theirs: Any) -> bool:
    """Equal as numbers, NaN as NaN: readers differ in the sign of a zero."""
    return np.array_equal(ours.numpy(), theirs, equal_nan=True)


@pytest.mark.parametrize("name", QUANTIZED)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_packed_weights_decode_alike(name: str, seed: int) -> None:
    q = random_weight(name, seed)
    data = pack(q)
    N, K = q.codes_NK.shape
    assert data.dtype == torch.uint8
    assert data.shape == (N, GGML_TYPES[name].row_bytes(K))
    theirs = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[name])
    assert same_bits(dequantize(q), theirs)
    assert same_bits(dequantize_bytes(data, name, (N, K)), theirs)


@pytest.mark.parametrize("name", [*QUANTIZED, "MXFP4", "NVFP4"])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31))
@example(seed=362)  # Q6_K with a d of -Inf
def test_any_bytes_decode_alike(name: str, seed: int) -> None:
    """Whatever a file holds, float16 NaN and negative scales among it; and packing it again gives the same bytes."""
    type_ = GGML_TYPES[name]
    bytes_ = np.random.default_rng(seed).integers(0, 256, (2, 3 * type_.nbytes), dtype=np.uint8)
    shape = (2, 3 * type_.columns)
    with np.errstate(invalid="ignore", over="ignore"):
        theirs = gguf.quants.dequantize(bytes_, gguf.GGMLQuantizationType[name])
    assert same_bits(dequantize_bytes(torch.from_numpy(bytes_), name, shape), theirs)
    if name in QUANTIZED:
        q = unpack(torch.from_numpy(bytes_), block_spec(name), shape[1])
        assert q.blocks is not None
        if torch.isfinite(q.scale_NG).all() and torch.isfinite(q.blocks.offset_NG).all():
            assert np.array_equal(pack(q).numpy(), bytes_)


def test_layouts_fill_their_blocks() -> None:
    assert list(LAYOUTS) == list(QUANTIZED)
    for name, type_ in BLOCK_TYPES.items():
        assert type_.columns == GGML_TYPES[name].columns
        assert type_.bits == block_spec(name).bits
        assert pack(random_weight(name, 0)).shape[1] == 2 * GGML_TYPES[name].nbytes


def test_a_block_by_hand() -> None:
    """[0, 1, -1, .5] eight times: Q4_0 has d = -1/8 (the first extreme weight is 1), Q8_0 d = 1/127."""
    q4 = QuantizedWeight(
        torch.tensor([[8, 0, 16 - 1, 4] * 8], dtype=torch.uint8),
        torch.tensor([[-0.125]]),
        None,
        block_spec("Q4_0"),
        blocks=BlockScales(torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1)),
    )
    assert pack(q4).numpy().tobytes().hex(" ") == "00 b0" + " 88 00 ff 44" * 4


@pytest.mark.parametrize("name", QUANTIZED)
def test_scales_that_are_no_numbers_are_not_written(name: str) -> None:
    q = random_weight(name, 1)
    q.scale_NG[1, 1] = torch.nan
    with pytest.raises(RunError, match="NaN or Inf"):
        pack(q)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_floats(name: str) -> None:
    w = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-8, 3, 40)
    data = float_bytes(w, name)
    theirs = gguf.quants.quantize(w.numpy(), gguf.GGMLQuantizationType[name])
    assert data.numpy().tobytes() == theirs.tobytes()
    assert same_bits(
        dequantize_bytes(data, name, (3, 40)), dequantize_bytes(data.clone(), name, (120,)).view(3, 40).numpy()
    )


def test_f16_that_overflows_is_refused() -> None:
    w = torch.ones(2, 3)
    w[1, 1] = 7e4
    with pytest.raises(RunError, match="70000 is beyond the range of F16"):
        float_bytes(w, "F16")
    assert float_bytes(w, "BF16").shape == (2, 6)
