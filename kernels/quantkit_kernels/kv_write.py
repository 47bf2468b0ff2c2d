"""The paged KV cache: its formats, and the kernel that quantizes new keys and values into it.

A cache of keys or of values is codes [blocks, block_size, Hkv, D] and scales, kinds chosen apart for the two:
  16    bfloat16 or float16 elements, no scale
  "fp8" uint8 bits of e4m3, "int8" uint8 bits of int8: scale float32 [blocks, block_size, Hkv] = max|v| / 448 or / 127
  "int4" uint8 [.., D / 2], byte j = code j | code (D / 2 + j) << 4: value = code * scale + low, scale and low float16
        [blocks, block_size, Hkv, 2], low = min v, scale = (max v - min v) / 15; |v| below 65504
Token t of a sequence lies in block block_table[t // block_size] at t % block_size. Codes round to nearest even.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit_kernels.checks import check_same_device, check_tensor
from quantkit_kernels.common import check_gpu
from quantkit_kernels.quantize_activations import e4m3_code, round_even

Kind = Literal["16", "fp8", "int8", "int4"]
KINDS = ("16", "fp8", "int8", "int4")
HEAD_SIZES = range(16, 257, 16)
BLOCK_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class Cache:
    """Codes and scales of the keys, or of the values."""

    codes: Tensor
    scale: Tensor | None
    kind: Kind


def allocate(
    kind: Kind, blocks: int, block_size: int, heads: int, head_size: int, *, dtype: torch.dtype, device: torch.device
) -> Cache:
    """An empty cache; ValueError for unsupported sizes. dtype is that of kind "16" and of the activations."""
    if kind not in KINDS:
        raise ValueError(f"KV kind is {kind!r}; supported: {', '.join(KINDS)}")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block size is {block_size}; supported: {BLOCK_SIZES}")
    if head_size not in HEAD_SIZES:
        raise ValueError(f"head size is {head_size}; supported: multiples of 16 from 16 to 256")
    shape = (blocks, block_size, heads)
    if kind == "16":
        return Cache(torch.empty(*shape, head_size, dtype=dtype, device=device), None, kind)
    if kind == "int4":
        codes = torch.empty(*shape, head_size // 2, dtype=torch.uint8, device=device)
        return Cache(codes, torch.empty(*shape, 2, dtype=torch.float16, device=device), kind)
    codes = torch.empty(*shape, head_size, dtype=torch.uint8, device=device)
    return Cache(codes, torch.empty(*shape, dtype=torch.float32, device=device), kind)


def read_cache(cache: Cache) -> Tensor:
    """Every slot's values in float64 [blocks, block_size, Hkv, D]: the definition of the formats."""
    if cache.scale is None:
        return cache.codes.double()
    if cache.kind == "int4":
        codes = torch.cat([cache.codes & 15, cache.codes >> 4], -1).double()
        return codes * cache.scale[..., :1].double() + cache.scale[..., 1:].double()
    element = torch.int8 if cache.kind == "int8" else torch.float8_e4m3fn
    return cache.codes.view(element).double() * cache.scale.double()[..., None]


def quantize_kv_reference(value: Tensor, kind: Kind) -> Tensor:
    """What a cache of `kind` returns for values [.., D]: the kernel's definition, in float32 arithmetic."""
    v = value.float()
    if kind == "16":
        return value.double()
    if kind == "int4":
        low, high = v.amin(-1, keepdim=True), v.amax(-1, keepdim=True)
        scale, low = ((high - low) * (1 / 15)).half().float(), low.half().float()
        inverse = torch.where(scale == 0, 0, 1 / scale)
        return ((v - low) * inverse).round().clamp(0, 15).double() * scale.double() + low.double()
    peak = v.abs().amax(-1, keepdim=True)
    scale = torch.where(peak == 0, 1, peak * (1 / 127 if kind == "int8" else 1 / 448))
    scaled = v * (1 / scale)
    codes = scaled.round() if kind == "int8" else scaled.clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.double() * scale.double()


