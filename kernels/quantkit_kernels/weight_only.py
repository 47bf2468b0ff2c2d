"""The product all weight-only formats share: y_MN = x_MK @ W_NK^T with W decoded on the way to the tensor cores.

Operands are swapped, y^T = W x^T: the decoded weight is wgmma's register operand and never passes through shared
memory, and few tokens fill the short side of the tile. Each weight is multiplied by its scale and rounded before it
meets x, for any number of tokens: the definition of W is `layout.rounded_weight`. K is split over programs until the
GPU is full; the parts are added in a fixed order (common.reduce_splits), so a result never depends on timing.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit_kernels.checks import check_same_device
from quantkit_kernels.common import TL_DTYPES, check_gpu, compute_dtype, reduce_splits, use_asm, workspace
from quantkit_kernels.configs import WeightOnlyConfig, weight_only_config
from quantkit_kernels.decode import (
    FP4_ASM_FACTOR,
    fp4_planes,
    fp8_planes,
    int4_planes,
    int8_planes,
    join4,
    join8,
    plane_mul,
    plane_sub,
)
from quantkit_kernels.layout import BLOCK_K, STEP_K, PackedWeight, blocks, scale_columns


@triton.jit
def _spread4(tile, ROWS: tl.constexpr):
    even, odd = tl.split(tile.reshape(ROWS, 2, 2))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _spread8(tile, ROWS: tl.constexpr):
    even, odd = tl.split(tile.reshape(ROWS, 4, 2))
    a, c, e, g = _spread4(even, ROWS)
    b, d, f, h = _spread4(odd, ROWS)
    return a, b, c, d, e, f, g, h


@triton.jit
def _spread(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The columns of [ROWS, COLS] as a tuple of COLS tensors [ROWS]; COLS is 2, 4, 8 or 16."""
    if COLS == 2:
        return tl.split(tile)
    elif COLS == 4:
        return _spread4(tile, ROWS)
    elif COLS == 8:
        return _spread8(tile, ROWS)
    else:
        even, odd = tl.split(tile.reshape(ROWS, 8, 2))
        a, c, e, g, i, k, m, o = _spread8(even, ROWS)
        b, d, f, h, j, q, n, p = _spread8(odd, ROWS)
        return a, b, c, d, e, f, g, h, i, j, k, q, m, n, o, p


