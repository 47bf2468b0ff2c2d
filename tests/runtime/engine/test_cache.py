"""What the paged cache gives back is what `quantize_kv` makes of what was written, exactly."""

import pytest
import torch
from torch import Tensor

from quantkit.errors import UserError
from quantkit.grids.activations import quantize_kv
from quantkit.runtime.engine.cache import CacheFormat, LayerShape, Pages
from quantkit.types import KVSpec

H, P, BLOCKS = 2, 16, 5
SPECS = [
    KVSpec(8, "int", "token"),
    KVSpec(4, "int", "token"),
    KVSpec(3, "int", "token"),
    KVSpec(6, "int", "token"),
    KVSpec(8, "int", "token", symmetric=False),
    KVSpec(4, "int", "token", symmetric=False),
    KVSpec(4, "int", "token", symmetric=False, group_size=32),
    KVSpec(4, "int", "token", group_size=16),
    KVSpec(5, "int", "token", symmetric=False, group_size=24),
    KVSpec(8, "float", "token"),
    KVSpec(8, "float"),
    KVSpec(8, "float", "head"),
    KVSpec(8, "int", "head"),
    KVSpec(4, "int", "tensor"),
    KVSpec(4, "int", "token", symmetric=False, packed=True),
    KVSpec(8, "int", "token", packed=True),
    KVSpec(4, "int", "token", symmetric=False, packed=True, group_size=32),
    KVSpec(4, "int", "token", symmetric=False, packed=True, channels=True),
    KVSpec(8, "int", "token", channels=True),
]


def scale_of(spec: KVSpec, D: int) -> Tensor | None:
    if spec.channels:
        return torch.stack([torch.linspace(-2, 2, H * D), torch.linspace(0.5, 3, H * D)]).view(2, H, D)
    return {"token": None, "tensor": torch.tensor(0.013), "head": torch.tensor([0.013, 0.02])}[spec.per]


def filled(spec: KVSpec | None, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Tokens x [T, H, D] written to the blocks 3, 1, 4, and read back: [H, T, D]."""
    T, _, D = x.shape
    pages = Pages(
        BLOCKS, P, H, D, spec, dtype, torch.device("cpu"), None if spec is None else scale_of(spec, x.shape[-1])
    )
    table = torch.tensor([3, 1, 4])
    slots = table[torch.arange(T) // P] * P + torch.arange(T) % P
    rows = (slots // P * (H * P) + slots % P)[:, None] + torch.arange(H) * P
    for part in (slice(0, 7), slice(7, T)):
        pages.write(rows[part].flatten(), x[part])
    return pages.read(table)[:, :T]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("D", [64, 48, 128])
def test_equal_to_the_simulation(spec: KVSpec, dtype: torch.dtype, D: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, H, D)
    x[3] = 0
    x[4] *= 1e-30
    x[5] *= 200
    x[6] = 1.5
    x[7, :, 0] = 300
    x[8] = x[8].abs() + 3  # a range without zero
    x = x.to(dtype)
    wanted = quantize_kv(x.transpose(0, 1)[None], spec, scale_of(spec, D))[0]
    assert torch.equal(filled(spec, x, dtype), wanted)


def test_plain() -> None:
    x = torch.randn(40, H, 12)
    assert torch.equal(filled(None, x, torch.float32), x.transpose(0, 1))


def test_bytes() -> None:
    shapes = {0: LayerShape(2, 64), 1: LayerShape(2, 64)}
    plain = CacheFormat().bytes_per_token(shapes, torch.bfloat16)
    assert plain == 2 * 2 * 2 * 64 * 2
    int8, int4 = KVSpec(8, "int", "token"), KVSpec(4, "int", "token")
    eight = CacheFormat(int8, int8).bytes_per_token(shapes, torch.bfloat16)
    assert eight <= 0.55 * plain
    mixed = CacheFormat(int8, int4).bytes_per_token(shapes, torch.bfloat16)
    assert mixed == 2 * 2 * (64 + 4 + 32 + 4)


@pytest.mark.parametrize(
    ("spec", "static", "message"),
    [
        (KVSpec(8, "int", "head"), None, "needs the checkpoint"),
        (KVSpec(8, "int", "head"), torch.ones(3), "3 scales .* for 2 heads"),
    ],
)
def test_refused(spec: KVSpec, static: Tensor | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Pages(2, P, H, 64, spec, torch.float32, torch.device("cpu"), static)