@triton.jit
def _write(low_half, high_half, inside, codes_ptr, scale_ptr, slot, d, KIND: tl.constexpr, HALF: tl.constexpr):
    """One token's one head, as its two halves [BLOCK] in float32."""
    if KIND == "int4":
        least = tl.minimum(tl.min(tl.where(inside, low_half, 1e30), 0), tl.min(tl.where(inside, high_half, 1e30), 0))
        most = tl.maximum(tl.max(tl.where(inside, low_half, -1e30), 0), tl.max(tl.where(inside, high_half, -1e30), 0))
        scale16 = ((most - least) * (1 / 15)).to(tl.float16)
        low16 = least.to(tl.float16)
        scale = scale16.to(tl.float32)
        inverse = tl.where(scale == 0.0, 0.0, 1.0 / tl.where(scale == 0.0, 1.0, scale))
        low = low16.to(tl.float32)
        a = tl.minimum(tl.maximum(round_even((low_half - low) * inverse), 0.0), 15.0).to(tl.int32)
        b = tl.minimum(tl.maximum(round_even((high_half - low) * inverse), 0.0), 15.0).to(tl.int32)
        tl.store(codes_ptr + slot * HALF + d, (a | (b << 4)).to(tl.uint8), mask=inside)
        tl.store(scale_ptr + slot * 2, scale16)
        tl.store(scale_ptr + slot * 2 + 1, low16)
    elif KIND == "16":
        element: tl.constexpr = codes_ptr.dtype.element_ty
        tl.store(codes_ptr + slot * 2 * HALF + d, low_half.to(element), mask=inside)
        tl.store(codes_ptr + slot * 2 * HALF + HALF + d, high_half.to(element), mask=inside)
    else:
        TOP: tl.constexpr = 127.0 if KIND == "int8" else 448.0
        peak = tl.maximum(tl.max(tl.abs(low_half), 0), tl.max(tl.abs(high_half), 0))
        scale = tl.where(peak == 0.0, 1.0, peak * (1 / TOP))
        a = tl.minimum(tl.maximum(low_half * (1.0 / scale), -TOP), TOP)
        b = tl.minimum(tl.maximum(high_half * (1.0 / scale), -TOP), TOP)
        if KIND == "int8":
            a_code = round_even(a).to(tl.int8).to(tl.uint8, bitcast=True)
            b_code = round_even(b).to(tl.int8).to(tl.uint8, bitcast=True)
        else:
            a_code, b_code = e4m3_code(a), e4m3_code(b)
        tl.store(codes_ptr + slot * 2 * HALF + d, a_code, mask=inside)
        tl.store(codes_ptr + slot * 2 * HALF + HALF + d, b_code, mask=inside)
        tl.store(scale_ptr + slot, scale)