@triton.jit
def _load(pointers, mask, WHOLE: tl.constexpr):
    """Read once, never again: the weight, its scales and its zero points. What is masked is zero."""
    if WHOLE:
        return tl.load(pointers, eviction_policy="evict_first")
    return tl.load(pointers, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def decode_block(
    q, scales, zeros, HALF: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr,
    CHANNEL: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr, ASM: tl.constexpr, CDT: tl.constexpr,
    DT: tl.constexpr, SDT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Words [ROWS, P] -> weights [ROWS, 128]; `scales` and `zeros` hold the groups of the whole step of two blocks.

    CHANNEL: there is one scale, for all of them.
    """
    PLANES: tl.constexpr = 8 if FORMAT == "int4" or FORMAT == "fp4" else 4
    WIDTH: tl.constexpr = 128 // PLANES
    if FORMAT == "int4":
        planes = int4_planes(q, OFFSET, ASM, CDT)
    elif FORMAT == "int8":
        planes = int8_planes(q, ASM, CDT)
    elif FORMAT == "fp8":
        planes = fp8_planes(q, ASM, CDT)
    else:
        planes = fp4_planes(q, ASM, CDT)
    done = ()
    for i in tl.static_range(PLANES):
        plane = planes[i]
        if ZERO:
            plane = plane_sub(plane, zeros[(HALF * PLANES + i) * WIDTH // GROUP][:, None], ASM, CDT)
        if SCALE:
            scale = scales[0 if CHANNEL else (HALF * PLANES + i) * WIDTH // GROUP]
            plane = plane_mul(plane, scale[:, None], ASM, CDT, DT, SDT)
        done = done + (plane,)  # noqa: RUF005
    if PLANES == 8:
        return join8(done[0], done[1], done[2], done[3], done[4], done[5], done[6], done[7], ROWS, 128)
    else:
        return join4(done[0], done[1], done[2], done[3], ROWS, 128)


@triton.jit
def weight_only_kernel(
    x_ptr, words_ptr, scale_ptr, zero_ptr, row_scale_ptr, y_ptr, partial_ptr, count_ptr, M, N, stride_x,
    K: tl.constexpr, STEPS: tl.constexpr, SPLITS: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr,
    SCALE: tl.constexpr, CHANNEL: tl.constexpr, ZERO: tl.constexpr, ROW_SCALE: tl.constexpr, SCALE_SUMS: tl.constexpr,
    EVEN_N: tl.constexpr, ASM: tl.constexpr, CDT: tl.constexpr, DT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_N, BLOCK_M] tile of y^T over one of SPLITS parts of K.

    SCALE_SUMS (groups of 128): scales multiply sums, not weights. CHANNEL: scale_ptr has one scale a row.
    """
    P: tl.constexpr = 16 if FORMAT == "int4" or FORMAT == "fp4" else 32
    GROUPS: tl.constexpr = 256 // GROUP
    PER_SPLIT: tl.constexpr = (STEPS + SPLITS - 1) // SPLITS
    EVEN: tl.constexpr = K % 256 == 0 and STEPS % SPLITS == 0
    OFFSET: tl.constexpr = -8 if not ZERO else 1024 if zero_ptr.dtype.element_ty == tl.float16 else 128
    FACTOR: tl.constexpr = FP4_ASM_FACTOR if FORMAT == "fp4" and ASM and tl.bfloat16 == CDT else 1.0
    SDT: tl.constexpr = scale_ptr.dtype.element_ty
    tile_n, split, tile_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    p = tl.arange(0, P)
    g = tl.arange(0, GROUPS)
    k = tl.arange(0, 128)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    x_tile = x_ptr + m[None, :].to(tl.int64) * stride_x + k[:, None]
    words_tile = words_ptr + n[:, None] * P + p[None, :]
    groups_tile = n[:, None] * GROUPS + g[None, :]
    if CHANNEL:
        row = tl.load(scale_ptr + n, mask=n < N, other=0)
        row = row.to(CDT if SDT == DT else tl.float32)
    if SCALE_SUMS:
        first = tl.minimum(split * PER_SPLIT, STEPS - 1)
        ahead = tl.load(scale_ptr + first.to(tl.int64) * N * GROUPS + groups_tile, mask=(n < N)[:, None], other=0)
    for i in tl.range(0, PER_SPLIT):
        step = split * PER_SPLIT + i
        scales, zeros = (), ()
        rows = n[:, None] < tl.where(step < STEPS, N, 0)  # the last split may reach beyond K
        if SCALE_SUMS:  # no operand of the product, so the compiler would not load it ahead
            scales = _spread(ahead, BLOCK_N, GROUPS)
            after = tl.minimum(step + 1, STEPS - 1)
            ahead = _load(scale_ptr + after.to(tl.int64) * N * GROUPS + groups_tile, rows, EVEN and EVEN_N)
        elif CHANNEL:
            scales = (row,)
        elif SCALE:
            tile = _load(scale_ptr + step.to(tl.int64) * N * GROUPS + groups_tile, rows, EVEN and EVEN_N)
            if FACTOR == 1.0:
                tile = tile.to(CDT if SDT == DT else tl.float32)
            else:
                tile = (tile.to(tl.float32) * FACTOR).to(tl.bfloat16)
            scales = _spread(tile, BLOCK_N, GROUPS)
        if ZERO:
            tile = _load(zero_ptr + step.to(tl.int64) * N * GROUPS + groups_tile, rows, EVEN and EVEN_N)
            zeros = _spread(tile.to(CDT), BLOCK_N, GROUPS)
        for half in tl.static_range(2):
            q = _load(words_tile + (step * 2 + half).to(tl.int64) * N * P, rows, EVEN and EVEN_N)
            start = step * 256 + half * 128
            x_mask = (m < M)[None, :]
            if not EVEN:
                x_mask = x_mask & ((start + k) < K)[:, None]
            x = tl.load(x_tile + start, mask=x_mask, other=0.0, eviction_policy="evict_last").to(CDT)
            w = decode_block(
                q, scales, zeros, half, FORMAT, GROUP, SCALE and not SCALE_SUMS, CHANNEL, ZERO, OFFSET, ASM, CDT, DT,
                SDT, BLOCK_N,
            )  # fmt: skip
            if SCALE_SUMS:
                acc += tl.dot(w, x) * scales[half][:, None].to(tl.float32)
            else:
                acc = tl.dot(w, x, acc)
    finished = True
    if SPLITS > 1:
        tile = tile_m * tl.num_programs(0) + tile_n
        acc, finished = reduce_splits(acc, partial_ptr, count_ptr, tile, split, SPLITS, BLOCK_N, BLOCK_M)
    if finished:
        if FACTOR != 1.0:
            acc *= 512.0
        if ROW_SCALE:
            acc *= tl.load(row_scale_ptr + n, mask=n < N, other=0.0)[:, None]
        y = y_ptr + m[None, :].to(tl.int64) * N + n[:, None]
        tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit
def decode_kernel(
    words_ptr, scale_ptr, zero_ptr, row_scale_ptr, w_ptr, N,
    K: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, CHANNEL: tl.constexpr,
    ZERO: tl.constexpr, ROW_SCALE: tl.constexpr, ASM: tl.constexpr, CDT: tl.constexpr, DT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """W [BLOCK_N rows, one step of 256 columns], decoded."""
    P: tl.constexpr = 16 if FORMAT == "int4" or FORMAT == "fp4" else 32
    GROUPS: tl.constexpr = 256 // GROUP
    OFFSET: tl.constexpr = -8 if not ZERO else 1024 if zero_ptr.dtype.element_ty == tl.float16 else 128
    FACTOR: tl.constexpr = FP4_ASM_FACTOR if FORMAT == "fp4" and ASM and tl.bfloat16 == CDT else 1.0
    SDT: tl.constexpr = scale_ptr.dtype.element_ty
    step = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = (n < N)[:, None]
    groups_tile = step * N * GROUPS + n[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    scales, zeros = (), ()
    if CHANNEL:
        scales = (tl.load(scale_ptr + n, mask=n < N, other=0).to(CDT if SDT == DT else tl.float32),)
    elif SCALE:
        tile = _load(scale_ptr + groups_tile, rows, False)
        if FACTOR == 1.0:
            tile = tile.to(CDT if SDT == DT else tl.float32)
        else:
            tile = (tile.to(tl.float32) * FACTOR).to(tl.bfloat16)
        scales = _spread(tile, BLOCK_N, GROUPS)
    if ZERO:
        zeros = _spread(_load(zero_ptr + groups_tile, rows, False).to(CDT), BLOCK_N, GROUPS)
    for half in tl.static_range(2):
        words = words_ptr + (step * 2 + half) * N * P + n[:, None] * P + tl.arange(0, P)[None, :]
        q = _load(words, rows, False)
        w = decode_block(
            q, scales, zeros, half, FORMAT, GROUP, SCALE, CHANNEL, ZERO, OFFSET, ASM, CDT, DT, SDT, BLOCK_N
        )
        if FACTOR != 1.0 or ROW_SCALE:
            w = w.to(tl.float32)
        if FACTOR != 1.0:
            w *= 512.0
        if ROW_SCALE:
            w *= tl.load(row_scale_ptr + n, mask=n < N, other=0.0)[:, None]
        k = step * 256 + half * 128 + tl.arange(0, 128)
        mask = rows & (k < K)[None, :]
        tl.store(w_ptr + n[:, None].to(tl.int64) * K + k[None, :], w.to(w_ptr.dtype.element_ty), mask=mask)


def _specialization(weight: PackedWeight) -> dict:
    """The constants of both kernels that follow from the weight."""
    return {
        "K": weight.in_features,
        "FORMAT": weight.format,
        "GROUP": weight.group_size or BLOCK_K,
        "SCALE": weight.scale is not None,
        "CHANNEL": weight.scale is not None and weight.scale.dim() == 1,
        "ZERO": weight.zero is not None,
        "ROW_SCALE": weight.row_scale is not None,
        "ASM": use_asm(weight.words.device),
        "CDT": compute_dtype(weight.dtype),
        "DT": TL_DTYPES[weight.dtype],
    }


def decode_weight(weight: PackedWeight, out_NK: Tensor | None = None) -> Tensor:
    """The weight [N, K] in its dtype, decoded by a kernel (into out_NK where given); float32 where sums are scaled."""
    if weight.sums:
        scale_NK = scale_columns(weight).float()
        scale_NK = scale_NK if weight.row_scale is None else scale_NK * weight.row_scale[:, None]
        return decode_weight(replace(weight, scale=None, row_scale=None, sums=False)).float() * scale_NK
    N, K = weight.out_features, weight.in_features
    device = weight.words.device
    if out_NK is None:
        out_NK = torch.empty(N, K, dtype=weight.dtype, device=device)
    absent = weight.words
    grid = (triton.cdiv(N, 32), blocks(K) * BLOCK_K // STEP_K)
    decode_kernel[grid](
        weight.words, weight.scale if weight.scale is not None else absent,
        weight.zero if weight.zero is not None else absent,
        weight.row_scale if weight.row_scale is not None else absent, out_NK, N,
        **_specialization(weight), BLOCK_N=32, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out_NK


def linear(name: str, x: Tensor, weight: PackedWeight) -> Tensor:
    """x [..., K] @ W^T -> [..., N] through the operator (sums: float32); ValueError unless x fits the weight."""
    N, K = weight.out_features, weight.in_features
    if x.dtype != weight.dtype:
        raise ValueError(f"{name}: x is {x.dtype}, the weight was packed for {weight.dtype}")
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"{name}: x is {tuple(x.shape)}, the weight is {N}x{K}: wanted [..., {K}]")
    check_same_device(x=x, words=weight.words, scale=weight.scale, row_scale=weight.row_scale)
    check_gpu(name, x)
    y_MN = weight_only_op(
        x.reshape(-1, K), weight.words, weight.scale, weight.zero, weight.row_scale, weight.format, weight.group_size,
        weight.sums,
    )  # fmt: skip
    return y_MN.reshape(*x.shape[:-1], N)


@torch.library.custom_op("quantkit_kernels::weight_only", mutates_args=())
def weight_only_op(
    x_MK: Tensor,
    words: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    row_scale: Tensor | None,
    format: str,
    group_size: int,
    sums: bool = False,
) -> Tensor:
    """The operator torch.compile and export see; `linear` is its checked front."""
    if x_MK.stride(1) != 1:
        x_MK = x_MK.contiguous()
    weight = PackedWeight(words, scale, zero, row_scale, format, x_MK.shape[1], group_size, x_MK.dtype, sums)  # type: ignore
    return launch(x_MK, weight, x_MK.new_empty(x_MK.shape[0], words.shape[1], dtype=torch.float32 if sums else None))


@weight_only_op.register_fake
def _(x_MK, words, scale, zero, row_scale, format, group_size, sums=False):
    return x_MK.new_empty(x_MK.shape[0], words.shape[1], dtype=torch.float32 if sums else None)


def launch(x_MK: Tensor, weight: PackedWeight, y_MN: Tensor, config: WeightOnlyConfig | None = None) -> Tensor:
    """y_MN = x_MK @ W^T by the config (the device's own where None). Rows of x may be strided; nothing is checked."""
    M, N, K = x_MK.shape[0], weight.out_features, weight.in_features
    device = x_MK.device
    if M == 0:
        return y_MN
    if config is None:
        config = weight_only_config(weight.format, M, N, K, device)
    if config.dequantize and weight.sums:  # cuBLAS would take a rounded weight
        config = WeightOnlyConfig(64, 128, 1, 8, 2)
    if config.dequantize:
        return torch.mm(x_MK, decode_weight(weight).T, out=y_MN)
    absent = weight.words
    partial, count = workspace(device) if config.splits > 1 else (y_MN, absent)
    grid = (triton.cdiv(N, config.block_n), config.splits, triton.cdiv(M, config.block_m))
    weight_only_kernel[grid](
        x_MK, weight.words, weight.scale if weight.scale is not None else absent,
        weight.zero if weight.zero is not None else absent,
        weight.row_scale if weight.row_scale is not None else absent,
        y_MN, partial, count, M, N, x_MK.stride(0),
        **_specialization(weight), STEPS=blocks(K) // 2, SPLITS=config.splits,
        SCALE_SUMS=weight.scale is not None and weight.sums,
        EVEN_N=N % config.block_n == 0, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return y_MN
