"""The paged cache of keys and values: codes and scales in blocks of tokens, keys and values each of their own format.

What attention reads is what `quantize_kv` makes of what was written, exactly in float32. Codes of up to 4 bits lie two
in a byte; a scale is float32, for each token and head, for `group_size` of its features, or (static) none is stored.
A packed scale is a word of 16 bits. Calibrated channels are taken off before a token is encoded and put back when read.

Shapes: N = blocks, H = key/value heads, P = tokens of a block, D = features of a head, G = groups of a head,
T = tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from quantkit_kernels.cpu.attention import Paged
from torch import Tensor
from torch.nn.functional import pad

from quantkit.errors import UserError
from quantkit.grids.activations import FP8_LEAST, TINY, int_codes
from quantkit.grids.elements import round_float_
from quantkit.grids.packed_scales import packed_codes, packed_values
from quantkit.types import FP8_MAX, ActivationRange, ActivationSpec, KVSpec


class Codes(NamedTuple):
    """Numbers as codes: x = (codes - shift) * scale. codes [.., G, g] whole numbers or e4m3 values in float32."""

    codes: Tensor
    scale: Tensor
    shift: Tensor | None


def encode(x: Tensor, spec: KVSpec, static: Tensor | None) -> Codes:
    """The codes of x [.., H, D] float32: a scale and shift [.., G, 1], or the static scale, [] or [H, 1, 1]."""
    size = x.shape[-1] if spec.group_size == -1 else spec.group_size
    x = pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))
    if spec.element == "int" and spec.symmetric:
        if static is not None:
            range_ = ActivationRange(static)
            return Codes(*int_codes(x, ActivationSpec(spec.bits, dynamic=False), range_), None)
        return Codes(*int_codes(x, ActivationSpec(spec.bits)), None)
    if spec.element == "float":
        least = FP8_LEAST["token" if spec.group_size == -1 else "group"]
        scale = (x.abs().amax(-1, keepdim=True) / FP8_MAX).clamp_(min=least) if static is None else static
        return Codes(round_float_(x / scale, spec.bits), scale, None)
    top = 2**spec.bits - 1
    low, high = x.aminmax(dim=-1, keepdim=True)
    flat = (high - low) / top < TINY
    low, high = torch.where(flat, low.clamp(max=0), low), torch.where(flat, high.clamp(min=0), high)
    scale = ((high - low) / top).clamp_(min=TINY)
    shift = (-low / scale).round_()
    return Codes((x * scale.reciprocal()).round_().add_(shift).clamp_(0, top), scale, shift)


class Pages:
    """The keys, or the values, of one layer.

    spec    None: elements in `dtype`
    static  what calibration found, where the spec needs it: the scale of all tokens, float32 [] or [H], or offset and
            scale of channels, [2, H, D]
    codes   [N, H, P, D], or [N, H, P, D / 2] bytes of two codes; scale, shift float32 [N, H, P, G]
    tokens_first  [N, P, H, ..] instead, as the GPU's kernels have it
    """

    def __init__(
        self, blocks: int, block_size: int, heads: int, head_size: int, spec: KVSpec | None, dtype: torch.dtype,
        device: torch.device, static: Tensor | None = None, *, tokens_first: bool = False,
    ) -> None:  # fmt: skip
        self.tokens_first = tokens_first
        self.spec, self.dtype, self.heads, self.head_size, self.block_size = spec, dtype, heads, head_size, block_size
        self.static = self.channels = None
        if static is not None and spec is not None and spec.channels:
            self.channels = static.to(device)
        elif static is not None:
            self.static = static.reshape(-1, 1, 1).to(device) if static.dim() else static
        self.scale: Tensor | None = None
        self.shift: Tensor | None = None
        shape = (blocks, block_size, heads) if tokens_first else (blocks, heads, block_size)
        if spec is None:
            self.codes = torch.zeros(*shape, head_size, dtype=dtype, device=device)
            return
        _check(spec, heads, head_size, static)
        self.group = head_size if spec.group_size == -1 else spec.group_size
        groups = -(-head_size // self.group)
        self.nibbles = spec.bits <= 4
        self.half = 32 if head_size % 64 == 0 else head_size // 2  # columns from a byte's low code to its high one
        if self.nibbles and head_size % 2:
            raise UserError(f"a {spec} cache packs two codes in a byte, and heads have {head_size} features: take int8")
        element = torch.uint8 if self.nibbles or not spec.symmetric or spec.packed else torch.int8
        element = torch.float8_e4m3fn if spec.element == "float" else element
        self.offset = 8 if self.nibbles and spec.symmetric and not spec.packed else 0
        self.codes = torch.zeros(*shape, head_size // 2 if self.nibbles else head_size, dtype=element, device=device)
        if spec.per == "token":
            kind = torch.int16 if spec.packed else torch.float32
            self.scale = torch.zeros(*shape, groups, dtype=kind, device=device)
        if not spec.symmetric and not spec.packed:
            self.shift = torch.zeros(*shape, groups, dtype=torch.float32, device=device)

    @property
    def kernel(self) -> Paged | None:
        """What the CPU's attention reads, but for what was calibrated; None where it has no kernel for this."""
        grouped = self.scale is not None and self.scale.shape[-1] > 1
        packed = self.spec is not None and self.spec.packed
        if self.codes.device.type != "cpu" or self.tokens_first or grouped or packed:
            return None
        return Paged(self.codes, self.scale, self.shift, self.spec is not None and self.nibbles)

    @property
    def nbytes(self) -> int:
        """Of codes, scales and shifts."""
        return sum(tensor.nbytes for tensor in (self.codes, self.scale, self.shift) if tensor is not None)

    def rows(self, slots: Tensor) -> Tensor:
        """[T * H]: where each head of the tokens lies among the N * H * P; slots [T]: block * P + place in it."""
        step, first = 1, slots * self.heads
        if not self.tokens_first:
            step, P = self.block_size, self.block_size
            first = slots // P * (self.heads * P) + slots % P
        return (first[:, None] + torch.arange(self.heads, device=slots.device) * step).flatten()

    def write(self, rows: Tensor, x_THD: Tensor) -> None:
        """Keep x_THD; rows [T * H]: where each of its heads lies among the N * H * P of the cache."""
        if self.spec is None:
            self.codes.view(-1, self.head_size).index_copy_(0, rows, x_THD.reshape(-1, self.head_size))
            return
        x_THD = x_THD.float()
        if self.channels is not None:
            x_THD = (x_THD - self.channels[0]) / self.channels[1]
        if self.spec.packed:
            packed, word = packed_codes(x_THD, self.spec)
            scale, shift = word[..., None], None
        else:
            codes, scale, shift = encode(x_THD, self.spec, self.static)
            packed = codes.flatten(-2)[..., : self.head_size]
        if self.nibbles:
            low, high = (packed + self.offset).to(torch.uint8).unflatten(-1, (-1, 2, self.half)).unbind(-2)
            packed = (low | high << 4).flatten(-2)
        out = self.codes
        if out.dtype == torch.float8_e4m3fn:  # index_copy_ takes bytes
            out, packed = out.view(torch.uint8), packed.to(torch.float8_e4m3fn).view(torch.uint8)
        out.view(-1, out.shape[-1]).index_copy_(0, rows, packed.to(out.dtype).flatten(0, 1))
        for kept, new in ((self.scale, scale), (self.shift, shift)):
            if kept is not None and new is not None:
                kept.view(-1, kept.shape[-1]).index_copy_(0, rows, new.flatten(0, 1).squeeze(-1))

    def read(self, blocks: Tensor) -> Tensor:
        """What blocks [.., n] hold, in the model's dtype: [.., H, n * P, D]."""
        codes = self._gather(self.codes, blocks)
        if self.spec is None:
            return codes
        if self.nibbles:
            bytes_ = codes.unflatten(-1, (-1, 1, self.half))
            codes = torch.cat([bytes_ & 15, bytes_ >> 4], -2).flatten(-3)
        if self.spec.packed:
            assert self.scale is not None
            return self._with_channels(packed_values(codes, self._gather(self.scale, blocks), self.spec))
        values = codes.float()
        values = pad(values, (0, -self.head_size % self.group)).unflatten(-1, (-1, self.group))
        if self.shift is not None:
            values -= self._gather(self.shift, blocks)[..., None]
        elif self.offset:
            values -= self.offset
        if self.scale is not None:
            values *= self._gather(self.scale, blocks)[..., None]
        elif self.static is not None:
            values *= self.static[..., None] if self.static.dim() else self.static
        return self._with_channels(values.flatten(-2)[..., : self.head_size])

    def _with_channels(self, values: Tensor) -> Tensor:
        """[.., H, n * P, D] in the model's dtype, with what was taken off put back."""
        if self.channels is not None:
            offset_HD, scale_HD = self.channels
            values = values * scale_HD[:, None] + offset_HD[:, None]
        return values.to(self.dtype)

    def _gather(self, tensor: Tensor, blocks: Tensor) -> Tensor:
        """[.., n] blocks of [N, H, P, W] as [.., H, n * P, W]."""
        view = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
        found = view[blocks]
        if self.tokens_first:
            found = found.flatten(-4, -3).transpose(-3, -2)
        else:
            found = found.transpose(-4, -3).flatten(-3, -2)
        return found.view(tensor.dtype) if view is not tensor else found