@triton.jit
def kv_write_kernel(
    k_ptr, v_ptr, slot_ptr, k_codes_ptr, k_scale_ptr, v_codes_ptr, v_scale_ptr, stride_k, stride_v, HEADS,
    K_KIND: tl.constexpr, V_KIND: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token and head; a slot below zero is padding."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slot_ptr + token).to(tl.int64)
    if slot >= 0:
        d = tl.arange(0, BLOCK)
        inside = d < HALF
        place = slot * HEADS + head
        k = k_ptr + token * stride_k + head * 2 * HALF + d
        a = tl.load(k, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(k + HALF, mask=inside, other=0.0).to(tl.float32)
        _write(a, b, inside, k_codes_ptr, k_scale_ptr, place, d, K_KIND, HALF)
        v = v_ptr + token * stride_v + head * 2 * HALF + d
        a = tl.load(v, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(v + HALF, mask=inside, other=0.0).to(tl.float32)
        _write(a, b, inside, v_codes_ptr, v_scale_ptr, place, d, V_KIND, HALF)


def check_cache(name: str, cache: Cache, head_size: int) -> tuple[int, int, int]:
    """(blocks, block_size, heads); ValueError where the tensors are not what `allocate` makes."""
    dtypes = (torch.bfloat16, torch.float16) if cache.kind == "16" else (torch.uint8,)
    width = head_size // 2 if cache.kind == "int4" else head_size
    check_tensor(f"{name} cache", cache.codes, dtypes, (None, None, None, width))
    blocks, block_size, heads = cache.codes.shape[:3]
    if cache.scale is not None:
        dtype = torch.float16 if cache.kind == "int4" else torch.float32
        shape = (blocks, block_size, heads, 2) if cache.kind == "int4" else (blocks, block_size, heads)
        check_tensor(f"{name} cache scale", cache.scale, (dtype,), shape)
    if (cache.scale is None) != (cache.kind == "16"):
        raise ValueError(f"{name} cache of kind {cache.kind} and its scale do not match")
    return blocks, block_size, heads


@torch.library.custom_op("quantkit_kernels::kv_write", mutates_args=("k_codes", "k_scale", "v_codes", "v_scale"))
def kv_write_op(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    k_codes: Tensor,
    k_scale: Tensor | None,
    v_codes: Tensor,
    v_scale: Tensor | None,
    k_kind: str,
    v_kind: str,
) -> None:
    """The operator torch.compile and export see; `kv_write` is its checked front."""
    T, heads, D = k.shape
    if T == 0:
        return
    kv_write_kernel[(T, heads)](
        k, v, slots, k_codes, k_scale if k_scale is not None else k_codes, v_codes,
        v_scale if v_scale is not None else v_codes, k.stride(0), v.stride(0), heads,
        K_KIND=k_kind, V_KIND=v_kind, HALF=D // 2, BLOCK=triton.next_power_of_2(D // 2),
        num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip


@kv_write_op.register_fake
def _(k, v, slots, k_codes, k_scale, v_codes, v_scale, k_kind, v_kind):
    return None


def kv_write(k: Tensor, v: Tensor, slots: Tensor, k_cache: Cache, v_cache: Cache) -> None:
    """Write keys and values [T, Hkv, D] to slots int64 or int32 [T] (block * block_size + offset; negative: skip).

    ValueError where shapes, dtypes or devices do not fit; slots beyond the cache are the caller's fault.
    """
    if k.dim() != 3 or k.shape != v.shape:
        raise ValueError(f"kv_write: k is {tuple(k.shape)}, v {tuple(v.shape)}; wanted [T, Hkv, D]")
    T, heads, D = k.shape
    if D not in HEAD_SIZES:
        raise ValueError(f"kv_write: head size is {D}; supported: multiples of 16 from 16 to 256")
    for name, tensor in (("k", k), ("v", v)):
        good = tensor.dtype in (torch.bfloat16, torch.float16, torch.float32)
        if not good:
            raise ValueError(f"kv_write: {name} is {tensor.dtype}; supported: bfloat16, float16, float32")
        inner = tensor.stride(2) == 1 and (heads == 1 or tensor.stride(1) == D)
        if not inner:
            raise ValueError(f"kv_write: heads of {name} are not contiguous (strides {tensor.stride()})")
    check_tensor("kv_write slots", slots, (torch.int64, torch.int32), (T,))
    for name, cache in (("key", k_cache), ("value", v_cache)):
        found = check_cache(name, cache, D)[2]
        if found != heads:
            raise ValueError(f"kv_write: {heads} heads, but the {name} cache has {found}")
    check_same_device(k=k, v=v, slots=slots, k_cache=k_cache.codes, v_cache=v_cache.codes)
    check_gpu("kv_write", k)
    kv_write_op(k, v, slots, k_cache.codes, k_cache.scale, v_cache.codes, v_cache.scale, k_cache.kind, v_cache.kind)
