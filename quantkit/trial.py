"""A trial run of blocks: each distinct kind is filled once, looked at, and emptied again."""

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor, nn

from quantkit.blocks import BlockCall, Skeleton, release
from quantkit.graph import structure_key

T = TypeVar("T")

TRIAL_TOKENS = 16


def trial_ids(skeleton: Skeleton) -> Tensor:
    """A few token ids [1, TRIAL_TOKENS] that every model knows."""
    return (torch.arange(TRIAL_TOKENS) % skeleton.model.config.get_text_config().vocab_size).reshape(1, -1)


def once_per_structure(skeleton: Skeleton, look: Callable[[int, nn.Module, Tensor, BlockCall], T]) -> list[T]:
    """look(index, block, hidden states, how the block is called) for each block; blocks of one structure share it."""
    hidden, calls = skeleton.first_call(trial_ids(skeleton))
    known: dict[Hashable, T] = {}
    found = []
    for index, block in enumerate(skeleton.blocks):
        key = structure_key(block)
        if key not in known:
            skeleton.fill(index)
            try:
                known[key] = look(index, block, hidden, calls[index])
            finally:
                release(block)
        found.append(known[key])
    return found