def _check(spec: KVSpec, heads: int, head_size: int, static: Tensor | None) -> None:
    """UserError where a cache of this format cannot be kept."""
    if spec.calibrated != (static is not None):
        raise UserError(f"a {spec} cache {'takes no' if static is not None else 'needs the checkpoint for its'} scales")
    if static is None:
        return
    wanted = (2, heads, head_size) if spec.channels else (heads,)
    if static.dim() and static.shape != wanted:
        raise UserError(
            f"{len(static)} scales of cached keys or values for {heads} heads, shape {list(static.shape)} where "
            f"{list(wanted)} is needed: they are another model's"
        )


NAMED = {"int8": KVSpec(8, "int", "token"), "fp8": KVSpec(8, "float", "token")}


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Key/value heads of a layer, and the features of a head."""

    heads: int
    head_size: int


@dataclass(frozen=True)
class CacheFormat:
    """How keys and values are kept (None: in the model's dtype), with what calibration found for them by layer."""

    keys: KVSpec | None = None
    values: KVSpec | None = None
    k_scales: Mapping[int, Tensor | None] | None = None
    v_scales: Mapping[int, Tensor | None] | None = None

    def bytes_per_token(self, shapes: dict[int, LayerShape], dtype: torch.dtype) -> int:
        """Of all layers, keys and values."""
        total = 0
        for shape in shapes.values():
            for spec in (self.keys, self.values):
                static = _any(spec, shape)
                pages = Pages(1, 1, shape.heads, shape.head_size, spec, dtype, torch.device("cpu"), static)
                total += pages.nbytes
        return total


def _any(spec: KVSpec | None, shape: LayerShape) -> Tensor | None:
    """Something to stand for what calibration found."""
    if spec is None or not spec.calibrated:
        return None
    return torch.ones(2, shape.heads, shape.head_size) if spec.channels else torch.tensor(1.0)


class PagedCache:
    """Keys and values of all layers: `layers[layer]` is a pair of Pages."""

    def __init__(
        self, shapes: dict[int, LayerShape], blocks: int, block_size: int, form: CacheFormat, dtype: torch.dtype,
        device: torch.device, *, tokens_first: bool = False,
    ) -> None:  # fmt: skip
        self.blocks, self.block_size, self.tokens_first = blocks, block_size, tokens_first
        self.layers: dict[int, tuple[Pages, Pages]] = {}
        for layer, shape in shapes.items():
            pair = []
            for spec, scales in ((form.keys, form.k_scales), (form.values, form.v_scales)):
                static = (scales or {}).get(layer) if spec is not None and spec.calibrated else None
                sizes = (blocks, block_size, shape.heads, shape.head_size)
                pair.append(Pages(*sizes, spec, dtype, device, static, tokens_first=tokens_first))
            self.layers[layer] = pair[0], pair[1]
