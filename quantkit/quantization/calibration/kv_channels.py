"""Offsets and scales of the channels of cached keys and values, from calibration text.

A channel is one feature of one head. Keys (and values) are centered and scaled by channel before a token is rounded,
x' = (x - m) / s, and what is read is x' rounded, times s, plus m. Attention can do the second half for nothing: a query
times s sees the scaled keys, the same m in every key of a head adds one number to all scores of a query, which softmax
ignores, and the weights of the values sum to 1, so that their m is added to the output once, after it is scaled by s.

m is the mean over the text. For s, let one step serve all channels of a token, its square in proportion to the energy
of what is rounded: the squared error is then sum_j s_j^2 * sum_j v_j / s_j^2 for channels of variance v_j, which is
least for s_j = v_j^(1/4) (Cauchy-Schwarz), half way between leaving the channels as they are and making them alike.

Measured: KL of an asymmetric int4 cache in groups of 32 with packed scales, which is 4.5 bits an entry in the heads of
64 features of pycode-6m, 5 in those of 16 of TinyStories-656K; constants from 8,192 tokens, 8,192 others evaluated:

    constants           pycode-6m   TinyStories-656K
    none                .0063       .0253
    m                   .0052       .0165
    s                   .0054       .0200
    m, s = v^(1/8)      .0048       .0150
    m, s = v^(1/4)      .0048       .0148               ours; from 512 tokens .0049, .0152
    m, s = v^(3/8)      .0051       .0154
    m, s = v^(1/2)      .0058       .0165

int4 with one symmetric scale for a token and head has .0120 and .0374. `python eval/kv_cache.py` compares formats.

Keys are taken after their positions are encoded, so their constants are those of the positions the text has, and wrong
for later ones: on windows of 1,024 tokens of pycode-6m constants from such windows make .0147 of .0184, those from
windows of 256 make .0200; the other way round little is lost, .0051 of .0063 instead of .0048. Calibrate on texts as
long as those the cache will hold. Values know no positions.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig

from quantkit.cache_spec import CacheSpec
from quantkit.errors import RunError
from quantkit.grids.activations import KVRange

LEAST_SCALE = 1e-3  # of the largest in a head: channels that never change are not blown up


class Moments:
    """Sums over all tokens, of a channel's numbers and of their squares, float64 [H, D]."""

    def __init__(self) -> None:
        self.tokens = 0
        self.sum_HD: Tensor | float = 0.0
        self.square_HD: Tensor | float = 0.0

    def add(self, x_BHTD: Tensor) -> None:
        """Count keys or values; RunError where one is not finite."""
        wide = x_BHTD.double()
        self.tokens += wide.shape[0] * wide.shape[2]
        self.sum_HD = self.sum_HD + wide.sum((0, 2))
        self.square_HD = self.square_HD + wide.square().sum((0, 2))
        if not torch.isfinite(self.square_HD).all():
            raise RunError("cached keys or values are NaN or Inf: they overflowed during calibration")

    def constants(self) -> Tensor:
        """The offsets and the scales of channels, float32 [2, H, D]."""
        assert isinstance(self.sum_HD, Tensor)
        mean_HD = self.sum_HD / self.tokens
        variance_HD = (self.square_HD / self.tokens - mean_HD.square()).clamp_(min=0)
        scale_HD = variance_HD.sqrt().sqrt()
        least_H1 = scale_HD.amax(-1, keepdim=True) * LEAST_SCALE
        scale_HD = torch.where(least_H1 > 0, torch.maximum(scale_HD, least_H1), 1.0)
        return torch.stack([mean_HD, scale_HD]).float()


class ChannelCache(DynamicCache):
    """A cache that leaves keys and values as they are and counts them in `seen` by layer index: keys, then values.

    Use a new one for each batch of sequences, around the same `seen`.
    """

    def __init__(self, seen: dict[int, tuple[Moments, Moments]], config: PretrainedConfig | None = None) -> None:
        super().__init__(config=config)
        self.seen = seen

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer so far; the new ones [B, H, T, D] are counted."""
        keys, values = self.seen.setdefault(layer_idx, (Moments(), Moments()))
        keys.add(key_states)
        values.add(value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def choose_channels(seen: tuple[Moments, Moments], spec: CacheSpec) -> KVRange:
    """The constants of a layer's keys and of its values, where the spec has them."""
    sides = zip((spec.keys, spec.values), seen, strict=True)
    return KVRange(*(moments.constants() if side is not None and side.channels else None for side, moments in sides))
