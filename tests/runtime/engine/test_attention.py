"""Chunks of a prompt attend, to the bit, as the whole prompt does in one call of torch's fused attention."""

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from quantkit.runtime.engine.attention import Chunk, _attend_chunk, _Rule
from quantkit.runtime.engine.cache import Pages

HEADS, KV_HEADS, D, P = 4, 2, 32, 8


@pytest.mark.parametrize("length", [5, 37, 150])
def test_chunks_are_the_whole(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(length, heads, D, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS))
    wanted = scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, scale=0.2, enable_gqa=True
    )[0].transpose(0, 1)
    blocks = torch.randperm(-(-length // P), generator=generator)
    cpu = torch.device("cpu")
    keys, values = (Pages(len(blocks), P, KV_HEADS, D, None, torch.float32, cpu) for _ in "kv")
    parts = []
    for start, stop in pairwise(sorted({0, 1, length // 3, length // 2, length})):
        at = torch.arange(start, stop)
        slots = blocks[at // P] * P + at % P
        keys.write(keys.rows(slots), k[start:stop])
        values.write(values.rows(slots), v[start:stop])
        chunk = Chunk(0, stop - start, start, blocks[: -(-stop // P)], whole=length)
        parts.append(_attend_chunk(q[start:stop], keys, values, chunk, _Rule(0.2, 0, None, None, False)))
    assert torch.equal(torch.cat(parts), wanted)
