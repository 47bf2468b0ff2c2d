"""Decode attention on the CPU against float64, with and without the compiled kernel."""

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantkit_kernels.cpu import attention, build
from quantkit_kernels.cpu.attention import (
    KINDS,
    Paged,
    cpu_decode_attention,
    cpu_decode_attention_reference,
    cpu_paged_attention,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture(scope="module", params=["compiled", "wide", "torch alone"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    found, patch = None, pytest.MonkeyPatch()
    if request.param != "torch alone":
        request.getfixturevalue("lib")
        flags = ("-DQK_WIDTH=16", "-DQK_TEST_VNNI", "-O1") if request.param == "wide" else ()
        found = build.declare(ctypes.CDLL(str(build.build(flags))))
    patch.setattr(attention, "library", lambda: found)
    yield request.param
    patch.undo()


def case(kind: torch.dtype, B: int, H: int, Q: int, L: int, D: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    query = torch.randn(B, H * Q, D)
    if kind.itemsize > 1:
        return query, *(torch.randn(B, H, L, D).to(kind) for _ in range(2)), {}
    if kind == torch.int8:
        keys, values = (torch.randint(-128, 128, (B, H, L, D), dtype=kind) for _ in range(2))
    else:
        keys, values = (torch.randn(B, H, L, D).mul_(100).to(kind) for _ in range(2))
    return query, keys, values, {name: torch.rand(B, H, L) * 0.02 for name in ("k_scale", "v_scale")}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_attention(kernels: str, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(list(KINDS)))
    B, H = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 5]))
    Q, D = data.draw(st.sampled_from([1, 2, 3, 4, 7, 8, 13])), data.draw(st.sampled_from([16, 64, 80, 96, 128, 256]))
    L = data.draw(st.sampled_from([1, 2, 63, 64, 65, 130, 1200]))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    query, keys, values, scales = case(kind, B, H, Q, L, D)
    lengths = torch.tensor([data.draw(st.integers(0, L)) for _ in range(B)])
    for b in range(B):  # what lies beyond a sequence's end must not be seen
        for tensor in (keys, values):
            tail = tensor[b, :, int(lengths[b]) :]
            tail.copy_(torch.full(tail.shape, 127) if kind == torch.int8 else torch.full(tail.shape, 400.0).to(kind))
    options: dict[str, Any] = {
        "window": data.draw(st.sampled_from([0, 1, 50])),
        "scale": data.draw(st.sampled_from([None, 0.3])),
    }
    got = cpu_decode_attention(query, keys, values, lengths, **options, **scales)
    wanted = cpu_decode_attention_reference(query, keys, values, lengths, **options, **scales)
    assert torch.allclose(got.double(), wanted, rtol=1e-5, atol=2e-5 * wanted.abs().max().item())


def test_scores_of_any_size(kernels: str) -> None:
    """The largest score is taken off before the exponential, and shares that are nothing are nothing."""
    query, keys, values, _ = case(torch.float32, 1, 1, 2, 200, 64)
    lengths = torch.tensor([200])
    for scale in (100.0, 1e-4):
        wanted = cpu_decode_attention_reference(query, keys, values, lengths, scale=scale)
        assert torch.allclose(
            cpu_decode_attention(query, keys, values, lengths, scale=scale).double(), wanted, atol=1e-4
        )


def test_tokens_are_split_over_threads(kernels: str) -> None:
    query, keys, values, _ = case(torch.bfloat16, 1, 1, 4, 1500, 128)
    lengths, threads = torch.tensor([1500]), torch.get_num_threads()
    first = cpu_decode_attention(query, keys, values, lengths)
    wanted = cpu_decode_attention_reference(query, keys, values, lengths)
    assert (first.double() - wanted).norm() / wanted.norm() < 1e-5
    assert torch.equal(first, cpu_decode_attention(query, keys, values, lengths))
    try:
        torch.set_num_threads(1)
        assert torch.allclose(first, cpu_decode_attention(query, keys, values, lengths), atol=1e-6)
    finally:
        torch.set_num_threads(threads)


def test_dtypes_of_queries(kernels: str) -> None:
    query, keys, values, _ = case(torch.bfloat16, 2, 2, 2, 70, 64)
    lengths = torch.tensor([70, 3])
    got = cpu_decode_attention(query.bfloat16(), keys, values, lengths)
    wanted = cpu_decode_attention_reference(query.bfloat16(), keys, values, lengths)
    assert got.dtype == torch.bfloat16
    assert (got.double() - wanted).norm() / wanted.norm() < 4e-3


def test_slow_operators_are_not_used() -> None:
    """torch's attention of grouped queries and gathers from a paged cache, both far slower than attention itself."""
    names: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            names.append(func.overloadpacket.__name__)
            return func(*args, **kwargs or {})

    query, keys, values, _ = case(torch.bfloat16, 1, 2, 4, 70, 64)
    arguments = (query, keys, values, torch.tensor([70]))
    with Recorder():
        cpu_decode_attention(*arguments)
        attention._by_torch(*arguments, 0.1, None, None, 0)
    assert not any("scaled_dot" in name or "flash" in name or name in ("index", "gather", "repeat") for name in names)


def test_bad_input() -> None:
    query, keys, values, scales = case(torch.int8, 2, 2, 2, 32, 64)
    lengths = torch.tensor([32, 1])
    wrong: list[tuple[str, Any]] = [
        ("query: wanted", (query[0], keys, values, lengths)),
        ("keys: wanted", (query, keys.int(), values, lengths)),
        ("values: wanted int8", (query, keys, values.float(), lengths)),
        ("not contiguous", (query, keys.transpose(1, 2).contiguous().transpose(1, 2), values, lengths)),
        ("lengths: wanted int64", (query, keys, values, lengths.int())),
        (r"lengths \[33, 1\]", (query, keys, values, lengths + torch.tensor([1, 0]))),
        ("3 query heads over 2", (query[:, :3].contiguous(), keys, values, lengths)),
    ]
    for message, arguments in wrong:
        with pytest.raises(ValueError, match=message):
            cpu_decode_attention(*arguments, **scales)
    with pytest.raises(ValueError, match="8-bit caches have one"):
        cpu_decode_attention(query, keys, values, lengths)
    with pytest.raises(ValueError, match="plain caches have none"):
        cpu_decode_attention(query, keys.float(), values.float(), lengths, **scales)
    with pytest.raises(ValueError, match="head size 60"):
        cpu_decode_attention(
            query[..., :60].contiguous(), *(t[..., :60].contiguous() for t in (keys, values)), lengths, **scales
        )
    with pytest.raises(ValueError, match="window is -1"):
        cpu_decode_attention(query, keys, values, lengths, window=-1, **scales)


def paged(x: Tensor, kind: str) -> tuple[Paged, Tensor]:
    """x [pages, H, P, D] as pages of a kind, and what they stand for in float64."""
    D = x.shape[-1]
    if kind in ("float32", "bfloat16", "float16"):
        codes = x.to(getattr(torch, kind))
        return Paged(codes), codes.double()
    scale, shift = torch.rand(x.shape[:-1]) + 0.5, None
    if kind == "int8":
        codes = torch.randint(-128, 128, x.shape, dtype=torch.int8)
        values = codes.double()
    elif kind == "fp8":
        codes = (x * 100).to(torch.float8_e4m3fn)
        values = codes.double()
    else:
        bits = 8 if kind == "uint8" else 4
        codes = torch.randint(0, 1 << bits, x.shape, dtype=torch.uint8)
        values = codes.double() - (8 if kind == "int4" else 0)
        if kind != "int4":
            shift = torch.randint(-9, 300, scale.shape).float()
            values -= shift.double()[..., None]
        if bits == 4:
            low, high = codes.unflatten(-1, (D // 64, 2, 32)).unbind(-2)
            codes = (low | high << 4).flatten(-2)
    nibbles = kind.startswith("int4") or kind == "uint4"
    return Paged(codes.contiguous(), scale, shift, nibbles), values * scale.double()[..., None]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_pages(kernels: str, data: st.DataObject) -> None:
    """Keys and values of any two kinds, in pages that lie in no order."""
    kinds = st.sampled_from(["float32", "bfloat16", "float16", "int8", "fp8", "uint8", "int4", "uint4"])
    k_kind, v_kind = data.draw(kinds), data.draw(kinds)
    B, H = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2]))
    Q, D = data.draw(st.sampled_from([1, 3, 4, 8])), data.draw(st.sampled_from([64, 128]))
    P, n = data.draw(st.sampled_from([1, 16, 48, 64, 100])), data.draw(st.integers(1, 4))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    query = torch.randn(B, H * Q, D) * 0.02
    (keys, k), (values, v) = (paged(torch.randn(B * n + 2, H, P, D), kind) for kind in (k_kind, v_kind))
    table = torch.randperm(B * n + 2)[: B * n].view(B, n)
    lengths = torch.tensor([data.draw(st.integers(1, n * P)) for _ in range(B)])
    window = data.draw(st.sampled_from([0, 1, 50]))
    got = cpu_paged_attention(query, keys, values, table, lengths, int(lengths.max()), scale=0.1, window=window)
    if kernels == "torch alone":
        assert got is None
        return
    assert got is not None
    whole_k, whole_v = (x[table].transpose(1, 2).flatten(2, 3) for x in (k, v))
    wanted = cpu_decode_attention_reference(query, whole_k, whole_v, lengths, scale=0.1, window=window)
    assert torch.allclose(got.double(), wanted, rtol=1e-4, atol=2e-4 * wanted.abs().max().item())


def test_pages_of_no_kind(kernels: str) -> None:
    odd = Paged(torch.zeros(2, 1, 16, 12))
    assert odd.kind is None
    assert cpu_paged_attention(torch.zeros(1, 1, 12), odd, odd, torch.zeros(1, 1), torch.ones(1), 1, scale=1.0) is None
