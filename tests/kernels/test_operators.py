"""Every operator has a schema and a fake kernel that agree with what it does, and torch.compile takes it whole."""

import pytest
import torch

pytest.importorskip("triton")

from quantkit_kernels.kv_write import allocate, kv_write
from quantkit_kernels.paged_attention import paged_attention
from quantkit_kernels.quantize_activations import quantize_activations
from quantkit_kernels.w4a16 import pack_w4a16, w4a16
from quantkit_kernels.w8a8 import w8a8

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
CHECKS = ("test_schema", "test_faketensor")
OPS = torch.ops.quantkit_kernels


def test_linears_and_quantization() -> None:
    x = torch.randn(3, 256, dtype=torch.bfloat16, device=DEVICE)
    for group in (-1, 128):
        torch.library.opcheck(
            OPS.quantize_activations.default, (x, None, 1e-6, "none", "fp8", group), test_utils=CHECKS
        )
    codes, scale = quantize_activations(x, element="int8")
    w, w_scale = torch.randint(-9, 9, (64, 256), dtype=torch.int8, device=DEVICE), torch.rand(64, device=DEVICE)
    torch.library.opcheck(OPS.w8a8.default, (codes, scale, w, w_scale, "int8", torch.float16), test_utils=CHECKS)


def test_cache_and_attention() -> None:
    k, v = (allocate(kind, 2, 16, 1, 32, dtype=torch.bfloat16, device=DEVICE) for kind in ("int4", "fp8"))
    new = torch.randn(3, 1, 32, dtype=torch.bfloat16, device=DEVICE)
    slots = torch.tensor([0, 1, 2], device=DEVICE)
    arguments = (new, new, slots, k.codes, k.scale, v.codes, v.scale, "int4", "fp8")
    torch.library.opcheck(OPS.kv_write.default, arguments, test_utils=CHECKS)
    kv_write(new, new, slots, k, v)
    table, lengths, starts = (torch.tensor(t, dtype=torch.int32, device=DEVICE) for t in ([[0]], [3], [0, 1]))
    q = torch.randn(1, 2, 32, dtype=torch.bfloat16, device=DEVICE)
    arguments = (q, k.codes, k.scale, v.codes, v.scale, table, lengths, starts, "int4", "fp8", 0.2, 0, 1)
    torch.library.opcheck(OPS.paged_attention.default, arguments, test_utils=CHECKS)
    assert paged_attention(q, k, v, table, lengths, starts, most_queries=1).isfinite().all()


def test_compile_takes_the_functions_whole() -> None:
    codes = torch.randint(0, 16, (64, 256), dtype=torch.uint8, device=DEVICE)
    scale = torch.rand(64, 2, device=DEVICE).bfloat16()
    weight = pack_w4a16(codes, scale, group_size=128, dtype=torch.bfloat16)
    w, w_scale = torch.randint(-9, 9, (64, 64), dtype=torch.int8, device=DEVICE), torch.rand(64, device=DEVICE)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return w8a8(*quantize_activations(w4a16(x, weight), element="int8"), w, w_scale, "int8")

    x = torch.randn(2, 256, dtype=torch.bfloat16, device=DEVICE)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
