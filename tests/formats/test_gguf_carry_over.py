"""Codes and scales of quantized folders as GGUF's blocks, decoded by the gguf package to the very same weights."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from quantkit.errors import UserError
from quantkit.formats.gguf.carry_over import carried_bytes, carried_type
from quantkit.grids import make_grid
from quantkit.grids.dequantize import dequantize
from quantkit.types import PRESETS, QuantizedWeight, TensorSpec

INT4, INT8 = TensorSpec(4, 32), TensorSpec(8, 32)
MXFP4, NVFP4 = PRESETS["MXFP4"].weights, PRESETS["NVFP4"].weights
N, K = 48, 256


def quantized(spec: TensorSpec, dtype: torch.dtype = torch.bfloat16, *, signed: bool = False) -> QuantizedWeight:
    torch.manual_seed(0)
    w_NK = torch.randn(N, K) * torch.logspace(-3, 1, N)[:, None]
    w_NK[5, 32:64] = 0
    grid = make_grid(spec, dtype if spec.element == "int" else torch.float32, None, signed=signed)
    grid = grid.for_tensors([w_NK])
    parameters = grid.fit(w_NK)
    return grid.weight(grid.encode(w_NK, parameters), parameters)


def decoded(q: QuantizedWeight, type_: str) -> Tensor:
    return torch.from_numpy(gguf.dequantize(carried_bytes(q).numpy(), Type[type_]).copy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("spec", "type_"), [(INT4, "Q4_0"), (INT8, "Q8_0")])
def test_integers(spec: TensorSpec, type_: str, dtype: torch.dtype) -> None:
    q = quantized(spec, dtype, signed=True)
    assert carried_type(spec) == type_
    steps = q.codes_NK.float().reshape(N, -1, 32) - spec.levels // 2
    assert torch.equal(decoded(q, type_), (steps * q.scale_NG.float()[..., None]).reshape(N, K))


def test_every_code_of_a_byte() -> None:
    codes_NK = torch.arange(256, dtype=torch.uint8).reshape(1, 256)
    q = QuantizedWeight(codes_NK, torch.full((1, 8), 0.5), None, INT8)
    assert torch.equal(decoded(q, "Q8_0")[0], (torch.arange(256) - 128) / 2)


def test_mxfp4() -> None:
    q = quantized(MXFP4)
    assert carried_type(MXFP4) == "MXFP4"
    assert torch.equal(decoded(q, "MXFP4"), dequantize(q))
    codes_NK = torch.arange(16, dtype=torch.uint8).repeat(2)[None]
    for exponent in (-126, -20, 0, 100):
        q = QuantizedWeight(codes_NK, torch.tensor([[2.0**exponent]]), None, MXFP4)
        assert torch.equal(decoded(q, "MXFP4"), dequantize(q))


def test_nvfp4() -> None:
    q = quantized(NVFP4)
    assert q.global_scale is not None
    assert carried_type(NVFP4) == "NVFP4"
    assert torch.equal(decoded(q, "NVFP4") * q.global_scale, dequantize(q))  # the global scale is a power of two


def test_scales_that_float16_does_not_hold() -> None:
    q = quantized(INT4)
    q.scale_NG[3, :2] = 1.0e-30
    q.scale_NG[4, 7] = 1.0e30
    with pytest.raises(UserError, match=r"3 of 384 scales are not exact as float16 \(one is 9\.98"):
        carried_bytes(q)
    q.codes_NK[3], q.codes_NK[4] = 8, 8  # zeros alone: no scale to keep
    assert torch.equal(decoded(q, "Q4_0")[3:5], torch.zeros(2, K))
    thirds = QuantizedWeight(q.codes_NK, torch.full((N, 8), 1 / 3), None, INT4)
    with pytest.raises(UserError, match="scales are not exact as float16"):
        carried_bytes(thirds)


@pytest.mark.parametrize("scale", [1.0001, 70000.0, 2.0**-26, float("nan")])
def test_one_scale_that_float16_has_not(scale: float) -> None:
    q = QuantizedWeight(torch.zeros(2, 64, dtype=torch.uint8), torch.ones(2, 2), None, INT4)
    q.scale_NG[1, 0] = scale
    with pytest.raises(UserError, match="1 of 4 scales are not exact as float16"):
        carried_bytes(q)
    q.scale_NG[1, 0] = 2.0**-24
    assert decoded(q, "Q4_0")[1, 0] == -8 * 2.0**-24


def test_mxfp4_scales_that_are_no_powers_of_two() -> None:
    q = quantized(MXFP4)
    q.scale_NG[1, 2] *= 1.5
    with pytest.raises(UserError, match=f"1 of {N * K // 32} scales are not exact as powers of two"):
        carried_bytes(q)


def test_another_tools_global_scale() -> None:
    """No power of two: the group scales are rounded products, and still the e4m3 numbers they came from."""
    e4m3_NG = torch.tensor([448.0, 1.0, 2**-9, 0.875, 3.5, 13, 240, 9]).expand(2, 8)
    whole = 1 / torch.tensor(2688 / 0.37)
    codes_NK = torch.randint(0, 16, (2, 128), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    q = QuantizedWeight(codes_NK, e4m3_NG * whole, None, NVFP4, float(whole))
    unit = QuantizedWeight(codes_NK, e4m3_NG.contiguous(), None, NVFP4, 1.0)
    assert torch.equal(decoded(q, "NVFP4"), dequantize(unit))


def test_other_formats_have_no_type() -> None:
    others = [TensorSpec(4, 128), TensorSpec(4, -1), TensorSpec(4, 32, symmetric=False), TensorSpec(3, 32)]
    others += [TensorSpec(8, -1), TensorSpec(8, 128), PRESETS["FP8_BLOCK"].weights, PRESETS["MXFP8"].weights]
    assert [carried_type(spec) for spec in others] == [None] * len(others)


def test_negative_scales_of_nvfp4_are_refused() -> None:
    q = quantized(NVFP4)
    q.scale_NG[0, 0] = -q.scale_NG[0, 0]
    with pytest.raises(UserError, match="1 of 768 scales are not exact as non-negative e4m3"):
        carried_bytes(q)


def test_the_bytes_are_those_of_the_description() -> None:
    codes_NK = torch.arange(32, dtype=torch.uint8)[None] % 16
    q = QuantizedWeight(codes_NK, torch.tensor([[-0.125]]), None, INT4)
    block = carried_bytes(q)[0].numpy()
    assert block[:2].tobytes() == np.float16(-0.125).tobytes()
    assert block[2:].tolist() == [j | (j << 4) for j in range(16)]  # elements j and j + 16
