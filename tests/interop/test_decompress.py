"""compressed-tensors' own decompression of our tensors gives the very floats we decode."""

from typing import Any

import pytest
import torch

from quantkit.formats.compressed_tensors import tensors as ct
from quantkit.grids.dequantize import (
    dequantize,
)
from quantkit.grids.integer import IntegerGrid
from quantkit.types import Scheme, TensorSpec
from tests.interop.packing import negate_half

pytestmark = pytest.mark.interop
pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")


def decompress(tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> torch.Tensor:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(settings)
    compressor = BaseCompressor.get_value_from_registry(settings["format"])
    return compressor.decompress(dict(tensors), config.config_groups["group_0"])["weight"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("group_size", [-1, 32], ids="g{}".format)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", range(2, 9), ids="int{}".format)
@pytest.mark.parametrize("shape", [(24, 160), (17, 96)], ids=str)
def test_same_floats(shape: tuple[int, int], bits: int, symmetric: bool, group_size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(bits)
    spec = TensorSpec(bits, group_size, symmetric)
    w_NK = torch.randn(shape) + 0.3
    grid = IntegerGrid(spec, dtype)
    q = negate_half(grid.quantize(w_NK, *grid.fit(w_NK)))
    assert (q.scale_NG < 0).any()
    theirs = decompress(ct.pack(q), ct.config({"a": Scheme(spec)}, ["lm_head"]))
    assert theirs.dtype == dtype
    assert torch.equal(theirs, dequantize(q))


def test_our_config_is_valid_there() -> None:
    from compressed_tensors.quantization import QuantizationConfig

    four, eight = Scheme(TensorSpec(4, 128, True)), Scheme(TensorSpec(8, -1, False))
    specs = {"a.0.q": four, "a.1.q": four, "b": eight}
    parsed = QuantizationConfig.model_validate(ct.config(specs, ["lm_head"]))
    assert len(parsed.config_groups) == 2
    assert parsed.ignore == ["lm_head"]
