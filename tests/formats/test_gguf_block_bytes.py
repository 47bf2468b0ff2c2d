"""Bytes of GGUF's blocks against the gguf package's own decoder, to the last bit."""

from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.errors import RunError, UserError
from quantkit.formats.gguf.block_bytes import (
    LAYOUTS,
    carried,
    dequantize_bytes,
    float_bytes,
    pack,
    pack_nvfp4,
    unpack,
)
from quantkit.ggml_types import GGML_TYPES, QUANTIZED
from quantkit.grids.block_types import BLOCK_TYPES
from quantkit.grids.dequantize import dequantize
from quantkit.grids.elements import encode_float
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


def floats(spec: TensorSpec, global_scale: float | None) -> QuantizedWeight:
    random = torch.Generator().manual_seed(3)
    codes_NK = torch.empty(2, 128, dtype=torch.uint8)
    encode_float(torch.randn(2, 128, generator=random).mul_(3), 4, codes_NK)
    if global_scale is None:
        scale_NG = 2.0 ** torch.randint(-30, 10, (2, 4), generator=random)
    else:
        scale_NG = torch.tensor([[448.0, 1.0, 2**-9, 0.875, 3.5, 13, 240, 9]]).expand(2, 8) * global_scale
    return QuantizedWeight(codes_NK, scale_NG, None, spec, global_scale)


@pytest.mark.parametrize("global_scale", [None, 2.0**-11])
def test_fp4_codes_and_scales_are_carried_over(global_scale: float | None) -> None:
    q = floats(MXFP4 if global_scale is None else NVFP4, global_scale)
    name, data = carried(q)
    assert name == ("MXFP4" if global_scale is None else "NVFP4")
    decoded = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[name])
    assert same_bits(dequantize(q), decoded * (global_scale or 1.0))
    if global_scale is not None:
        assert pack_nvfp4(q)[1] == global_scale


def test_fp4_scales_that_do_not_fit_are_refused() -> None:
    q = floats(MXFP4, None)
    q.scale_NG[1, 2] *= 1.5
    with pytest.raises(UserError, match=r"MXFP4 .* row 1, group 2 .* power of two"):
        carried(q)
    q = floats(NVFP4, 1.0)
    with pytest.raises(UserError, match=r"NVFP4 .* row 0, group 3 .* e4m3"):
        carried(QuantizedWeight(q.codes_NK, q.scale_NG + torch.eye(8)[3] * 0.01, None, NVFP4, 1.0))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_integer_codes_are_carried_over(bits: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(bits)
    codes_NK = torch.randint(0, 2**bits, (3, 64), generator=random, dtype=torch.int32).to(torch.uint8)
    codes_NK[1, 32:] = 2 ** (bits - 1)  # all zeros, with a scale that only bfloat16 and float32 have
    scale_NG = torch.randn(3, 2, generator=random).bfloat16().to(dtype)
    scale_NG[1, 1] = 1e-38
    q = QuantizedWeight(codes_NK, scale_NG, None, TensorSpec(bits, 32))
    name, data = carried(q)
    assert name == {4: "Q4_0", 8: "Q8_0"}[bits]
    theirs = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[name])
    expected = dequantize(QuantizedWeight(codes_NK, scale_NG.float(), None, TensorSpec(bits, 32)))
    assert same_bits(expected, theirs)


@pytest.mark.parametrize("scale", [1.0001, 70000.0, 2.0**-26, float("nan")])
def test_integer_scales_that_float16_has_not_are_refused(scale: float) -> None:
    q = QuantizedWeight(torch.zeros(2, 64, dtype=torch.uint8), torch.ones(2, 2), None, TensorSpec(4, 32))
    q.scale_NG[1, 0] = scale
    with pytest.raises(UserError, match=r"Q4_0 .* row 1, group 0 .* float16 number\nhint: --requantize"):
        carried(q)


@pytest.mark.parametrize("spec", [TensorSpec(4, 128), TensorSpec(4, 32, False), TensorSpec(3, 32), TensorSpec(8, -1)])
def test_other_formats_are_not_carried_over(spec: TensorSpec) -> None:
    zero = None if spec.symmetric else torch.zeros(2, spec.groups(128), dtype=torch.uint8)
    q = QuantizedWeight(torch.zeros(2, 128, dtype=torch.uint8), torch.ones(2, spec.groups(128)), zero, spec)
    with pytest.raises(UserError, match="no GGUF type holds"):
        carried(q)


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
