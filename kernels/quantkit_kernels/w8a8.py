"""W8A8: y = x W^T with both operands in 8 bits on the 8-bit tensor cores, scales in the epilogue.

Contract, elements [M, K] and [N, K] contiguous, y in bfloat16, float16 or float32:
  int8       x_scale float32 [M], w_scale float32 [N]; sums are int32, exact (K <= 131072), then scaled in float32
  fp8        float8_e4m3fn, the same scales; float32 sums, carried over from the tensor cores every 128 columns
  fp8_block  x_scale float32 [M, ceil(K / 128)] (any strides), w_scale float32 [ceil(N / 128), ceil(K / 128)];
             the sum of each 128 columns is scaled and added in float32

Few tokens are computed as y^T = W x^T: they fill the short side of the tile and stay on the 8-bit tensor cores, where
the plain order would fall back to 16 bits. Without native float8 (before sm_89, AMD, the interpreter) codes are
decoded to float16, which holds them exactly.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit_kernels.checks import check_same_device, check_tensor
from quantkit_kernels.common import INTERPRET, check_gpu, native_fp8, reduce_splits, workspace
from quantkit_kernels.configs import GemmConfig, gemm_config
from quantkit_kernels.decode import e4m3_value

ELEMENTS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "fp8_block": torch.float8_e4m3fn}
BLOCK = 128
MAX_K = 131072  # 2**31 / 128**2


def w8a8_reference(x_MK: Tensor, x_scale: Tensor, w_NK: Tensor, w_scale: Tensor, kind: str) -> Tensor:
    """The definition, in float64."""
    x, w = x_MK.double(), w_NK.double()
    if kind == "fp8_block":
        (_, K), N = x.shape, w.shape[0]
        x = x * x_scale.double().repeat_interleave(BLOCK, 1)[:, :K]
        w = w * w_scale.double().repeat_interleave(BLOCK, 0)[:N].repeat_interleave(BLOCK, 1)[:, :K]
        return x @ w.T
    return (x @ w.T) * x_scale.double()[:, None] * w_scale.double()[None, :]


@triton.jit
def _load_codes(pointers, mask, WHOLE: tl.constexpr, DECODE: tl.constexpr, CDT: tl.constexpr):
    """Elements; DECODE: from the bytes of float8 codes. What is masked is zero."""
    codes = tl.load(pointers) if WHOLE else tl.load(pointers, mask=mask, other=0.0)
    if DECODE:
        wide = codes.to(tl.int32)
        return e4m3_value(wide >> 7, wide & 127, CDT)
    else:
        return codes


@triton.jit
def w8a8_kernel(
    x_ptr, w_ptr, x_scale_ptr, w_scale_ptr, y_ptr, partial_ptr, count_ptr, M, N, stride_sm, stride_sg,
    K: tl.constexpr, KIND: tl.constexpr, DECODE: tl.constexpr, CDT: tl.constexpr, SPLITS: tl.constexpr,
    EVEN_N: tl.constexpr, PROMOTE: tl.constexpr, SWAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of y over one of SPLITS parts of K; SWAP: computed as y^T = W x^T."""
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    PER_SPLIT: tl.constexpr = (STEPS + SPLITS - 1) // SPLITS
    EVEN_K: tl.constexpr = K % BLOCK_K == 0 and STEPS % SPLITS == 0
    ACC: tl.constexpr = tl.int32 if KIND == "int8" else tl.float32
    # tiles in bands of 8 along M, so that those in flight share rows of x and of W
    tiles_n, tiles_m = tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
    tile, split = tl.program_id(0), tl.program_id(1)
    band = tile // (8 * tiles_n) * 8
    height = tl.minimum(tiles_m - band, 8)
    tile_m = band + tile % (8 * tiles_n) % height
    tile_n = tile % (8 * tiles_n) // height

    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    w_tile = w_ptr + n[:, None].to(tl.int64) * K + k[None, :]
    x_tile = x_ptr + m[:, None].to(tl.int64) * K + k[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), ACC)
    x_scales = x_scale_ptr + m * stride_sm
    w_scales = w_scale_ptr + tile_n * BLOCK_N // 128 * STEPS
    if KIND == "fp8_block":  # loaded a step ahead: no operand of the product, so the compiler would not
        first = tl.minimum(split * PER_SPLIT, STEPS - 1)
        x_ahead = tl.load(x_scales + first * stride_sg, mask=m < M, other=0.0)
        w_ahead = tl.load(w_scales + first)
    for i in tl.range(0, PER_SPLIT):
        step = split * PER_SPLIT + i
        left = K - step * BLOCK_K
        w = _load_codes(w_tile + step * BLOCK_K, (n < N)[:, None] & (k < left)[None, :], EVEN_K and EVEN_N, DECODE, CDT)
        x = _load_codes(x_tile + step * BLOCK_K, (m < M)[:, None] & (k < left)[None, :], False, DECODE, CDT)
        if SWAP:
            a, b = w, x.T
        else:
            a, b = x, w.T
        if KIND == "int8":
            acc = tl.dot(a, b, acc, out_dtype=tl.int32)
        elif KIND == "fp8":
            acc = tl.dot(a, b, acc, max_num_imprecise_acc=PROMOTE)
        else:
            scale = x_ahead * w_ahead
            after = tl.minimum(step + 1, STEPS - 1)
            x_ahead = tl.load(x_scales + after * stride_sg, mask=m < M, other=0.0)
            w_ahead = tl.load(w_scales + after)
            acc += tl.dot(a, b) * (scale[None, :] if SWAP else scale[:, None])
    finished = True
    if SPLITS > 1:
        acc, finished = reduce_splits(acc, partial_ptr, count_ptr, tile, split, SPLITS, acc.shape[0], acc.shape[1])
    if finished:
        y = acc.to(tl.float32)
        if SWAP:
            y = y.T
        if KIND != "fp8_block":
            y *= tl.load(x_scale_ptr + m, mask=m < M, other=0.0)[:, None]
            y *= tl.load(w_scale_ptr + n, mask=n < N, other=0.0)[None, :]
        pointers = y_ptr + m[:, None].to(tl.int64) * N + n[None, :]
        tl.store(pointers, y.to(y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def order(kind: str, config: GemmConfig, decode: bool) -> dict:
    """Which operand goes first, and after how many columns float8 sums leave the tensor cores."""
    promote = 0 if decode or kind != "fp8" else BLOCK
    return {"SWAP": config.block_m <= 64, "PROMOTE": promote}


def launch(
    x_MK: Tensor,
    x_scale: Tensor,
    w_NK: Tensor,
    w_scale: Tensor,
    kind: str,
    y_MN: Tensor,
    config: GemmConfig | None = None,
) -> Tensor:
    """y_MN by the config (the device's own where None); nothing is checked, nothing allocated."""
    (M, K), N, device = x_MK.shape, w_NK.shape[0], x_MK.device
    if M == 0:
        return y_MN
    decode = kind != "int8" and not native_fp8(device)
    if config is None:
        config = gemm_config(kind, M, N, K, device, decode)
    if decode:
        x_MK, w_NK = x_MK.view(torch.uint8), w_NK.view(torch.uint8)
    partial, count = workspace(device) if config.splits > 1 else (y_MN, x_MK)
    grid = (triton.cdiv(N, config.block_n) * triton.cdiv(M, config.block_m), config.splits)
    w8a8_kernel[grid](
        x_MK, w_NK, x_scale, w_scale, y_MN, partial, count, M, N,
        x_scale.stride(0), x_scale.stride(1) if kind == "fp8_block" else 0,
        K=K, KIND=kind, DECODE=decode, CDT=tl.float32 if INTERPRET else tl.float16, SPLITS=config.splits,
        EVEN_N=N % config.block_n == 0, **order(kind, config, decode),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return y_MN


@torch.library.custom_op("quantkit_kernels::w8a8", mutates_args=())
def w8a8_op(x_MK: Tensor, x_scale: Tensor, w_NK: Tensor, w_scale: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """The operator torch.compile and export see; `w8a8` is its checked front."""
    y_MN = x_scale.new_empty(x_MK.shape[0], w_NK.shape[0], dtype=dtype)
    return launch(x_MK, x_scale, w_NK, w_scale, kind, y_MN)


@w8a8_op.register_fake
def _(x_MK, x_scale, w_NK, w_scale, kind, dtype):
    return x_scale.new_empty(x_MK.shape[0], w_NK.shape[0], dtype=dtype)


def w8a8(
    x_MK: Tensor, x_scale: Tensor, w_NK: Tensor, w_scale: Tensor, kind: str, *, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """y [M, N] in dtype. kind: "int8", "fp8" or "fp8_block". ValueError where dtypes, shapes or devices do not fit."""
    if kind not in ELEMENTS:
        raise ValueError(f"w8a8: kind is {kind!r}; supported: {', '.join(ELEMENTS)}")
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"w8a8: y is bfloat16, float16 or float32, not {dtype}")
    element = ELEMENTS[kind]
    check_tensor("w8a8 x", x_MK, (element,), (None, None))
    M, K = x_MK.shape
    check_tensor("w8a8 W", w_NK, (element,), (None, K))
    N = w_NK.shape[0]
    if not 0 < K <= MAX_K or N == 0:
        raise ValueError(f"w8a8: W is {N}x{K}; supported: N from 1, K from 1 to {MAX_K}")
    if kind == "fp8_block":
        groups = -(-K // BLOCK)
        wanted, shape = (M, groups), (-(-N // BLOCK), groups)
        fits = x_scale.shape == wanted and x_scale.dtype == torch.float32
        if not fits:
            raise ValueError(f"w8a8 x_scale: wanted float32 {wanted}, got {x_scale.dtype} {tuple(x_scale.shape)}")
    else:
        check_tensor("w8a8 x_scale", x_scale, (torch.float32,), (M,))
        shape = (N,)
    check_tensor("w8a8 w_scale", w_scale, (torch.float32,), shape)
    check_same_device(x=x_MK, x_scale=x_scale, w=w_NK, w_scale=w_scale)
    check_gpu("w8a8", x_MK)
    return w8a8_op(x_MK, x_scale, w_NK, w_scale, kind, dtype)
