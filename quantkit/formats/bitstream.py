"""Codes of 2 to 8 bits to a little-endian bit stream of 32-bit words, and back.

Code i of a row takes bits [i * bits, (i + 1) * bits) of the row's stream, low bits first; the last word is padded with
zeros. Eight codes fill exactly `bits` bytes, so the work is done on int64 lanes that hold eight codes each: three steps
halve the gaps between them (pairs in 16 bits, fours in 32, eights in 64), and the low `bits` bytes are the stream.

Shapes: R = rows, K = codes of a row, W = words of a row = ceil(K * bits / 32).
"""

import sys

import torch
from torch import Tensor

from quantkit.formats.common import words_for

assert sys.byteorder == "little", "the views below read memory as little-endian"

CHUNK = 1 << 20  # codes handled at a time: the lanes stay in the cache


def pack_words(codes_RK: Tensor, bits: int) -> Tensor:
    """uint8 codes [R, K] below 2**bits -> int32 words [R, W]."""
    R, K = codes_RK.shape
    step = 8 if bits == 4 else 4 if bits == 8 else 16 if bits == 2 else 32  # codes that end on a word's end
    if K % step:
        codes_RK = torch.nn.functional.pad(codes_RK, (0, -K % step))
    codes = codes_RK.contiguous().reshape(-1)
    if bits == 8:
        words = codes.view(torch.int32)
        words = words.clone() if words.data_ptr() == codes_RK.data_ptr() else words
    else:
        out = torch.empty(codes.numel() * bits // 8, dtype=torch.uint8, device=codes.device)
        squeeze = _SQUEEZE.get(bits, _squeeze_any)
        for start in range(0, codes.numel(), CHUNK):
            part = codes[start : start + CHUNK]
            out[start * bits // 8 : (start + part.numel()) * bits // 8] = squeeze(part, bits)
        words = out.view(torch.int32)
    words_RW = words.reshape(R, codes_RK.shape[1] * bits // 32)
    return words_RW[:, : words_for(K, bits)].contiguous()


def unpack_words(words_RW: Tensor, bits: int, count: int) -> Tensor:
    """int32 words [R, W] -> uint8 codes [R, count]."""
    R, W = words_RW.shape
    if bits not in (2, 4, 8) and W % bits:
        words_RW = torch.nn.functional.pad(words_RW, (0, -W % bits))
    raw = words_RW.contiguous().reshape(-1).view(torch.uint8)
    if bits == 8:
        codes = raw.clone()
    else:
        codes = torch.empty(raw.numel() * 8 // bits, dtype=torch.uint8, device=raw.device)
        stretch = _STRETCH.get(bits, _stretch_any)
        step = CHUNK * bits // 8
        for start in range(0, raw.numel(), step):
            part = raw[start : start + step]
            codes[start * 8 // bits : (start + part.numel()) * 8 // bits] = stretch(part, bits)
    codes_RK = codes.reshape(R, words_RW.shape[1] * 32 // bits)
    return codes_RK[:, :count].contiguous()


def _squeeze_4(codes: Tensor, _: int) -> Tensor:
    pair = codes.view(torch.int16)
    return (pair >> 4).bitwise_or_(pair).to(torch.uint8)


def _stretch_4(raw: Tensor, _: int) -> Tensor:
    pair = raw.to(torch.int16)
    return (pair << 4).bitwise_or_(pair).bitwise_and_(0x0F0F).view(torch.uint8)


def _squeeze_2(codes: Tensor, _: int) -> Tensor:
    four = codes.view(torch.int32)
    four = (four >> 6).bitwise_or_(four)
    return (four >> 12).bitwise_or_(four).to(torch.uint8)


def _stretch_2(raw: Tensor, _: int) -> Tensor:
    four = raw.to(torch.int32)
    four = (four << 12).bitwise_or_(four)
    return (four << 6).bitwise_or_(four).bitwise_and_(0x03030303).view(torch.uint8)


def _squeeze_any(codes: Tensor, bits: int) -> Tensor:
    lane = codes.view(torch.int64)
    for width in (8, 16, 32):
        low = _lanes(bits * width // 8, 2 * width)
        gap = width - bits * width // 8
        lane = (lane & low) | ((lane >> gap) & (low << (bits * width // 8)))
    return lane.view(torch.uint8).reshape(-1, 8)[:, :bits].reshape(-1)


def _stretch_any(raw: Tensor, bits: int) -> Tensor:
    eights = torch.zeros(raw.numel() // bits, 8, dtype=torch.uint8, device=raw.device)
    eights[:, :bits] = raw.reshape(-1, bits)
    lane = eights.view(torch.int64).reshape(-1)
    for width in (32, 16, 8):
        low = _lanes(bits * width // 8, 2 * width)
        gap = width - bits * width // 8
        lane = (lane & low) | ((lane << gap) & (low << width))
    return lane.view(torch.uint8)


def _lanes(ones: int, width: int) -> int:
    """A 64-bit mask with the low `ones` bits set in every field of `width` bits."""
    return sum(((1 << ones) - 1) << at for at in range(0, 64, width))


_SQUEEZE = {2: _squeeze_2, 4: _squeeze_4}
_STRETCH = {2: _stretch_2, 4: _stretch_4}
