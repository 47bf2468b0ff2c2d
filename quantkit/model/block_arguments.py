"""Arguments that blocks write into: which, and copies of them, so that every run of a block is like its first.

A block is run many times on the same arguments. Its hidden states and the containers it is given (a dict of keys and
values that later blocks read, a list it appends to) are therefore copied for each run.
"""

import copy
from collections.abc import Iterator, MutableMapping, MutableSequence, MutableSet
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PretrainedConfig

Containers = MutableMapping | MutableSequence | MutableSet


def guard(block: nn.Module) -> None:
    """From now on each call of the block gets copies of its hidden states (the first tensor) and of its containers."""

    def copies(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if "forward" in vars(module):
            return None  # replaced by a function that only records what it is given
        first = next((key for key, value in named(args, kwargs) if isinstance(value, Tensor)), None)

        def own(key: int | str, value: Any) -> Any:
            if key == first:
                return value.clone()
            return copy.copy(value) if isinstance(value, Containers) else value

        return tuple(own(i, v) for i, v in enumerate(args)), {key: own(key, v) for key, v in kwargs.items()}

    block.register_forward_pre_hook(copies, with_kwargs=True, prepend=True)


def named(args: tuple, kwargs: dict) -> Iterator[tuple[int | str, Any]]:
    """Arguments with their position or keyword."""
    yield from enumerate(args)
    yield from kwargs.items()


def written(block: nn.Module, args: tuple, kwargs: dict) -> list[tuple[str, Any]]:
    """(name, value) of the arguments beside its hidden states (args[0]) that a run of the block changes.

    Positions count from 1 behind the hidden states. The block runs on copies of its hidden states and containers.
    """
    given = {
        key: copy.copy(value) if isinstance(value, Containers) else value for key, value in named(args[1:], kwargs)
    }
    before = {key: state_of(value) for key, value in given.items()}
    with torch.no_grad():
        block.forward(
            args[0].clone(),
            *(given[i] for i in range(len(args) - 1)),
            **{key: value for key, value in given.items() if isinstance(key, str)},
        )
    return [
        (key if isinstance(key, str) else f"positional argument {key + 1}", value)
        for key, value in named(args[1:], kwargs)
        if state_of(given[key]) != before[key]
    ]


def state_of(value: Any) -> Any:
    """Something that differs after a write into the value: versions of tensors, contents of containers and objects."""
    if isinstance(value, Tensor):
        return None if value.is_inference() else value._version
    if isinstance(value, MutableMapping):
        return {key: (id(item), state_of(item)) for key, item in value.items()}
    if isinstance(value, list | tuple | MutableSequence):
        return [(id(item), state_of(item)) for item in value]
    if isinstance(value, MutableSet):
        return {id(item) for item in value}
    if isinstance(value, nn.Module | PretrainedConfig | Cache | type) or callable(value):
        return None
    if hasattr(value, "__dict__"):
        return {
            key: (id(item), item._version if isinstance(item, Tensor) else None) for key, item in vars(value).items()
        }
    return None
