"""The same attention by Triton's kernels: for bfloat16 and float16 models whose cache is plain, int8 or fp8 by token.

The cache then lies with a token's heads behind each other. What the kernels do not do (a softcap, sinks, other formats)
the plain path does, on the same cache.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantkit.runtime.engine.cache import NAMED, Pages


class Sequences(NamedTuple):
    """The step's sequences: table int32 [B, n] of blocks, lengths int32 [B] with the new tokens, starts int32 [B + 1].

    most: the largest number of new tokens of a sequence
    """

    table: Tensor
    lengths: Tensor
    starts: Tensor
    most: int


def kernel_cache(pages: Pages) -> Any:
    """A Cache of the kernels over the pages' own memory; None where they have no such kind."""
    from quantkit_kernels.kv_write import BLOCK_SIZES, HEAD_SIZES, Cache

    fits = pages.tokens_first and pages.block_size in BLOCK_SIZES and pages.head_size in HEAD_SIZES
    if not fits or pages.dtype == torch.float32:
        return None
    if pages.spec is None:
        return Cache(pages.codes, None, "16")
    if pages.spec not in (NAMED["int8"], NAMED["fp8"]) or pages.scale is None:
        return None
    return Cache(pages.codes.view(torch.uint8), pages.scale[..., 0], "int8" if pages.spec.element == "int" else "fp8")


def attend_on_gpu(
    query: Tensor, key: Tensor, value: Tensor, pages: tuple[Pages, Pages], slots: Tensor, sequences: Sequences,
    scale: float, window: int,
) -> Tensor | None:  # fmt: skip
    """Write key and value [T, H, D] to their slots and attend: [T, Hq, D] for query [T, Hq, D]; None: not done."""
    from quantkit_kernels.kv_write import kv_write
    from quantkit_kernels.paged_attention import paged_attention

    keys, values = map(kernel_cache, pages)
    if keys is None or values is None:
        return None
    kv_write(key.contiguous(), value.contiguous(), slots, keys, values)
    table, lengths, starts, most = sequences
    return paged_attention(
        query.contiguous(), keys, values, table, lengths, starts, most_queries=most, scale=scale, window=window
    )
