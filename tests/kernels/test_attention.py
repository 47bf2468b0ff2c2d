"""Writing the quantized KV cache and attention over it, against float64 references; unused slots hold NaN."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from quantkit_kernels.kv_write import KINDS, Cache, allocate, kv_write, quantize_kv_reference, read_cache
from quantkit_kernels.paged_attention import launch, paged_attention, paged_attention_reference

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
SUMS = 2e-5 if DEVICE.type == "cpu" else 6e-3


def error(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return ((got.double() - wanted).norm() / wanted.norm()).item()


def poisoned(kind: str, blocks: int, block_size: int, heads: int, D: int) -> Cache:
    cache = allocate(kind, blocks, block_size, heads, D, dtype=torch.bfloat16, device=DEVICE)
    cache.codes.fill_(float("nan") if kind == "16" else 0x7F)
    if cache.scale is not None:
        cache.scale.fill_(float("nan"))
    return cache


def fill(cache: Cache, slots: Tensor) -> None:
    """Random finite codes and scales."""
    codes, count = cache.codes.flatten(0, 1), (len(slots), *cache.codes.shape[2:])
    if cache.scale is None:
        codes[slots] = torch.randn(count, device=DEVICE).to(codes.dtype)
        return
    new = torch.randint(0, 256, count, dtype=torch.uint8, device=DEVICE)
    codes[slots] = new if cache.kind != "fp8" else torch.where(new & 127 == 127, 3, new).to(torch.uint8)
    size = {"fp8": 0.02, "int8": 0.02, "int4": 0.2}[cache.kind]
    scale = (torch.rand(len(slots), *cache.scale.shape[2:], device=DEVICE) + 0.1) * size
    if cache.kind == "int4":
        scale[..., 1] *= -8
    cache.scale.flatten(0, 1)[slots] = scale.to(cache.scale.dtype)


def filled(
    lengths: list[int], k_kind: str, v_kind: str, block_size: int, heads: int, D: int
) -> tuple[Cache, Cache, Tensor, Tensor]:
    """Caches whose blocks are dealt at random, with what is written only where tokens are."""
    per_sequence = max(1, max(-(-n // block_size) for n in lengths))
    total = per_sequence * len(lengths) + 1
    table = torch.randperm(total)[: total - 1].reshape(len(lengths), -1).to(torch.int32).to(DEVICE)
    k, v = (poisoned(kind, total, block_size, heads, D) for kind in (k_kind, v_kind))
    for b, n in enumerate(lengths):
        t = torch.arange(n, device=DEVICE)
        slots = table[b].long()[t // block_size] * block_size + t % block_size
        for cache in (k, v):
            fill(cache, slots)
    return k, v, table, torch.tensor(lengths, dtype=torch.int32, device=DEVICE)


def starts_of(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts], dtype=torch.int32, device=DEVICE).cumsum(0).to(torch.int32)


def attend(q: Tensor, caches: tuple, starts: Tensor, most: int, window: int = 0, splits: int | None = None) -> Tensor:
    k, v, table, lengths = caches
    out = torch.full(q.shape, float("nan"), device=DEVICE)
    arguments = {"scale": q.shape[2] ** -0.5, "window": window, "most_queries": most, "splits": splits}
    return launch(q, k, v, table, lengths, starts, out, **arguments)


def reference(q: Tensor, caches: tuple, starts: Tensor, window: int = 0) -> Tensor:
    k, v, table, lengths = caches
    return paged_attention_reference(q, k, v, table, lengths, starts, q.shape[2] ** -0.5, window)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("D", [16, 80, 128])
def test_write(kind: str, D: int) -> None:
    k, v = poisoned(kind, 3, 16, 2, D), poisoned("16", 3, 16, 2, D)
    new = torch.randn(2, 6, 2, D, device=DEVICE).bfloat16()
    new[0, 1] = 0
    new[0, 2] = 7
    slots = torch.tensor([5, 40, -1, 17, 0, 31], device=DEVICE)
    kv_write(new[0], new[1], slots, k, v)
    written = slots >= 0
    got = read_cache(k).flatten(0, 1)[slots[written]]
    wanted = quantize_kv_reference(new[0][written], kind)
    step = 0 if kind == "16" else (new[0][written].float().abs().amax(-1, keepdim=True) * (2 / 15)).double()
    differs = (got - wanted).abs() > 1e-12  # by one code where float32's last bit decides a tie
    assert differs.double().mean() < 5e-3
    assert ((got - wanted).abs() <= step + 1e-12).all()
    assert torch.equal(read_cache(v).flatten(0, 1)[slots[written]], new[1][written].double())
    untouched = torch.ones(48, dtype=torch.bool)
    untouched[slots[written].cpu()] = False
    if kind == "16":
        assert read_cache(k).flatten(0, 1)[untouched].isnan().all()
    else:
        assert k.scale.flatten(0, 1)[untouched].isnan().all()


def test_int4_bytes_worked_example() -> None:
    """0 .. 15 twice over: scale 1, low 0, and byte j holds code j below code 16 + j."""
    k, v = poisoned("int4", 1, 16, 1, 32), poisoned("16", 1, 16, 1, 32)
    row = torch.arange(32, device=DEVICE).bfloat16() % 16
    row[16:] = 15 - row[16:]
    kv_write(row.reshape(1, 1, 32), row.reshape(1, 1, 32), torch.tensor([2], device=DEVICE), k, v)
    assert k.codes[0, 2, 0].tolist() == [j | (15 - j) << 4 for j in range(16)]
    assert k.scale[0, 2, 0].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("k_kind", "v_kind"),
    [("16", "16"), ("int8", "int8"), ("fp8", "int4"), ("int4", "fp8"), ("int4", "int4"), ("16", "int4")],
)
def test_decode_kinds(k_kind: str, v_kind: str) -> None:
    caches = filled([70, 1, 130], k_kind, v_kind, 16, 2, 64)
    q = torch.randn(3, 8, 64, device=DEVICE).bfloat16()
    starts = starts_of([1, 1, 1])
    assert error(attend(q, caches, starts, 1, splits=2), reference(q, caches, starts)) < SUMS


@pytest.mark.parametrize("D", [64, 80, 96, 128, 256])
def test_decode_head_sizes(D: int) -> None:
    caches = filled([40, 97], "int8", "int4", 32, 1, D)
    q = torch.randn(2, 3, D, device=DEVICE).bfloat16()
    starts = starts_of([1, 1])
    for splits in (1, 4):
        assert error(attend(q, caches, starts, 1, splits=splits), reference(q, caches, starts)) < SUMS


@pytest.mark.parametrize(("block_size", "window"), [(16, 0), (64, 1), (256, 50)])
def test_decode_windows_and_blocks(block_size: int, window: int) -> None:
    caches = filled([200, 33, 0], "fp8", "fp8", block_size, 1, 32)
    q = torch.randn(3, 7, 32, device=DEVICE).bfloat16()
    starts = starts_of([1, 1, 1])
    got = attend(q, caches, starts, 1, window, splits=2)
    assert error(got, reference(q, caches, starts, window)) < SUMS
    assert got[2].eq(0).all()  # nothing cached, nothing seen


@settings(max_examples=6, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 70)), min_size=1, max_size=3), st.sampled_from([1, 2, 5]),
    st.sampled_from(KINDS), st.sampled_from([0, 9]), st.sampled_from([1, 2]),
)  # fmt: skip
def test_ragged_prefill(sequences: list[tuple[int, int]], repeat: int, kind: str, window: int, splits: int) -> None:
    """Chunks: `new` queries behind `old` cached tokens, sequences without a query among them."""
    new = [n for n, _ in sequences]
    if sum(new) == 0:
        new[0] = 3
    caches = filled([n + old for n, (_, old) in zip(new, sequences, strict=True)], kind, "int8", 16, 2, 32)
    q = torch.randn(sum(new), 2 * repeat, 32, device=DEVICE).bfloat16()
    starts = starts_of(new)
    got = attend(q, caches, starts, max(2, *new), window, splits=splits)
    assert error(got, reference(q, caches, starts, window)) < SUMS


def test_public_function_and_refusals() -> None:
    k, v, table, lengths = filled([20, 50], "int4", "fp8", 16, 2, 64)
    q = torch.randn(2, 4, 64, device=DEVICE).bfloat16()
    starts = starts_of([1, 1])
    out = paged_attention(q, k, v, table, lengths, starts, most_queries=1)
    assert out.dtype == torch.bfloat16
    assert error(out, reference(q, (k, v, table, lengths), starts)) < 8e-3
    for change, message in [
        ({"q": q.float()}, "q is torch.float32"),
        ({"q": q[:, :3].contiguous()}, "3 query heads are no multiple of 2"),
        ({"q": q[:, :, :40].contiguous()}, "head size is 40"),
        ({"q": q[..., :32].contiguous()}, r"key cache: wanted uint8 of shape \[anyxanyxanyx16\]"),
        ({"lengths": lengths.long()}, "lengths: wanted int32"),
        ({"starts": starts[:2]}, r"starts: wanted int32 of shape \[3\]"),
        ({"q": q[:1]}, "1 queries of 2 sequences, yet most_queries is 1"),
        ({"k": Cache(k.codes, None, "int4")}, "key cache of kind int4 and its scale do not match"),
    ]:
        good = {"q": q, "k": k, "v": v, "block_table": table, "lengths": lengths, "starts": starts, "most_queries": 1}
        with pytest.raises(ValueError, match=message):
            paged_attention(**good | change)
    with pytest.raises(ValueError, match="block size is 24; supported"):
        allocate("int8", 2, 24, 1, 64, dtype=torch.bfloat16, device=DEVICE)
