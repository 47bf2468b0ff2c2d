"""Attention over a paged, possibly quantized KV cache: decode (split over the cached tokens) and ragged prefill.

Contract: q [T, Hq, D] bfloat16 or float16, the queries of all sequences behind each other; starts int32 [B + 1], where
sequence b's queries are starts[b] .. starts[b + 1]; lengths int32 [B], cached tokens including the queries' own;
block_table int32 [B, blocks of a sequence]; caches as in kv_write.py, kinds of keys and values chosen apart. Query i of
n stands at position lengths[b] - n + i and sees positions up to its own, with a window the last `window` of them.
A query that sees nothing gives zeros. Softmax and sums in float32.

The heads that share a KV head are rows of one tile, so each cached byte is read once. Cached codes are multiplied as
they are: a token's key scale multiplies its column of scores, its value scale its column of probabilities.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit_kernels.checks import check_same_device, check_tensor
from quantkit_kernels.common import WORKSPACE_FLOATS, check_gpu, compute_dtype, processors, use_asm, workspace
from quantkit_kernels.decode import kv_fp8, kv_int4, kv_int8
from quantkit_kernels.kv_write import BLOCK_SIZES, HEAD_SIZES, Cache, Kind, check_cache, read_cache

MAX_SPLITS = 64
LOG2E = 1.4426950408889634


def paged_attention_reference(
    q: Tensor, k: Cache, v: Cache, block_table: Tensor, lengths: Tensor, starts: Tensor, scale: float, window: int = 0
) -> Tensor:
    """The definition, in float64, one sequence after the other."""
    keys, values = read_cache(k), read_cache(v)
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    block_size = keys.shape[1]
    for b, length in enumerate(lengths.tolist()):
        first, stop = starts[b].item(), starts[b + 1].item()
        blocks = block_table[b, : -(-length // block_size)].long()
        repeat = q.shape[1] // keys.shape[2]
        k_T, v_T = (c[blocks].flatten(0, 1)[:length].repeat_interleave(repeat, 1) for c in (keys, values))
        scores = torch.einsum("qhd,thd->hqt", q[first:stop].double(), k_T) * scale
        position = torch.arange(length - (stop - first), length, device=q.device)[:, None]
        token = torch.arange(length, device=q.device)[None, :]
        seen = (token <= position) & (token > position - window if window else token >= 0)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)
        out[first:stop] = torch.einsum("hqt,thd->qhd", weights, v_T)
    return out


@triton.jit
def _load_half(codes_ptr, place, ok, d, KIND: tl.constexpr, HALF: tl.constexpr, HIGH: tl.constexpr, ASM: tl.constexpr,
               CDT: tl.constexpr):  # fmt: skip
    """[TOKENS, BLOCK_H] of one half of the head: elements, or codes as floats. Not for int4."""
    mask = ok[:, None] & (d < HALF)[None, :]
    pointers = codes_ptr + place[:, None] * (2 * HALF) + HIGH * HALF + d[None, :]
    codes = tl.load(pointers, mask=mask, other=0)
    if KIND == "16":
        return codes.to(CDT)
    elif KIND == "int8":
        return kv_int8(codes, ASM, CDT)
    else:
        return kv_fp8(codes, ASM, CDT)


@triton.jit
def _load_halves(codes_ptr, place, ok, d, KIND: tl.constexpr, HALF: tl.constexpr, ASM: tl.constexpr, CDT: tl.constexpr):
    """Both halves of the head."""
    if KIND == "int4":
        mask = ok[:, None] & (d < HALF)[None, :]
        return kv_int4(tl.load(codes_ptr + place[:, None] * HALF + d[None, :], mask=mask, other=0), ASM, CDT)
    else:
        low = _load_half(codes_ptr, place, ok, d, KIND, HALF, 0, ASM, CDT)
        high = _load_half(codes_ptr, place, ok, d, KIND, HALF, 1, ASM, CDT)
        return low, high


@triton.jit
def paged_attention_kernel(
    q_ptr, k_ptr, k_scale_ptr, v_ptr, v_scale_ptr, table_ptr, lengths_ptr, starts_ptr, out_ptr, partial_ptr,
    sequences, stride_q, stride_table, scale_log2, window,
    K_KIND: tl.constexpr, V_KIND: tl.constexpr, HEADS: tl.constexpr, REPEAT: tl.constexpr, HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, SPLITS: tl.constexpr, SINGLE: tl.constexpr, ASM: tl.constexpr, CDT: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Up to ROWS // REPEAT queries of one sequence, one KV head, one of SPLITS parts of the cached tokens.

    SINGLE: every sequence has one query, and tile b is sequence b. Else the sequence of a tile is searched for, tiles
    being dealt as if each sequence had one more than its queries fill.
    """
    PER_TILE: tl.constexpr = ROWS // REPEAT
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if SINGLE:
        sequence = tile
        first_tile = tile
    else:
        low, high = 0, sequences
        while high - low > 1:
            middle = (low + high) // 2
            begins = tl.load(starts_ptr + middle) // PER_TILE + middle
            low = tl.where(begins <= tile, middle, low)
            high = tl.where(begins <= tile, high, middle)
        sequence = low
        first_tile = tl.load(starts_ptr + low) // PER_TILE + low
    start, stop = tl.load(starts_ptr + sequence), tl.load(starts_ptr + sequence + 1)
    length = tl.load(lengths_ptr + sequence)
    first_query = start + (tile - first_tile) * PER_TILE

    row = tl.arange(0, ROWS)
    query = first_query + row // REPEAT
    row_ok = (query < stop) & (row < PER_TILE * REPEAT)
    position = length - stop + query
    d = tl.arange(0, BLOCK_H)
    q_head = head * REPEAT + row % REPEAT
    q_row = q_ptr + query.to(tl.int64) * stride_q + q_head * (2 * HALF)
    q_mask = row_ok[:, None] & (d < HALF)[None, :]
    q_low = tl.load(q_row[:, None] + d[None, :], mask=q_mask, other=0.0).to(CDT)
    q_high = tl.load(q_row[:, None] + HALF + d[None, :], mask=q_mask, other=0.0).to(CDT)
    if K_KIND == "int4":
        q_sum = tl.sum(q_low.to(tl.float32), 1) + tl.sum(q_high.to(tl.float32), 1)

    # the cached tokens any row of this tile sees, and of those this split's
    last = tl.minimum(length, length - stop + first_query + PER_TILE)
    last = tl.where(first_query < stop, last, 0)
    begin = tl.where(window > 0, tl.maximum(length - stop + first_query - window + 1, 0), 0) // TOKENS * TOKENS
    per_split = tl.cdiv(tl.cdiv(tl.maximum(last - begin, 0), SPLITS), TOKENS) * TOKENS
    begin += split * per_split
    end = tl.minimum(begin + per_split, last)

    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    added = tl.zeros((ROWS,), tl.float32)  # what int4 values' lows add to every feature
    acc_low = tl.zeros((ROWS, BLOCK_H), tl.float32)
    acc_high = tl.zeros((ROWS, BLOCK_H), tl.float32)
    for t in tl.range(begin, end, TOKENS):
        token = t + tl.arange(0, TOKENS)
        ok = token < end
        block = tl.load(table_ptr + sequence.to(tl.int64) * stride_table + token // BLOCK_SIZE, mask=ok, other=0)
        place = (block.to(tl.int64) * BLOCK_SIZE + token % BLOCK_SIZE) * HEADS + head
        k_low, k_high = _load_halves(k_ptr, place, ok, d, K_KIND, HALF, ASM, CDT)
        scores = tl.dot(q_low, k_low.T)
        scores = tl.dot(q_high, k_high.T, scores)
        if K_KIND == "int4":
            k_scale = tl.load(k_scale_ptr + place * 2, mask=ok, other=0.0).to(tl.float32)
            k_least = tl.load(k_scale_ptr + place * 2 + 1, mask=ok, other=0.0).to(tl.float32)
            scores = scores * k_scale[None, :] + q_sum[:, None] * k_least[None, :]
        elif K_KIND != "16":
            scores *= tl.load(k_scale_ptr + place, mask=ok, other=0.0)[None, :]
        seen = (token[None, :] <= position[:, None]) & ok[None, :]
        if window > 0:
            seen = seen & (token[None, :] > (position - window)[:, None])
        scores = tl.where(seen, scores * scale_log2, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a row may see none of these tokens
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(peak - base)
        peak = new_peak
        total = total * fade + tl.sum(weights, 1)
        v_low, v_high = _load_halves(v_ptr, place, ok, d, V_KIND, HALF, ASM, CDT)
        if V_KIND == "int4":
            v_least = tl.load(v_scale_ptr + place * 2 + 1, mask=ok, other=0.0).to(tl.float32)
            added = added * fade + tl.sum(weights * v_least[None, :], 1)
            weights *= tl.load(v_scale_ptr + place * 2, mask=ok, other=0.0).to(tl.float32)[None, :]
        elif V_KIND != "16":
            weights *= tl.load(v_scale_ptr + place, mask=ok, other=0.0)[None, :]
        weights = weights.to(CDT)
        acc_low = tl.dot(weights, v_low, acc_low * fade[:, None])
        acc_high = tl.dot(weights, v_high, acc_high * fade[:, None])
    acc_low += added[:, None]
    acc_high += added[:, None]

    if SPLITS == 1:
        inverse = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))
        o_row = out_ptr + (query.to(tl.int64) * (HEADS * REPEAT) + q_head) * (2 * HALF)
        element: tl.constexpr = out_ptr.dtype.element_ty
        tl.store(o_row[:, None] + d[None, :], (acc_low * inverse[:, None]).to(element), mask=q_mask)
        tl.store(o_row[:, None] + HALF + d[None, :], (acc_high * inverse[:, None]).to(element), mask=q_mask)
    else:
        part = (query.to(tl.int64) * (HEADS * REPEAT) + q_head) * SPLITS + split
        p_row = partial_ptr + part * (2 * HALF + 2)
        tl.store(p_row[:, None] + d[None, :], acc_low, mask=q_mask)
        tl.store(p_row[:, None] + HALF + d[None, :], acc_high, mask=q_mask)
        tl.store(p_row + 2 * HALF, peak, mask=row_ok)
        tl.store(p_row + 2 * HALF + 1, total, mask=row_ok)


