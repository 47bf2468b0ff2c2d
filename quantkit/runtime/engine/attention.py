"""Attention over the paged cache, inside transformers' own models.

`AttentionInterface` gives the attention of every layer to `paged_attention` here; the model is called with one row of
all the step's tokens behind each other, their positions, and the step itself (`step=`), which transformers hands
through. It first writes the layer's new keys and values, then each token attends to its own sequence.

Shapes: T = tokens of the step, Hq = query heads, H = key/value heads, Q = Hq / H, D = features of a head, L = tokens of
a sequence.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from quantkit_kernels.cpu.attention import cpu_paged_attention
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from quantkit.errors import UserError
from quantkit.runtime.engine.cache import LayerShape, PagedCache, Pages
from quantkit.runtime.engine.gpu import Sequences, attend_on_gpu

NAME = "quantkit_paged"
EXACT = 2048  # tokens of a prompt up to which its chunks attend as the whole does, at the cost of that


@dataclass
class Chunk:
    """Tokens begin .. end of the step: a sequence's tokens from position `offset` on; blocks: all it holds so far.

    whole: tokens of its prompt, where they attend as if all of that came in one step
    """

    begin: int
    end: int
    offset: int
    blocks: Tensor
    whole: int = 0


@dataclass
class Step:
    """Where the step's tokens lie.

    slots    [T] block * P + place in it, of each token
    singles  how many tokens, the first ones, attend each for itself: tables [singles, n] and lengths [singles] say to
             what, the longest of them `longest`; the others lie in chunks
    exact    attend as transformers does to the last bit where that can be: a model that rounds inputs to few bits
             makes much of float noise
    sequences  all of them, where Triton's kernels may attend
    windows  tokens that a layer sees, where its configuration says so; 0: all
    """

    cache: PagedCache
    slots: Tensor
    singles: int
    tables: Tensor
    lengths: Tensor
    longest: int
    chunks: list[Chunk]
    windows: dict[int, int]
    exact: bool = False
    sequences: Sequences | None = None
    _rows: dict[int, Tensor] = field(default_factory=dict)

    def rows(self, pages: Pages) -> Tensor:
        """[T * H]: the row of each token's head among the cache's."""
        if pages.heads not in self._rows:
            self._rows[pages.heads] = pages.rows(self.slots)
        return self._rows[pages.heads]


@dataclass
class Probe:
    """In place of a step: notes the shape of each layer's keys and values, and what its attention asks for."""

    shapes: dict[int, LayerShape] = field(default_factory=dict)


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    step: Step | Probe | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """[1, T, Hq, D] for query [1, Hq, T, D], key and value [1, H, T, D].

    softcap: scores are cap * tanh(scores / cap); s_aux: [Hq] logits of a sink that takes attention and gives nothing
    """
    if step is None:
        raise UserError(
            f"{type(module).__name__} got no step of the paged engine: its model is in an engine's hands, or does not "
            "hand keywords through to its attention\nhint: quantkit.load(...).generate(...) runs it"
        )
    layer: int = module.layer_idx  # type: ignore[assignment]
    if isinstance(step, Probe):
        if key.shape != value.shape or position_bias is not None:
            what = "keys and values of different shapes" if position_bias is None else "a position bias"
            raise UserError(f"layer {layer}: attention with {what} is not supported by the paged engine")
        step.shapes[layer] = LayerShape(key.shape[1], key.shape[3])
        return query.transpose(1, 2), None
    keys, values = step.cache.layers[layer]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = sliding_window or step.windows.get(layer, 0)
    rule = _Rule(scale, window, softcap, s_aux, step.exact)
    query_THD, key_THD, value_THD = (x[0].transpose(0, 1) for x in (query, key, value))
    if step.sequences is not None and rule.plain:
        pages = keys, values
        out = attend_on_gpu(query_THD, key_THD, value_THD, pages, step.slots, step.sequences, scale, window)
        if out is not None:
            return out[None], None
    rows = step.rows(keys)
    keys.write(rows, key_THD)
    values.write(rows, value_THD)
    parts = []
    if step.singles:
        parts.append(_attend_singles(query_THD[: step.singles], keys, values, step, rule))
    for chunk in step.chunks:
        parts.append(_attend_chunk(query_THD[chunk.begin : chunk.end], keys, values, chunk, rule))
    return (parts[0].contiguous() if len(parts) == 1 else torch.cat(parts))[None], None


@dataclass(frozen=True, slots=True)
class _Rule:
    scale: float
    window: int
    softcap: float | None
    sinks: Tensor | None
    exact: bool

    @property
    def plain(self) -> bool:
        """Whether it is scores and a softmax, and no more."""
        return self.softcap is None and self.sinks is None

    def shares(self, scores: Tensor, seen: Tensor) -> Tensor:
        """The softmax of scores [.., H, Q, n, L] in float32 over the tokens that are seen."""
        scores = scores.float() * self.scale
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        scores = scores.masked_fill_(~seen, -torch.inf)
        if self.sinks is None:
            return torch.softmax(scores, -1)
        sinks = self.sinks.float().view(scores.shape[-4], -1, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1]


