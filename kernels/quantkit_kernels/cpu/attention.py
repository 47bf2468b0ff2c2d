"""Decode attention on a CPU: one new token for each sequence over its cached keys and values.

Keys and values lie contiguous for each sequence and head, [B, H, L, D]: gathering blocks of a paged cache costs a CPU
more than attention itself. All query heads of a key/value head are one pass over its cache (grouped-query attention
folded), so every cached number is read and decoded once. Tokens are split over threads where there are few heads; the
parts are added in their order. Without a compiler (see `build`) the same folding is done with torch's products.

Contract: query [B, Hq, D]; keys and values both bfloat16, float16, float32, int8 or float8 e4m3; the 8-bit kinds with
float32 scales [B, H, L], one for each token and head. lengths int64 [B], up to L; a sequence of length 0 gives zeros.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from quantkit_kernels.checks import check_same_device, check_tensor
from quantkit_kernels.cpu.build import address, library

KINDS = {torch.int8: 1, torch.float8_e4m3fn: 2, torch.bfloat16: 4, torch.float16: 5, torch.float32: 6}
QUERIES = (torch.float32, torch.bfloat16, torch.float16)
WIDTH = 16  # head sizes are multiples of it
SPLIT = 512  # tokens at least that a thread of its own is worth


def cpu_decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    window: int = 0,
) -> Tensor:
    """softmax(query keys^T scale) values over each sequence's last `window` tokens (0: all): [B, Hq, D] as query.

    scale  1 / sqrt(D) where None
    ValueError where shapes, dtypes or lengths do not fit.
    """
    check_cache(query, keys, values, lengths, k_scale, v_scale)
    if window < 0:
        raise ValueError(f"window is {window}")
    (B, Hq, D), (_, H, L, _) = query.shape, keys.shape
    scale = D**-0.5 if scale is None else scale
    lib = library()
    if lib is None:
        return _by_torch(query, keys, values, lengths, scale, k_scale, v_scale, window)
    Q, threads = Hq // H, torch.get_num_threads()
    q = (query.float() * scale).contiguous()
    out = torch.empty(B, Hq, D)
    kind = KINDS[keys.dtype]
    lib.quantkit_decode_attention(
        kind, kind, address(q), address(keys), address(k_scale), None, address(values), address(v_scale), None,
        None, address(lengths), address(out), B, H, Q, L, D, 0, window, _splits(B * H, L, threads), threads,
    )  # fmt: skip
    return out.to(query.dtype)


def _splits(heads: int, length: int, threads: int) -> int:
    """Parts of a sequence that are worth a thread each."""
    return max(1, min(-(-2 * threads // heads), length // SPLIT)) if 2 * threads > heads else 1


class Paged(NamedTuple):
    """Keys, or values, in pages: codes [pages, H, P, D] of a KINDS dtype, or uint8 with a shift (8 bits), or `nibbles`.

    nibbles  uint8 [pages, H, P, D / 2]: byte j of each 32 holds feature j of 64 in its low half, 32 + j in its high
             half; codes 0 .. 15, for -8 .. 7 where there is no shift
    scale, shift  float32 [pages, H, P]: a value is (code - shift) * scale; None: one, zero
    """

    codes: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    nibbles: bool = False

    @property
    def kind(self) -> int | None:
        """The kernel's number of it; None where it has none."""
        if self.nibbles:
            good = self.codes.dtype == torch.uint8 and self.codes.shape[-1] % 32 == 0
            return (0 if self.shift is not None else 7) if good else None
        if self.codes.shape[-1] % WIDTH:
            return None
        if self.codes.dtype == torch.uint8:
            return 3 if self.shift is not None else None
        return KINDS.get(self.codes.dtype)