@triton.jit
def combine_kernel(
    partial_ptr, out_ptr, D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr
):
    """One query and head: the parts of all splits, each brought to the largest peak."""
    row = tl.program_id(0).to(tl.int64)
    s, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    parts = partial_ptr + (row * SPLITS + s) * (D + 2)
    peak = tl.load(parts + D, mask=s < SPLITS, other=float("-inf"))
    top = tl.max(peak, 0)
    fade = tl.exp2(peak - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(tl.load(parts + D + 1, mask=s < SPLITS, other=0.0) * fade, 0)
    acc = tl.load(parts[:, None] + d[None, :], mask=(s < SPLITS)[:, None] & (d < D)[None, :], other=0.0)
    out = tl.sum(acc * fade[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + row * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)


def splits_of(rows: int, programs: int, longest: int, head_size: int, device: torch.device) -> int:
    """A power of two of parts, from sizes the host knows: enough programs for the GPU, at least 256 tokens a part."""
    wanted = min(4 * processors(device) // max(programs, 1), longest // 256, MAX_SPLITS)
    wanted = min(wanted, WORKSPACE_FLOATS // (rows * (head_size + 2)))
    return 1 << max(wanted, 1).bit_length() - 1


def launch(
    q: Tensor, k: Cache, v: Cache, block_table: Tensor, lengths: Tensor, starts: Tensor, out: Tensor, *,
    scale: float, window: int, most_queries: int, splits: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention into out [T, Hq, D]; nothing is checked, nothing allocated, nothing read back."""
    (T, q_heads, D), B, device = q.shape, lengths.shape[0], q.device
    if T == 0:
        return out
    _, block_size, heads = k.codes.shape[:3]
    repeat, single = q_heads // heads, most_queries == 1
    rows = max(16, triton.next_power_of_2(repeat)) if single else max(64, triton.next_power_of_2(repeat))
    tiles = B if single else T // (rows // repeat) + B
    if splits is None:
        longest = block_table.shape[1] * block_size
        splits = splits_of(T * q_heads, tiles * heads, longest, D, device)
    partial = workspace(device)[0] if splits > 1 else out
    paged_attention_kernel[(tiles, heads, splits)](
        q, k.codes, k.scale if k.scale is not None else k.codes, v.codes, v.scale if v.scale is not None else v.codes,
        block_table, lengths, starts, out, partial, B, q.stride(0), block_table.stride(0), scale * LOG2E, window,
        **specialization(k.kind, v.kind, heads, repeat, D, block_size, splits, single),
        ASM=use_asm(device), CDT=compute_dtype(q.dtype), ROWS=rows, num_warps=4, num_stages=2, enable_fp_fusion=True,
    )  # fmt: skip
    if splits > 1:
        block_d = triton.next_power_of_2(D)
        combine_kernel[(T * q_heads,)](
            partial, out, D, splits, block_d, triton.next_power_of_2(splits), num_warps=2, enable_fp_fusion=True
        )
    return out


def specialization(
    k_kind: Kind, v_kind: Kind, heads: int, repeat: int, head_size: int, block_size: int, splits: int, single: bool
) -> dict:
    """The kernel's constants that follow from the caches."""
    return {
        "K_KIND": k_kind, "V_KIND": v_kind, "HEADS": heads, "REPEAT": repeat, "HALF": head_size // 2,
        "BLOCK_SIZE": block_size, "SPLITS": splits, "SINGLE": single, "TOKENS": 64 if head_size <= 128 else 32,
        "BLOCK_H": max(16, triton.next_power_of_2(head_size // 2)),
    }  # fmt: skip


@torch.library.custom_op("quantkit_kernels::paged_attention", mutates_args=())
def paged_attention_op(
    q: Tensor, k_codes: Tensor, k_scale: Tensor | None, v_codes: Tensor, v_scale: Tensor | None, block_table: Tensor,
    lengths: Tensor, starts: Tensor, k_kind: str, v_kind: str, scale: float, window: int, most_queries: int,
) -> Tensor:  # fmt: skip
    """The operator torch.compile and export see; `paged_attention` is its checked front."""
    k, v = Cache(k_codes, k_scale, k_kind), Cache(v_codes, v_scale, v_kind)  # type: ignore
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return launch(q, k, v, block_table, lengths, starts, out, scale=scale, window=window, most_queries=most_queries)


@paged_attention_op.register_fake
def _(q, k_codes, k_scale, v_codes, v_scale, block_table, lengths, starts, k_kind, v_kind, scale, window, most_queries):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def paged_attention(
    q: Tensor, k: Cache, v: Cache, block_table: Tensor, lengths: Tensor, starts: Tensor, *,
    most_queries: int, scale: float | None = None, window: int = 0,
) -> Tensor:  # fmt: skip
    """[T, Hq, D] in q's dtype. most_queries: the largest number of queries of a sequence, known to the host; 1: decode.

    scale: 1 / sqrt(D) where None; window: 0 for all tokens. ValueError where shapes, dtypes or devices do not fit.
    """
    if q.dim() != 3 or q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"paged_attention: q is {q.dtype} {tuple(q.shape)}; supported: bfloat16 or float16 [T, Hq, D]")
    T, q_heads, D = q.shape
    if q.stride(2) != 1 or (q_heads > 1 and q.stride(1) != D):
        raise ValueError(f"paged_attention: q's heads are not contiguous, strides {q.stride()}")
    if D not in HEAD_SIZES:
        raise ValueError(f"paged_attention: head size is {D}; supported: multiples of 16 from 16 to 256")
    sizes = check_cache("key", k, D)
    if check_cache("value", v, D) != sizes:
        raise ValueError(f"key cache {tuple(k.codes.shape)} and value cache {tuple(v.codes.shape)}")
    _, block_size, heads = sizes
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"paged_attention: block size is {block_size}; supported: {BLOCK_SIZES}")
    if q_heads % heads:
        raise ValueError(f"paged_attention: {q_heads} query heads are no multiple of {heads} KV heads")
    B = lengths.shape[0]
    check_tensor("block_table", block_table, (torch.int32,), (B, None))
    check_tensor("lengths", lengths, (torch.int32,), (B,))
    check_tensor("starts", starts, (torch.int32,), (B + 1,))
    if most_queries < 1 or window < 0:
        raise ValueError(f"paged_attention: {most_queries=}, {window=}")
    if most_queries == 1 and T != B:
        raise ValueError(f"paged_attention: {T} queries of {B} sequences, yet most_queries is 1")
    check_same_device(q=q, k=k.codes, v=v.codes, block_table=block_table, lengths=lengths, starts=starts)
    check_gpu("paged_attention", q)
    return paged_attention_op(
        q, k.codes, k.scale, v.codes, v.scale, block_table, lengths, starts, k.kind, v.kind,
        D**-0.5 if scale is None else scale, window, most_queries,
    )  # fmt: skip