def _attend_singles(query_BHD: Tensor, keys: Pages, values: Pages, step: Step, rule: _Rule) -> Tensor:
    """Each query over its own sequence: [B, Hq, D]."""
    B, Hq, D = query_BHD.shape
    if rule.plain and rule.exact:
        parts = []
        for query_HD, table, length in zip(query_BHD, step.tables, step.lengths.tolist(), strict=True):
            seen = slice(max(0, length - rule.window) if rule.window else 0, length)
            k_HLD, v_HLD = (pages.read(table)[:, seen] for pages in (keys, values))
            parts.append(_as_transformers(query_HD[:, None], k_HLD, v_HLD, rule)[:, 0])
        return torch.stack(parts)
    if rule.plain and (out := _by_kernel(query_BHD, keys, values, step, rule)) is not None:
        return out
    k_BHLD, v_BHLD = keys.read(step.tables), values.read(step.tables)
    place = torch.arange(k_BHLD.shape[2], device=query_BHD.device)
    seen = place < step.lengths[:, None]
    if rule.window:
        seen &= place >= step.lengths[:, None] - rule.window
    q = query_BHD.reshape(B, keys.heads, -1, 1, D)
    scores = q @ k_BHLD.mT[:, :, None]
    shares = rule.shares(scores, seen[:, None, None, None])
    return (shares.to(v_BHLD.dtype) @ v_BHLD[:, :, None]).reshape(B, Hq, D)


def _as_transformers(query_HnD: Tensor, k_HLD: Tensor, v_HLD: Tensor, rule: _Rule) -> Tensor:
    """The last n of L tokens, n = 1 or L, as transformers' sdpa attention: [Hq, n, D]."""
    q, k, v = query_HnD[None], k_HLD[None], v_HLD[None]
    causal, grouped = q.shape[2] > 1, q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=rule.scale, enable_gqa=grouped)[0]


def _by_kernel(query_BHD: Tensor, keys: Pages, values: Pages, step: Step, rule: _Rule) -> Tensor | None:
    """The same by the CPU's kernel, which reads codes where they lie; None where it cannot."""
    k, v = keys.kernel, values.kernel
    if k is None or v is None:
        return None
    # A scale that all tokens share multiplies the query or the output; an offset of keys moves all scores alike.
    out = cpu_paged_attention(
        _times(query_BHD, keys), k, v, step.tables, step.lengths, step.longest, scale=rule.scale, window=rule.window
    )
    if out is None:
        return None
    out = _times(out, values)
    if values.channels is not None:
        out = (out.unflatten(1, (values.heads, -1)) + values.channels[0][:, None]).flatten(1, 2)
    return out.to(query_BHD.dtype)


def _times(x_BHD: Tensor, pages: Pages) -> Tensor:
    """Times what calibration found, which each key/value head, and each feature of it, may have one of."""
    scale = pages.static if pages.channels is None else pages.channels[1][:, None]
    if scale is None:
        return x_BHD
    return (x_BHD.float().unflatten(1, (scale.shape[0] if scale.dim() else 1, -1)) * scale).flatten(1, 2)


def _attend_chunk(query_nHD: Tensor, keys: Pages, values: Pages, chunk: Chunk, rule: _Rule) -> Tensor:
    """Queries of consecutive tokens over their sequence: [n, Hq, D]."""
    n, Hq, D = query_nHD.shape
    length = chunk.offset + n
    k_HLD, v_HLD = (pages.read(chunk.blocks)[:, :length] for pages in (keys, values))
    whole = max(chunk.whole, length)
    if rule.plain and chunk.whole and whole <= EXACT and not 0 < rule.window < whole:
        q_HLD = pad(query_nHD.transpose(0, 1), (0, 0, chunk.offset, whole - length))
        k_HLD, v_HLD = (pad(x_HLD, (0, 0, 0, whole - length)) for x_HLD in (k_HLD, v_HLD))
        return _as_transformers(q_HLD, k_HLD, v_HLD, rule)[:, chunk.offset : length].transpose(0, 1)
    place = torch.arange(length, device=query_nHD.device)
    position = place[chunk.offset :, None]
    seen = place <= position
    if rule.window:
        seen &= place > position - rule.window
    q = query_nHD.transpose(0, 1).reshape(keys.heads, -1, n, D)
    shares = rule.shares(q @ k_HLD.mT[:, None], seen)
    return (shares.to(v_HLD.dtype) @ v_HLD[:, None]).reshape(Hq, n, D).transpose(0, 1)


def _no_mask(*_: Any, **__: Any) -> None:
    """Attention masks for itself."""


AttentionInterface.register(NAME, paged_attention)  # type: ignore[arg-type]
AttentionMaskInterface.register(NAME, _no_mask)