def cpu_paged_attention(
    query: Tensor, keys: Paged, values: Paged, table: Tensor, lengths: Tensor, longest: int, *, scale: float,
    window: int = 0,
) -> Tensor | None:  # fmt: skip
    """As `cpu_decode_attention` over pages: token t of sequence b lies in page table[b, t // P] at t % P.

    query [B, Hq, D]; table int64 [B, n]; lengths int64 [B], up to n * P; longest: the largest of them. None where there
    is no compiled library, or none of its kinds is that of keys or of values. Nothing is checked: tables and lengths
    that fit are the caller's duty.
    """
    lib, k_kind, v_kind = library(), keys.kind, values.kind
    if lib is None or k_kind is None or v_kind is None:
        return None
    B, Hq, D = query.shape
    H, P = keys.codes.shape[1:3]
    threads = torch.get_num_threads()
    q = (query.float() * scale).contiguous()
    out = torch.empty(B, Hq, D)
    lib.quantkit_decode_attention(
        k_kind, v_kind, address(q), address(keys.codes), address(keys.scale), address(keys.shift),
        address(values.codes), address(values.scale), address(values.shift), address(table), address(lengths),
        address(out), B, H, Hq // H, P, D, table.shape[1], window, _splits(B * H, longest, threads), threads,
    )  # fmt: skip
    return out.to(query.dtype)


def check_cache(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> None:
    """ValueError unless all of it fits together."""
    check_tensor("query", query, QUERIES, (None, None, None))
    B, Hq, D = query.shape
    check_tensor("keys", keys, tuple(KINDS), (B, None, None, D))
    H, L = keys.shape[1:3]
    check_tensor("values", values, (keys.dtype,), (B, H, L, D))
    check_tensor("lengths", lengths, (torch.int64,), (B,))
    if H == 0 or Hq % H:
        raise ValueError(f"{Hq} query heads over {H} key/value heads")
    if D % WIDTH:
        raise ValueError(f"head size {D}: supported are multiples of {WIDTH}")
    eight = keys.dtype.itemsize == 1
    for name, tensor in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (tensor is not None) != eight:
            raise ValueError(f"{name}: {'8-bit caches have one' if eight else 'plain caches have none'}")
        if tensor is not None:
            check_tensor(name, tensor, (torch.float32,), (B, H, L))
    check_same_device(query=query, keys=keys, values=values, lengths=lengths, k_scale=k_scale, v_scale=v_scale)
    if query.device.type != "cpu":
        raise ValueError(f"query is on {query.device}: this kernel reads the CPU's memory")
    if not all(0 <= length <= L for length in lengths.tolist()):
        raise ValueError(f"lengths {lengths.tolist()[:8]} of caches with room for {L} tokens")


def cpu_decode_attention_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    window: int = 0,
) -> Tensor:
    """The definition, in float64, a sequence and a head at a time."""
    (B, Hq, D), H = query.shape, keys.shape[1]
    out = torch.zeros(B, Hq, D, dtype=torch.float64)
    for b in range(B):
        end = int(lengths[b])
        seen = slice(max(0, end - window) if window else 0, end)
        for h in range(Hq if end else 0):
            at = (b, h // (Hq // H), seen)
            k, v = keys[at].double(), values[at].double()
            k = k if k_scale is None else k * k_scale[at][:, None].double()
            v = v if v_scale is None else v * v_scale[at][:, None].double()
            out[b, h] = torch.softmax(k @ query[b, h].double() * (D**-0.5 if scale is None else scale), 0) @ v
    return out


def _by_torch(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float,
    k_scale: Tensor | None, v_scale: Tensor | None, window: int,
) -> Tensor:  # fmt: skip
    """Two batched products with the queries of a key/value head folded together; float32 sums."""
    (B, Hq, D), (_, H, L, _) = query.shape, keys.shape
    place = torch.arange(L)
    outside = place >= lengths[:, None]
    if window:
        outside |= place < lengths[:, None] - window
    q = (query.float() * scale).view(B, H, Hq // H, D)
    scores = q @ keys.float().mT
    if k_scale is not None:
        scores *= k_scale[:, :, None]
    shares = torch.softmax(scores.masked_fill_(outside[:, None, None], -torch.inf), -1).nan_to_num_(0.0)
    if v_scale is not None:
        shares *= v_scale[:, :, None]
    return (shares @ values.float()).view(B, Hq, D).to(query.dtype)
